"""What comes back from the upstream: exact bytes, exact ends, and never an end that was not one."""

import asyncio

import httpx
import pytest

from gateway.upstream import Transport
from tests.upstream.scripted import (
    OK,
    Peer,
    Server,
    answering,
    exchange,
    exchange_of,
    read,
    request,
    stream_of,
    turns,
    until,
)

CHUNKED = (
    b"HTTP/1.1 200 Fine\r\nX-A: 1\r\nx-a: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-Trailer: t\r\n\r\n"
)
SIZED = b"HTTP/1.1 201 Created\r\nX-Empty:\r\nContent-Length: 11\r\n\r\nhello world"


async def test_header_order_case_and_duplicates_survive(server: Server, transport: Transport) -> None:
    server.script = answering(
        b"HTTP/1.1 207 Odd Reason\r\nSet-Cookie: a=1\r\nX-UPPER: v\r\nset-cookie: b=2\r\nX-Empty:\r\n"
        b"SET-COOKIE: c=3\r\nContent-Length: 0\r\n\r\n"
    )
    response = await transport.handle_async_request(request(server))
    assert response.status_code == 207
    assert response.headers.raw == [
        (b"Set-Cookie", b"a=1"),
        (b"X-UPPER", b"v"),
        (b"set-cookie", b"b=2"),
        (b"X-Empty", b""),
        (b"SET-COOKIE", b"c=3"),
        (b"Content-Length", b"0"),
    ]
    assert response.extensions["reason_phrase"] == b"Odd Reason"
    assert response.extensions["http_version"] == b"HTTP/1.1"
    assert await read(response) == b""


async def test_chunked_body_is_decoded_and_its_trailers_are_kept(server: Server, transport: Transport) -> None:
    server.script = answering(CHUNKED)
    response = await transport.handle_async_request(request(server))
    assert await read(response) == b"hello world"
    assert response.extensions["trailers"] == [(b"X-Trailer", b"t")]
    assert await exchange(transport, request(server)) == (200, b"hello world")
    assert server.connections == 1


async def test_chunks_of_one_read_arrive_together_and_at_once(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n3\r\nd")
            await peer.reader.read(1)  # never comes: the answer stays unfinished

    server.script = script
    for whole in (True, False):
        stream = await exchange_of(transport, request(server))
        assert stream.incoming.framing == "chunked"
        if whole:
            assert await anext(aiter(stream)) == b"abcd"
        else:
            assert await anext(stream.pieces()) == [b"a", b"bc", b"d"]
        await stream.aclose()


@pytest.mark.parametrize("length", [b"Content-Length: 11\r\n", b""])
async def test_bodies_without_chunks_come_in_one_piece_per_wait(
    server: Server, transport: Transport, length: bytes
) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n" + length + b"\r\nhello")
        await go.wait()
        await peer.send(b" wo")
        await turns(4)
        await peer.send(b"rld")

    server.script = script
    stream = await exchange_of(transport, request(server))
    assert stream.incoming.framing == ("length" if length else "close")
    pieces = stream.pieces()
    assert await anext(pieces) == [b"hello"]
    go.set()
    await until(lambda: transport.stats().in_use == 0)
    assert await anext(pieces) == [b" world"]
    with pytest.raises(StopAsyncIteration):
        await anext(pieces)
    with pytest.raises(StopAsyncIteration):
        await anext(pieces)


@pytest.mark.parametrize("answer", [CHUNKED, SIZED, b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED])
async def test_any_split_of_an_answer_reads_the_same(server: Server, transport: Transport, answer: bytes) -> None:
    at = 0

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(answer[:at])
            await turns(4)
            await peer.send(answer[at:])

    server.script = script
    whole = None
    for at in range(len(answer)):
        response = await transport.handle_async_request(request(server))
        result = (response.status_code, response.headers.raw, response.extensions["reason_phrase"])
        result += (await read(response), response.extensions["trailers"])  # type: ignore[assignment]  # compared only
        whole = whole or result
        assert result == whole, f"split at {at}"
    assert server.connections == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("answer", [CHUNKED, SIZED])
async def test_an_answer_cut_at_any_byte_is_never_a_clean_end(
    server: Server, transport: Transport, answer: bytes, how: str
) -> None:
    at = 0

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer[:at])
        await turns(4)
        peer.close() if how == "close" else peer.reset()

    server.script = script
    for at in range(len(answer)):
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await exchange(transport, request(server))
        assert (transport.stats().open, transport.stats().in_use) == (0, 0), f"cut at {at}"


@pytest.mark.parametrize(
    "head",
    [
        b"204 No Content\r\n\r\n",
        b"204 No Content\r\nContent-Length: 0\r\n\r\n",
        b"304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        b"304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_answers_without_a_body_end_with_their_head(server: Server, transport: Transport, head: bytes) -> None:
    server.script = answering(b"HTTP/1.1 " + head)
    for _ in range(2):
        response = await transport.handle_async_request(request(server))
        assert (response.status_code, response.extensions["framing"]) == (int(head[:3]), "none")
        assert await read(response) == b""
    assert server.connections == 1


@pytest.mark.parametrize("field", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
async def test_a_204_that_promises_a_body_costs_the_connection(
    server: Server, transport: Transport, field: bytes
) -> None:
    server.script = answering(b"HTTP/1.1 204 No Content\r\n" + field + b"\r\n\r\n")
    for _ in range(2):
        assert await exchange(transport, request(server)) == (204, b"")
    assert server.connections == 2


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"X: neither"])
async def test_the_answer_to_head_has_no_body(server: Server, transport: Transport, framing: bytes) -> None:
    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n" if head.startswith(b"HEAD") else OK)

    server.script = script
    assert await exchange(transport, request(server, "HEAD")) == (200, b"")
    assert await exchange(transport, request(server)) == (200, b"ok")
    assert server.connections == 1


@pytest.mark.parametrize("rest", [b"Content-Length: 2\r\n\r\nok", b"Transfer-Encoding: chunked\r\n\r\n5"])
async def test_a_body_after_head_costs_the_connection(server: Server, transport: Transport, rest: bytes) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\n" + rest)
    for _ in range(2):
        assert await exchange(transport, request(server, "HEAD")) == (200, b"")
    assert server.connections == 2


async def test_a_head_and_a_broken_body_in_one_read_are_an_error_and_no_answer(
    server: Server, transport: Transport
) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server))
    assert transport.stats().open == 0


async def test_a_body_that_breaks_is_delivered_as_far_as_it_was_good(server: Server, transport: Transport) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n")
    stream = aiter(stream_of(await transport.handle_async_request(request(server))))
    assert await anext(stream) == b"ok"
    with pytest.raises(httpx.RemoteProtocolError):
        await anext(stream)
    assert transport.stats().open == 0


async def test_interim_answers_are_skipped(server: Server, transport: Transport) -> None:
    server.script = answering(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK)
    response = await transport.handle_async_request(request(server))
    assert (response.status_code, response.headers.raw) == (200, [(b"Content-Length", b"2")])
    assert response.extensions["reason_phrase"] == b"OK"
    assert await read(response) == b"ok"


async def test_a_body_may_end_with_the_connection(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.0 200 OK\r\n\r\nuntil ")
        await turns(3)
        await peer.send(b"close")

    server.script = script
    assert await exchange(transport, request(server)) == (200, b"until close")
    assert transport.stats().open == 0


async def test_a_body_that_ends_with_the_connection_does_not_end_with_a_reset(
    server: Server, transport: Transport
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil ")
        await turns(3)
        peer.reset()

    server.script = script
    with pytest.raises(httpx.ReadError):
        await exchange(transport, request(server))


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_malformed_answers_are_errors(server: Server, transport: Transport, answer: bytes) -> None:
    server.script = answering(answer)
    with pytest.raises(httpx.RemoteProtocolError):
        await exchange(transport, request(server))
    assert transport.stats().open == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"a" * 2_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 2_000,
    ],
)
async def test_heads_and_everything_else_but_content_are_bounded(server: Server, answer: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        for at in range(0, len(answer), 500):
            await peer.send(answer[at : at + 500])
            await turns(4)
        await peer.closed()

    server.script = script
    transport = Transport(head_bytes_max=1_024)
    with pytest.raises(httpx.RemoteProtocolError):
        await exchange(transport, request(server))
    assert transport.stats().open == 0


async def test_a_large_body_in_the_read_of_its_head_does_not_count_as_head(server: Server) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"b" * 5_000)
    transport = Transport(head_bytes_max=1_024)
    assert await exchange(transport, request(server)) == (200, b"b" * 5_000)
    await transport.aclose()


@pytest.mark.parametrize(
    "after", [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", b"HTTP/1.1 2", b"x", b"0\r\n\r\n"]
)
async def test_bytes_after_an_answer_never_reach_the_next_request(
    server: Server, transport: Transport, after: bytes
) -> None:
    server.script = answering(OK + after)
    assert await exchange(transport, request(server)) == (200, b"ok")
    assert transport.stats().open == 0
    assert await exchange(transport, request(server)) == (200, b"ok")


async def test_connection_close_is_obeyed(server: Server, transport: Transport) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, CLOSE\r\nContent-Length: 2\r\n\r\nok")
    assert await exchange(transport, request(server)) == (200, b"ok")
    assert transport.stats().open == 0


async def test_closing_the_stream_early_closes_the_upstream_connection(server: Server, transport: Transport) -> None:
    gone: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await peer.closed()
        gone.append(peer.number)

    server.script = script
    response = await transport.handle_async_request(request(server))
    stream = stream_of(response)
    assert await anext(aiter(stream)) == b"half"
    await stream.aclose()
    assert transport.stats().open == 0
    await until(lambda: gone == [1], timeout_s=2)
    with pytest.raises(httpx.ReadError):
        await anext(aiter(stream))


async def test_closing_a_complete_answer_unread_keeps_the_connection_but_is_no_clean_end(
    server: Server, transport: Transport
) -> None:
    response = await transport.handle_async_request(request(server))
    await stream_of(response).aclose()
    assert transport.stats().idle == 1
    with pytest.raises(httpx.ReadError):
        await read(response)


async def test_bytes_that_arrived_before_a_break_are_delivered_before_the_error(
    server: Server, transport: Transport
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    server.script = script
    response = await transport.handle_async_request(request(server))
    await until(lambda: transport.stats().open == 0)
    stream = aiter(stream_of(response))
    assert await anext(stream) == b"half"
    with pytest.raises(httpx.RemoteProtocolError):
        await anext(stream)

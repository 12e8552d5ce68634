"""What goes to the upstream: the bytes as given, framed exactly, stopped when nobody wants them."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.upstream import Transport
from tests.upstream.scripted import OK, Peer, Server, exchange, read, request, steady, stream_of, until


class Recorder:
    """Answers 200 and keeps what was asked."""

    def __init__(self, server: Server) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        server.script = self.script

    async def script(self, peer: Peer) -> None:
        while True:
            head, body = await peer.request()
            self.heads.append(head)
            self.bodies.append(body)
            await peer.send(OK)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def endless(counted: list[int], size: int = 65_536) -> AsyncIterator[bytes]:
    while True:
        counted.append(size)
        yield b"x" * size


async def test_headers_and_target_go_out_verbatim(server: Server, transport: Transport) -> None:
    recorder = Recorder(server)
    headers = [(b"X-b", b"1"), (b"x-A", b"2"), (b"X-B", b" 3"), (b"Content-LENGTH", b"4")]
    await exchange(
        transport, request(server, "POST", headers=headers, body=b"body", target=b"/a%2Fb/../c?q=%zz&\xc3\xa9")
    )
    assert recorder.heads == [
        b"POST /a%2Fb/../c?q=%zz&\xc3\xa9 HTTP/1.1\r\nHost: upstream\r\nX-b: 1\r\nx-A: 2\r\nX-B:  3\r\n"
        b"Content-LENGTH: 4\r\n\r\n"
    ]
    assert recorder.bodies == [b"body"]


async def test_only_missing_framing_is_added(server: Server, transport: Transport) -> None:
    recorder = Recorder(server)
    await exchange(transport, request(server, "POST", path="/p?q"))
    await exchange(transport, request(server, "POST", body=b"body"))
    await exchange(transport, request(server, "POST", body=pieces(b"bo", b"", b"dy")))
    await exchange(transport, request(server, "POST", headers=[(b"transfer-encoding", b"Chunked")], body=b"body"))
    host = b"Host: upstream\r\n"
    assert recorder.heads == [
        b"POST /p?q HTTP/1.1\r\n" + host + b"\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 4\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\n" + host + b"transfer-encoding: Chunked\r\n\r\n",
    ]
    assert recorder.bodies == [b"", b"body", b"body", b"body"]
    assert server.connections == 1


async def test_a_streamed_body_keeps_its_content_length(server: Server, transport: Transport) -> None:
    recorder = Recorder(server)
    sized = [(b"Content-Length", b"6")]
    for body in (pieces(b"abc", b"def"), pieces(b"abcdef")):
        await exchange(transport, request(server, "POST", headers=sized, body=body))
    await exchange(transport, request(server, "POST", headers=[(b"Content-Length", b"0")], body=pieces()))
    assert recorder.bodies == [b"abcdef", b"abcdef", b""]
    assert server.connections == 1


async def test_a_large_body_arrives_whole(server: Server, transport: Transport) -> None:
    recorder = Recorder(server)
    body = bytes(range(256)) * 8_192
    for _ in range(2):
        await exchange(transport, request(server, "POST", body=body))
    assert recorder.bodies == [body, body]
    assert server.connections == 1


@pytest.mark.parametrize("parts", [(b"abc",), (b"abc", b"defg"), ()])
async def test_a_body_of_another_length_than_announced_closes_the_connection(
    server: Server, transport: Transport, parts: tuple[bytes, ...]
) -> None:
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        received.append(await peer.reader.read(-1))

    server.script = script
    with pytest.raises(httpx.LocalProtocolError):
        await exchange(transport, request(server, "POST", headers=[(b"Content-Length", b"6")], body=pieces(*parts)))
    assert transport.stats().open == 0
    await until(lambda: len(received) == 1)
    assert len(received[0]) <= 6, "nothing beyond the announced length may leave: it would begin another request"


@pytest.mark.parametrize(
    ("headers", "target"),
    [
        ([(b"Content-Length", b"5")], b"/"),
        ([(b"Content-Length", b"4"), (b"content-length", b"4")], b"/"),
        ([(b"Content-Length", b"4"), (b"Transfer-Encoding", b"chunked")], b"/"),
        ([(b"Content-Length", b"+4")], b"/"),
        ([(b"Content-Length", b"9" * 5_000)], b"/"),
        ([(b"Transfer-Encoding", b"gzip")], b"/"),
        ([(b"Transfer-Encoding", b"chunked"), (b"Transfer-Encoding", b"chunked")], b"/"),
        ([(b"X", b"a\r\nY: b")], b"/"),
        ([(b"X", b"a\nY: b")], b"/"),
        ([(b"X", b"a\rb")], b"/"),
        ([(b"X", b"a\0b")], b"/"),
        ([(b"X:", b"a")], b"/"),
        ([(b"X ", b"a")], b"/"),
        ([(b"", b"a")], b"/"),
        ([], b"/ HTTP/1.1\r\nX: y"),
        ([], b"/a b"),
        ([], b"/a\tb"),
    ],
)
async def test_ambiguous_requests_are_refused_before_anything_is_sent(
    server: Server, transport: Transport, headers: list[tuple[bytes, bytes]], target: bytes
) -> None:
    message = request(server, "POST", headers=headers, body=b"body", target=target)
    with pytest.raises(httpx.LocalProtocolError):
        await transport.handle_async_request(message)
    assert message.extensions["reached"] is False
    assert (transport.stats().open, transport.stats().dialling) == (0, 0)


async def test_trailers_are_sent_behind_the_last_chunk(server: Server, transport: Transport) -> None:
    trailers: list[tuple[bytes, bytes]] = []
    received: list[bytes] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"body"
        trailers.extend([(b"X-Check", b"a: b"), (b"x-check", b"")])  # known only now

    async def script(peer: Peer) -> None:
        await peer.head()
        received.append(await peer.reader.readuntil(b"\r\n\r\n"))
        await peer.send(OK)
        await peer.head()

    server.script = script
    assert await exchange(transport, request(server, "POST", body=body(), trailers=trailers)) == (200, b"ok")
    assert received == [b"4\r\nbody\r\n0\r\nX-Check: a: b\r\nx-check: \r\n\r\n"]
    assert transport.stats().idle == 1


async def test_trailers_of_a_body_that_is_there_are_sent_too(server: Server, transport: Transport) -> None:
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        received.append(await peer.reader.readuntil(b"t\r\n\r\n"))
        await peer.send(OK)

    server.script = script
    chunked = [(b"Transfer-Encoding", b"chunked")]
    message = request(server, "POST", headers=chunked, body=b"body", trailers=[(b"X", b"t")])
    await exchange(transport, message)
    assert received == [b"4\r\nbody\r\n0\r\nX: t\r\n\r\n"]


async def test_a_body_of_known_length_has_no_trailers(server: Server, transport: Transport) -> None:
    recorder = Recorder(server)
    sized = [(b"Content-Length", b"4")]
    for body in (b"body", pieces(b"body")):
        await exchange(transport, request(server, "POST", headers=sized, body=body, trailers=[(b"X", b"t")]))
    assert recorder.bodies == [b"body", b"body"]
    assert server.connections == 1


@pytest.mark.parametrize(
    "field",
    [(b"X:", b"a"), (b"", b"a"), (b"X\r\nY", b"a"), (b"X", b"a\r\n\r\nGET / HTTP/1.1"), (b"X", b"a\nb"), (b"X", b"\0")],
)
async def test_trailers_that_would_be_read_as_something_else_close_the_connection(
    server: Server, transport: Transport, field: tuple[bytes, bytes]
) -> None:
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        received.append(await peer.reader.read(-1))

    server.script = script
    with pytest.raises(httpx.LocalProtocolError):
        await exchange(transport, request(server, "POST", body=pieces(b"body"), trailers=[field]))
    assert transport.stats().open == 0
    await until(lambda: received in ([b"4\r\nbody\r\n"], [b""]))


async def test_connection_close_of_the_request_is_obeyed(server: Server, transport: Transport) -> None:
    await exchange(transport, request(server, headers=[(b"Connection", b"close")]))
    assert transport.stats().open == 0


async def test_an_early_refusal_stops_the_upload_and_is_returned(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.closed()

    server.script = script
    counted: list[int] = []
    response = await transport.handle_async_request(request(server, "POST", body=endless(counted)))
    assert response.extensions["request_sent"] is False
    assert (response.status_code, await read(response)) == (413, b"big")
    assert transport.stats().open == 0
    before = len(counted)
    assert await steady(lambda: len(counted)) == before


async def test_an_early_refusal_of_a_buffered_body_is_returned(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.closed()

    server.script = script
    assert await exchange(transport, request(server, "POST", body=b"x" * 50_000_000)) == (413, b"big")
    assert transport.stats().open == 0


async def test_an_answer_may_stream_beside_the_upload(server: Server, transport: Transport) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def body() -> AsyncIterator[bytes]:
        yield b"one"
        yield await heard.get()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n")
        for _ in range(2):
            await peer.send(await peer.reader.readexactly(3))
        await peer.head()

    server.script = script
    sized = [(b"Content-Length", b"6")]
    response = await transport.handle_async_request(request(server, "POST", headers=sized, body=body()))
    stream = aiter(stream_of(response))
    assert await anext(stream) == b"one"
    heard.put_nowait(b"two")
    assert await anext(stream) == b"two"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert transport.stats().idle == 1


async def test_an_answer_that_ends_before_the_upload_costs_the_connection(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.closed()

    server.script = script
    counted: list[int] = []
    assert await exchange(transport, request(server, "POST", body=endless(counted))) == (200, b"ok")
    assert transport.stats().open == 0
    before = len(counted)
    assert await steady(lambda: len(counted)) == before


async def test_the_upload_waits_for_the_upstream(server: Server, transport: Transport) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await go.wait()
        while int(await peer.reader.readline(), 16):
            pass
        await peer.send(OK)

    server.script = script
    counted: list[int] = []
    task = asyncio.ensure_future(exchange(transport, request(server, "POST", body=endless(counted))))
    await until(lambda: len(counted) > 1)
    assert await steady(lambda: sum(counted)) < 32_000_000, "socket buffers and ours, not the whole body"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert transport.stats().open == 0
    go.set()


async def test_the_upstream_waits_for_the_reader(server: Server, transport: Transport) -> None:
    total, sent = 64_000_000, [0]

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while sent[0] < total:
            await peer.send(b"x" * 64_000)
            sent[0] += 64_000
        await peer.head()

    server.script = script
    response = await transport.handle_async_request(request(server))
    assert await steady(lambda: sent[0]) < 32_000_000
    stream = aiter(stream_of(response))
    first = await anext(stream)
    assert len(first) < 512 * 1024, "the high-water mark and one read"
    received = len(first)
    async for chunk in stream:
        received += len(chunk)
    assert received == total
    assert transport.stats().idle == 1


async def test_a_failing_body_is_the_error_and_closes_the_connection(server: Server, transport: Transport) -> None:
    class Left(Exception):
        pass

    async def body() -> AsyncIterator[bytes]:
        yield b"some"
        raise Left

    async def script(peer: Peer) -> None:
        await peer.closed()

    server.script = script
    with pytest.raises(Left):
        await transport.handle_async_request(request(server, "POST", body=body()))
    assert transport.stats().open == 0


async def test_a_body_that_ignores_its_cancellation_is_stopped(server: Server, transport: Transport) -> None:
    counted: list[int] = []

    async def stubborn() -> AsyncIterator[bytes]:
        yield b"four"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            counted.append(0)
        while len(counted) < 10_000:
            counted.append(1)
            yield b"more"

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await peer.closed()

    server.script = script
    assert await exchange(transport, request(server, "POST", body=stubborn())) == (413, b"big")
    assert counted == [0, 1]


async def test_an_upload_ends_with_its_connection(server: Server, transport: Transport) -> None:
    ended: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"part"
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def script(peer: Peer) -> None:
        await peer.head()
        peer.reset()

    server.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        await exchange(transport, request(server, "POST", body=body()))
    assert ended == [1]


async def test_the_upload_stops_at_the_head_of_a_refusal(server: Server, transport: Transport) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\n")
        while not go.is_set():
            await peer.reader.read(65_536)
        await peer.send(b"big")
        await peer.closed()

    server.script = script
    counted: list[int] = []

    async def slow() -> AsyncIterator[bytes]:
        async for piece in endless(counted, 1):
            await asyncio.sleep(0)
            yield piece
            if len(counted) > 5_000:
                go.set()
                return

    response = await transport.handle_async_request(request(server, "POST", body=slow()))
    before = len(counted)
    assert await steady(lambda: len(counted)) == before
    go.set()
    await stream_of(response).aclose()
    assert transport.stats().open == 0


@pytest.mark.parametrize("headers", [[(b"Content-Length", b"100")], []])
async def test_a_connection_whose_request_was_not_sent_whole_is_not_reused(
    server: Server, transport: Transport, headers: list[tuple[bytes, bytes]]
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"part"
        await asyncio.Event().wait()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.closed()

    server.script = script
    assert await exchange(transport, request(server, "POST", headers=headers, body=body())) == (200, b"ok")
    assert transport.stats().open == 0


async def test_a_connection_whose_request_waits_in_our_buffer_is_not_reused(
    server: Server, transport: Transport
) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        await peer.closed()

    server.script = script
    sized = [(b"Content-Length", b"50000000")]
    message = request(server, "POST", headers=sized, body=pieces(b"x" * 50_000_000))
    assert await exchange(transport, message) == (200, b"ok")
    assert transport.stats().open == 0

"""Before the answer: interim answers, and bodies that are sent only when the upstream asks for them."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.upstream import Timeouts, Transport
from tests.upstream.scripted import OK, Peer, Server, answering, exchange, read, request, stream_of, turns, until

EXPECT = [(b"Expect", b"100-continue"), (b"Content-Length", b"4")]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Client:
    """Somebody who sends the body when told to, and keeps what was relayed."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, bytes, list[tuple[bytes, bytes]]]] = []
        self.told = asyncio.Event()

    async def interim(self, status: int, reason: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        await asyncio.sleep(0)
        self.heard.append((status, reason, fields))
        if status == 100:
            self.told.set()

    async def body(self) -> AsyncIterator[bytes]:
        await self.told.wait()
        yield b"bo"
        yield b"dy"


async def test_interim_answers_are_relayed_in_order(server: Server, transport: Transport) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nLink: </b>\r\n\r\n"
    server.script = answering(CONTINUE + hints + b"HTTP/1.1 199\r\nContent-Length: 0\r\n\r\n" + OK)
    client = Client()
    for _ in range(2):
        client.heard.clear()
        assert await exchange(transport, request(server, interim=client.interim)) == (200, b"ok")
        assert client.heard == [
            (100, b"Continue", []),
            (103, b"Early Hints", [(b"Link", b"</a>"), (b"Link", b"</b>")]),
            (199, b"", []),
        ]
    assert server.connections == 1


async def test_interim_answers_are_relayed_when_they_come(server: Server, transport: Transport) -> None:
    client = Client()

    async def script(peer: Peer) -> None:
        await peer.request()
        for number in range(3):
            await peer.send(b"HTTP/1.1 102 Processing\r\nX: %d\r\n\r\n" % number)
            while len(client.heard) <= number:
                await turns(1)
        await peer.send(OK)

    server.script = script
    assert await exchange(transport, request(server, interim=client.interim)) == (200, b"ok")
    assert len(client.heard) == 3


async def test_whoever_cannot_take_an_interim_answer_ends_the_exchange(server: Server, transport: Transport) -> None:
    class Left(Exception):
        pass

    async def interim(status: int, reason: bytes, fields: object) -> None:
        raise Left

    server.script = answering(CONTINUE + OK)
    with pytest.raises(Left):
        await transport.handle_async_request(request(server, interim=interim))
    assert transport.stats().in_use == 0


async def test_interim_answers_before_a_break_are_still_relayed(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CONTINUE)

    server.script = script
    client = Client()
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server, interim=client.interim))
    assert [status for status, _, _ in client.heard] == [100]


async def test_too_many_interim_answers_are_refused(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        while not peer.reader.at_eof():
            await peer.send(CONTINUE)
            await turns(1)

    server.script = script
    transport = Transport(head_bytes_max=1_000)
    client = Client()
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server, interim=client.interim))
    assert len(client.heard) <= 40
    assert transport.stats().open == 0


async def test_an_interim_answer_that_says_close_means_the_answer_to_come(server: Server, transport: Transport) -> None:
    server.script = answering(b"HTTP/1.1 100 Continue\r\nConnection: close\r\n\r\n" + OK)
    assert await exchange(transport, request(server)) == (200, b"ok")


# -- Expect: 100-continue ----------------------------------------------------------------------------------------


async def test_the_body_is_sent_when_the_upstream_asks(server: Server, transport: Transport) -> None:
    client = Client()
    early: list[bytes] = []

    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.head()
            await turns(20)
            early.append(bytes(peer.reader._buffer))  # type: ignore[attr-defined]  # what nobody has read yet
            await peer.send(CONTINUE)
            assert await peer.reader.readexactly(4) == b"body"
            await peer.send(OK)

    server.script = script
    for _ in range(2):
        client.told.clear()
        message = request(server, "POST", headers=EXPECT, body=client.body(), interim=client.interim)
        response = await transport.handle_async_request(message)
        assert (response.status_code, await read(response)) == (200, b"ok")
        assert response.extensions["request_sent"] is True
    assert early == [b"", b""]
    assert server.connections == 1


async def test_a_body_that_is_there_is_not_waited_with(server: Server, transport: Transport) -> None:
    assert await exchange(transport, request(server, "POST", headers=EXPECT, body=b"body")) == (200, b"ok")


@pytest.mark.parametrize("answer", [OK, b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno"])
async def test_an_answer_instead_of_100_ends_the_request_without_its_body(
    server: Server, transport: Transport, answer: bytes
) -> None:
    client = Client()
    after: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer)
        after.append(await peer.reader.read(100))

    server.script = script
    message = request(server, "POST", headers=EXPECT, body=client.body(), interim=client.interim)
    response = await transport.handle_async_request(message)
    assert response.extensions["request_sent"] is False
    assert await read(response) in (b"ok", b"no")
    client.told.set()
    assert client.heard == []
    assert transport.stats().open == 0, "the upstream would take the next request for the body"
    await until(lambda: after == [b""])


async def test_an_answer_streams_on_after_the_body_was_not_wanted(server: Server, transport: Transport) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfi")
        await go.wait()
        await peer.send(b"ne")
        await peer.closed()

    server.script = script
    client = Client()
    response = await transport.handle_async_request(request(server, "POST", headers=EXPECT, body=client.body()))
    stream = aiter(stream_of(response))
    assert await anext(stream) == b"fi"
    client.told.set()  # too late
    go.set()
    assert await anext(stream) == b"ne"
    assert transport.stats().open == 0


async def test_a_client_that_does_not_wait_for_the_100_is_forwarded(server: Server, transport: Transport) -> None:
    client = Client()
    client.told.set()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)  # a body is no longer asked for when it has come (RFC 9110 §10.1.1)
        await peer.head()

    server.script = script
    message = request(server, "POST", headers=EXPECT, body=client.body(), interim=client.interim)
    assert await exchange(transport, message) == (200, b"ok")
    assert transport.stats().idle == 1


async def test_a_client_that_began_without_being_asked_may_take_its_time(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"bo"
        await asyncio.sleep(0.1)  # longer than the deadline: the slowness is the thing under test
        yield b"dy"

    async def script(peer: Peer) -> None:
        for head, rest in ((b"", OK), (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"fine")):
            await peer.head()
            assert await peer.reader.readexactly(2) == b"bo"
            await peer.send(head)
            assert await peer.reader.readexactly(2) == b"dy"
            await peer.send(rest)

    server.script = script
    transport = Transport(timeouts=Timeouts(first_byte_ms=30))
    for answer in (b"ok", b"fine"):
        assert await exchange(transport, request(server, "POST", headers=EXPECT, body=body())) == (200, answer)
    await transport.aclose()


async def test_100_and_answer_in_one_read(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CONTINUE + b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert await peer.reader.readexactly(4) == b"body"
        await peer.send(b"2\r\nok\r\n0\r\n\r\n")
        await peer.head()

    server.script = script
    client = Client()
    message = request(server, "POST", headers=EXPECT, body=client.body(), interim=client.interim)
    assert await exchange(transport, message) == (200, b"ok")
    assert transport.stats().idle == 1


async def test_an_upstream_that_neither_asks_nor_answers_is_given_up(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.closed()

    server.script = script
    client = Client()
    transport = Transport(timeouts=Timeouts(first_byte_ms=30))
    with pytest.raises(httpx.ReadTimeout):
        await transport.handle_async_request(request(server, "POST", headers=EXPECT, body=client.body()))
    assert transport.stats().open == 0


async def test_a_client_that_was_asked_may_take_its_time(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(CONTINUE)
        assert await peer.reader.readexactly(4) == b"body"
        await peer.send(OK)

    class Slow(Client):
        async def body(self) -> AsyncIterator[bytes]:
            await self.told.wait()
            await asyncio.sleep(0.1)  # longer than the deadline: the slowness is the thing under test
            yield b"body"

    server.script = script
    client = Slow()
    transport = Transport(timeouts=Timeouts(first_byte_ms=30))
    message = request(server, "POST", headers=EXPECT, body=client.body(), interim=client.interim)
    assert await exchange(transport, message) == (200, b"ok")
    await transport.aclose()

"""Which error of httpx each failure becomes, and that none of them leaves a connection behind."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from gateway.upstream import Timeouts, Transport
from gateway.upstream.wire import StaleConnection, Unanswered
from tests.upstream.scripted import OK, Peer, Server, exchange, request, turns

TINY_MS = 30
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"


async def _silent(peer: Peer) -> None:
    await peer.closed()


async def _deaf(peer: Peer) -> None:
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a ReadTransport
    await asyncio.Event().wait()


async def _half(peer: Peer) -> None:
    await peer.head()
    await peer.send(HALF)
    await peer.closed()


def _https(server: Server) -> httpx.Request:
    return httpx.Request("GET", f"https://127.0.0.1:{server.port}/", stream=httpx.ByteStream(b""))


async def connect_timeout(server: Server) -> None:
    server.script = _silent  # accepts, but never answers the TLS handshake
    await exchange(Transport(timeouts=Timeouts(connect_ms=TINY_MS)), _https(server))


async def connect_refused(server: Server) -> None:
    async with Server() as gone:
        pass
    await exchange(Transport(), request(gone))


async def name_impossible(server: Server) -> None:
    # Refused before a resolver is asked: a label has at most 63 bytes.
    message = httpx.Request("GET", f"http://{'a' * 64}.invalid/", stream=httpx.ByteStream(b""))
    await exchange(Transport(), message)


async def no_tls_at_all(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.send(b"220 mail ready\r\n")

    server.script = script
    await exchange(Transport(), _https(server))


async def closed_in_the_handshake(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(1)

    server.script = script
    await exchange(Transport(tls=ssl.create_default_context()), _https(server))


async def queue(server: Server) -> None:
    server.script = _half
    transport = Transport(connections_max=1, timeouts=Timeouts(pool_ms=TINY_MS))
    response = await transport.handle_async_request(request(server))
    try:
        await exchange(transport, request(server))
    finally:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await response.stream.aclose()


async def write_timeout(server: Server) -> None:
    server.script = _deaf
    transport = Transport(timeouts=Timeouts(write_ms=TINY_MS))
    await exchange(transport, request(server, "POST", body=b"x" * 50_000_000))


async def first_byte(server: Server) -> None:
    server.script = _silent
    await exchange(Transport(timeouts=Timeouts(first_byte_ms=TINY_MS)), request(server))


async def idle(server: Server) -> None:
    server.script = _half
    await exchange(Transport(timeouts=Timeouts(idle_ms=TINY_MS)), request(server))


async def closed_unanswered(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()

    server.script = script
    await exchange(Transport(), request(server))


async def reset_unanswered(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        peer.reset()

    server.script = script
    await exchange(Transport(), request(server))


async def closed_when_used_again(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.head()

    server.script = script
    transport = Transport()
    await exchange(transport, request(server))
    await exchange(transport, request(server))


async def closed_within_the_answer(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(HALF)

    server.script = script
    await exchange(Transport(), request(server))


async def reset_within_the_answer(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(HALF)
        await turns(5)
        peer.reset()

    server.script = script
    await exchange(Transport(), request(server))


async def reset_within_the_request(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"part"
        await asyncio.Event().wait()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await turns(5)
        peer.reset()

    server.script = script
    await exchange(Transport(), request(server, "POST", body=body()))


async def body_cancelled(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"part"
        raise asyncio.CancelledError

    server.script = _silent
    await exchange(Transport(), request(server, "POST", body=body()))


async def transport_closed(server: Server) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        asked.set()
        await peer.closed()

    server.script = script
    transport = Transport()
    task = asyncio.ensure_future(exchange(transport, request(server)))
    await asked.wait()
    await transport.aclose()
    await task


async def answer_given_up(server: Server) -> None:
    server.script = _half
    response = await Transport().handle_async_request(request(server))
    assert isinstance(response.stream, httpx.AsyncByteStream)
    await response.stream.aclose()
    await anext(aiter(response.stream))


async def nonsense(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"SSH-2.0-OpenSSH_9.6\r\n")
        await peer.closed()

    server.script = script
    await exchange(Transport(), request(server))


async def request_impossible(server: Server) -> None:
    await exchange(Transport(), request(server, headers=[(b"X", b"a\r\nb")]))


async def request_too_short(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"part"

    server.script = _silent
    await exchange(Transport(), request(server, "POST", headers=[(b"Content-Length", b"9")], body=body()))


async def another_scheme(server: Server) -> None:
    await exchange(Transport(), httpx.Request("GET", "ftp://host/", stream=httpx.ByteStream(b"")))


FAILURES: list[tuple[Callable[[Server], Awaitable[None]], type[httpx.TransportError]]] = [
    (connect_timeout, httpx.ConnectTimeout),
    (connect_refused, httpx.ConnectError),
    (name_impossible, httpx.ConnectError),
    (no_tls_at_all, httpx.ConnectError),
    (closed_in_the_handshake, httpx.ConnectError),
    (queue, httpx.PoolTimeout),
    (write_timeout, httpx.WriteTimeout),
    (first_byte, httpx.ReadTimeout),
    (idle, httpx.ReadTimeout),
    (closed_unanswered, Unanswered),
    (reset_unanswered, Unanswered),
    (closed_when_used_again, StaleConnection),
    (closed_within_the_answer, httpx.RemoteProtocolError),
    (reset_within_the_answer, httpx.ReadError),
    (reset_within_the_request, httpx.WriteError),
    (body_cancelled, httpx.WriteError),
    (transport_closed, httpx.ReadError),
    (answer_given_up, httpx.ReadError),
    (nonsense, httpx.RemoteProtocolError),
    (request_impossible, httpx.LocalProtocolError),
    (request_too_short, httpx.LocalProtocolError),
    (another_scheme, httpx.UnsupportedProtocol),
]


@pytest.mark.parametrize(("provoke", "error"), FAILURES, ids=lambda value: value.__name__)
async def test_every_failure_has_its_error(
    server: Server,
    provoke: Callable[[Server], Awaitable[None]],
    error: type[httpx.TransportError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transports: list[Transport] = []
    begin = Transport.__init__

    def remembering(self: Transport, **options: object) -> None:
        begin(self, **options)  # type: ignore[arg-type]  # whatever the case says
        transports.append(self)

    monkeypatch.setattr(Transport, "__init__", remembering)
    with pytest.raises(httpx.TransportError) as caught:
        await provoke(server)
    assert type(caught.value) is error
    for transport in transports:
        assert (transport.stats().open, transport.stats().dialling, transport.stats().waiting) == (0, 0, 0)

"""The connection after a 101: bytes both ways, with back-pressure, counted until it is closed, and closed for sure."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from gateway.upstream import Stats, Timeouts, Transport
from gateway.upstream.tunnel import Tunnel
from tests.upstream.scripted import OK, Peer, Server, answering, request, steady, stream_of, turns, until

UPGRADE = [(b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"WebSocket")]
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nX-Yes: 1\r\n\r\n"


async def switched(transport: Transport, server: Server) -> tuple[httpx.Response, Tunnel]:
    response = await transport.handle_async_request(request(server, headers=UPGRADE))
    tunnel = response.extensions["network_stream"]
    assert isinstance(tunnel, Tunnel)
    return response, tunnel


async def echo(peer: Peer) -> None:
    await peer.head()
    await peer.send(SWITCH)
    while data := await peer.reader.read(65_536):
        await peer.send(data)


async def until_ended(tunnel: Tunnel) -> bytes:
    received = b""
    while data := await tunnel.read():
        received += data
    return received


async def test_bytes_pass_both_ways(server: Server, transport: Transport) -> None:
    server.script = echo
    response, tunnel = await switched(transport, server)
    assert (response.status_code, response.extensions["reason_phrase"]) == (101, b"Switching Protocols")
    assert (b"X-Yes", b"1") in response.headers.raw
    assert response.extensions["framing"] == "none"
    for message in (b"one", b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"):
        await tunnel.write(message)
        assert await tunnel.read() == message
    assert transport.stats() == Stats(open=1, idle=0, in_use=1, waiting=0, dialling=0)
    await tunnel.aclose()
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_bytes_behind_the_head_are_read_first(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH + b"early")
        await peer.closed()

    server.script = script
    _, tunnel = await switched(transport, server)
    assert await tunnel.read() == b"early"
    tunnel.abort()


@pytest.mark.parametrize("headers", [[], [(b"Upgrade", b"websocket")], [(b"Connection", b"upgrade")]])
async def test_a_switch_that_nobody_asked_for_is_an_error(
    server: Server, transport: Transport, headers: list[tuple[bytes, bytes]]
) -> None:
    server.script = answering(SWITCH)
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server, headers=headers))
    assert transport.stats().open == 0


async def test_a_switch_to_another_protocol_is_an_error(server: Server, transport: Transport) -> None:
    server.script = answering(SWITCH.replace(b"websocket", b"h2c"))
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server, headers=UPGRADE))
    assert transport.stats().open == 0


async def test_a_switch_before_the_whole_request_is_an_error(server: Server, transport: Transport) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"part"
        await asyncio.Event().wait()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await peer.closed()

    server.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        await transport.handle_async_request(request(server, "POST", headers=UPGRADE, body=body()))
    assert transport.stats().open == 0


async def test_an_upgrade_may_be_declined(server: Server, transport: Transport) -> None:
    server.script = answering(OK)
    response = await transport.handle_async_request(request(server, headers=UPGRADE))
    assert response.status_code == 200 and "network_stream" not in response.extensions
    assert b"".join([chunk async for chunk in stream_of(response)]) == b"ok"
    assert transport.stats().idle == 1


async def test_the_end_of_the_upstream_is_read_after_its_last_bytes(server: Server, transport: Transport) -> None:
    received: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH + b"last words")
        peer.writer.write_eof()
        received.append(await peer.reader.read(-1))

    server.script = script
    _, tunnel = await switched(transport, server)
    assert await until_ended(tunnel) == b"last words"
    assert await tunnel.read() == b""
    assert transport.stats().in_use == 1
    await tunnel.write(b"goodbye")  # its own direction is still open
    await tunnel.aclose()
    assert transport.stats().open == 0
    await until(lambda: received == [b"goodbye"])


async def test_a_reset_is_no_end(server: Server, transport: Transport) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH + b"words")
        await go.wait()
        peer.reset()

    server.script = script
    _, tunnel = await switched(transport, server)
    assert await tunnel.read() == b"words"
    go.set()
    with pytest.raises(httpx.ReadError):
        await tunnel.read()
    with pytest.raises(httpx.ReadError):
        await tunnel.write(b"more")
    assert transport.stats().open == 0
    await tunnel.aclose()


async def test_the_upstream_waits_for_the_reader(server: Server, transport: Transport) -> None:
    total, sent = 64_000_000, [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        while sent[0] < total:
            await peer.send(b"x" * 64_000)
            sent[0] += 64_000

    server.script = script
    _, tunnel = await switched(transport, server)
    assert await steady(lambda: sent[0]) < 32_000_000, "socket buffers and ours"
    first = await tunnel.read()
    assert len(first) < 512 * 1024, "the high-water mark and one read"
    received = len(first)
    while data := await tunnel.read():
        received += len(data)
    assert received == total
    await tunnel.aclose()


async def test_the_writer_waits_for_the_upstream(server: Server, transport: Transport) -> None:
    go = asyncio.Event()
    total = 32_000_000
    received = [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await go.wait()
        while data := await peer.reader.read(1_000_000):
            received[0] += len(data)

    async def write() -> None:
        while written[0] < total:
            await tunnel.write(b"x" * 64_000)
            written[0] += 64_000

    server.script = script
    _, tunnel = await switched(transport, server)
    written = [0]
    writing = asyncio.ensure_future(write())
    await until(lambda: written[0] > 0)
    assert await steady(lambda: written[0]) < total
    other = asyncio.ensure_future(tunnel.write(b"another writer"))
    await turns(3)
    assert not other.done()
    go.set()
    await asyncio.gather(writing, other)
    await tunnel.aclose()
    await until(lambda: received[0] == total + len(b"another writer"))


async def test_writes_have_a_deadline_and_silence_has_none(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await turns(1)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a ReadTransport
        await asyncio.Event().wait()

    server.script = script
    transport = Transport(timeouts=Timeouts(write_ms=30, idle_ms=10, first_byte_ms=2_000))
    _, tunnel = await switched(transport, server)
    reading = asyncio.ensure_future(tunnel.read())
    await asyncio.sleep(0.05)  # longer than the idle deadline of an answer
    assert not reading.done()
    with pytest.raises(httpx.WriteTimeout):
        await tunnel.write(b"x" * 50_000_000)
    with pytest.raises(httpx.WriteTimeout):
        await reading
    assert transport.stats().open == 0


async def test_closing_waits_for_what_was_written(server: Server, transport: Transport) -> None:
    received = [0]

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await turns(30)
        received[0] = len(await peer.reader.read(-1))

    server.script = script
    _, tunnel = await switched(transport, server)
    total = 60_000
    await tunnel.write(b"x" * total)
    await tunnel.aclose()
    assert transport.stats().open == 0
    await until(lambda: received[0] == total)
    with pytest.raises(httpx.TransportError):
        await tunnel.write(b"more")
    with pytest.raises(httpx.TransportError):
        await tunnel.read()


async def test_closing_does_not_wait_for_ever(
    server: Server, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a ReadTransport
        await asyncio.Event().wait()

    monkeypatch.setattr("gateway.upstream.tunnel.LINGER_S", 0.03)
    server.script = script
    _, tunnel = await switched(transport, server)
    writing = asyncio.ensure_future(tunnel.write(b"x" * 50_000_000))
    await turns(5)
    await tunnel.aclose()
    assert transport.stats().open == 0
    with pytest.raises(httpx.ReadError):
        await writing


async def test_a_read_that_is_cancelled_loses_nothing(server: Server, transport: Transport) -> None:
    server.script = echo
    _, tunnel = await switched(transport, server)
    reading = asyncio.ensure_future(tunnel.read())
    await turns(2)
    await tunnel.write(b"message")
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
    assert await tunnel.read() == b"message"
    tunnel.abort()


async def _abort(response: httpx.Response, tunnel: Tunnel, transport: Transport) -> None:
    tunnel.abort()


async def _close(response: httpx.Response, tunnel: Tunnel, transport: Transport) -> None:
    await tunnel.aclose()


async def _close_response(response: httpx.Response, tunnel: Tunnel, transport: Transport) -> None:
    await stream_of(response).aclose()


async def _close_transport(response: httpx.Response, tunnel: Tunnel, transport: Transport) -> None:
    await transport.aclose()


@pytest.mark.parametrize("end", [_abort, _close, _close_response, _close_transport])
async def test_however_it_is_closed_the_slot_is_free_and_the_upstream_knows(
    server: Server, end: Callable[[httpx.Response, Tunnel, Transport], Awaitable[None]]
) -> None:
    gone: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(SWITCH)
        await peer.closed()
        gone.append(peer.number)

    server.script = script
    transport = Transport(connections_max=1)
    response, tunnel = await switched(transport, server)
    reading = asyncio.ensure_future(tunnel.read())
    await turns(2)
    await end(response, tunnel, transport)
    assert transport.stats() == Stats(0, 0, 0, 0, 0)
    with pytest.raises(httpx.ReadError):
        await reading
    await until(lambda: gone == [1])
    tunnel.abort()
    await tunnel.aclose()
    await transport.aclose()

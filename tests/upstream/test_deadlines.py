"""Every wait has its own deadline, and a deadline that passes closes the connection."""

import asyncio
import time
from collections.abc import Callable

import httpx
import pytest

from gateway.upstream import Stats, Timeouts, Transport
from tests.upstream.scripted import OK, Peer, Server, exchange, read, request, stream_of, turns

TINY_MS = 30


async def _silent(peer: Peer) -> None:
    await peer.closed()


async def test_connect(server: Server) -> None:
    server.script = _silent  # accepts, but never answers the TLS handshake
    transport = Transport(timeouts=Timeouts(connect_ms=TINY_MS))
    message = httpx.Request("GET", f"https://127.0.0.1:{server.port}/", stream=httpx.ByteStream(b""))
    with pytest.raises(httpx.ConnectTimeout):
        await transport.handle_async_request(message)
    assert message.extensions["reached"] is False
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_first_byte(server: Server) -> None:
    server.script = _silent
    transport = Transport(timeouts=Timeouts(first_byte_ms=TINY_MS))
    message = request(server)
    with pytest.raises(httpx.ReadTimeout):
        await transport.handle_async_request(message)
    assert message.extensions["reached"] is True
    assert transport.stats().open == 0


async def test_first_byte_covers_the_whole_head(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\n")
        while not peer.reader.at_eof():
            await peer.send(b"X: y\r\n")
            await turns(1)

    server.script = script
    transport = Transport(timeouts=Timeouts(first_byte_ms=TINY_MS), head_bytes_max=100_000_000)
    with pytest.raises(httpx.ReadTimeout):
        await transport.handle_async_request(request(server))


async def test_first_byte_begins_with_the_end_of_the_upload(server: Server) -> None:
    uploaded = asyncio.Event()

    class Body(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            yield b"a"
            await asyncio.sleep(3 * TINY_MS / 1000)
            uploaded.set()
            yield b"b"

    transport = Transport(timeouts=Timeouts(first_byte_ms=TINY_MS, idle_ms=TINY_MS), keepalive_ms=TINY_MS)
    await exchange(transport, request(server))
    assert await exchange(transport, request(server, "POST", body=Body())) == (200, b"ok")
    assert uploaded.is_set()
    assert server.connections == 1
    await transport.aclose()


async def test_idle(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await peer.closed()

    server.script = script
    transport = Transport(timeouts=Timeouts(idle_ms=TINY_MS))
    response = await transport.handle_async_request(request(server))
    stream = aiter(stream_of(response))
    assert await anext(stream) == b"half"
    with pytest.raises(httpx.ReadTimeout):
        await anext(stream)
    assert transport.stats().open == 0


async def test_a_slow_reader_is_not_the_upstreams_fault(server: Server) -> None:
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        await turns(5)
        await peer.send(b"half")
        await go.wait()
        await peer.send(b"half")
        await peer.closed()

    server.script = script
    transport = Transport(timeouts=Timeouts(idle_ms=TINY_MS))
    response = await transport.handle_async_request(request(server))
    assert await anext(aiter(stream_of(response))) == b"half"
    await asyncio.sleep(3 * TINY_MS / 1000)  # the client takes its time; that is the thing under test
    go.set()
    assert await read(response) == b"half"
    await transport.aclose()


async def test_write(server: Server) -> None:
    async def script(peer: Peer) -> None:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a ReadTransport
        await asyncio.Event().wait()

    server.script = script
    transport = Transport(timeouts=Timeouts(write_ms=TINY_MS))
    with pytest.raises(httpx.WriteTimeout):
        await transport.handle_async_request(request(server, "POST", body=b"x" * 50_000_000))
    assert transport.stats().open == 0


async def test_pool(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        await peer.closed()

    server.script = script
    transport = Transport(connections_max=1, timeouts=Timeouts(pool_ms=TINY_MS))
    response = await transport.handle_async_request(request(server))
    with pytest.raises(httpx.PoolTimeout):
        await transport.handle_async_request(request(server))
    assert (transport.stats().in_use, transport.stats().waiting) == (1, 0)
    await stream_of(response).aclose()


@pytest.mark.parametrize("seconds", [{"read": 0.03}, {"first_byte": 0.03, "read": 9.0}])
async def test_a_request_may_name_its_own(server: Server, transport: Transport, seconds: dict[str, float]) -> None:
    server.script = _silent
    with pytest.raises(httpx.ReadTimeout):
        await transport.handle_async_request(request(server, timeout=seconds))


async def test_an_answer_that_waits_in_the_socket_while_the_loop_is_busy_is_in_time(server: Server) -> None:
    ready = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK)
        ready.set()
        time.sleep(2 * TINY_MS / 1000)  # noqa: ASYNC251  # the loop is busy: neither timers nor sockets are served
        await peer.closed()

    server.script = script
    transport = Transport(timeouts=Timeouts(first_byte_ms=TINY_MS))
    assert await exchange(transport, request(server)) == (200, b"ok")
    await transport.aclose()


async def test_requests_in_quick_succession_set_no_timers(
    server: Server, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    set_timers: list[float] = []
    call_at = loop.call_at

    def counting(when: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        set_timers.append(when)
        return call_at(when, callback)

    await exchange(transport, request(server))
    monkeypatch.setattr(loop, "call_at", counting)
    for _ in range(50):
        await exchange(transport, request(server))
    assert set_timers == []

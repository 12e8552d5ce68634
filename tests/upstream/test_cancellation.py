"""Whoever is cancelled, at whichever await: no slot is lost, no task is left, and no connection is shared.

Every case runs a piece of work again and again, cancelled one turn of the event loop later each time, until it ends
by itself. Then every await in it was the one that was cancelled.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from gateway.upstream import Stats, Transport, tls_context
from tests.upstream.certificates import self_signed
from tests.upstream.scripted import OK, Peer, Server, exchange, exchange_of, request, turns, until

Work = Callable[[Transport, Server], Awaitable[None]]
EXPECT = [(b"Expect", b"100-continue")]
UPGRADE = [(b"Connection", b"upgrade"), (b"Upgrade", b"x")]
STEPS_MAX = 2_000


async def upstream(peer: Peer) -> None:
    """Everything that an upstream can do, slowly."""
    while True:
        head = await peer.head()
        if b"100-continue" in head:
            await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await turns(2)
            await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if b"Upgrade:" in head:
            await peer.send(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
            while data := await peer.reader.read(65_536):
                await peer.send(data)
            return
        if b"chunked" in head:
            while int(await peer.reader.readline(), 16):
                await peer.reader.readline()
            while await peer.reader.readline() != b"\r\n":
                pass
        elif b"Content-Length:" in head:
            await peer.reader.readexactly(int(head.partition(b"Content-Length: ")[2].split(b"\r")[0]))
        for piece in (
            b"HTTP/1.1 200 OK\r\nTransfer-",
            b"Encoding: chunked\r\n\r\n",
            b"2\r\nok\r\n",
            b"0\r\nX: t\r\n\r\n",
        ):
            await peer.send(piece)
            await turns(2)


async def plain(transport: Transport, server: Server) -> None:
    assert await exchange(transport, request(server)) == (200, b"ok")


async def pieces(transport: Transport, server: Server) -> None:
    stream = await exchange_of(transport, request(server))
    try:
        assert [piece async for piece in stream.pieces()] == [[b"ok"]]
    finally:
        await stream.aclose()


async def upload(transport: Transport, server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield b"piece"

    message = request(server, "POST", body=body(), trailers=[(b"X", b"t")])
    assert await exchange(transport, message) == (200, b"ok")


async def large(transport: Transport, server: Server) -> None:
    assert await exchange(transport, request(server, "POST", body=b"x" * 1_000_000)) == (200, b"ok")


async def asked(transport: Transport, server: Server) -> None:
    told = asyncio.Event()
    heard: list[int] = []

    async def interim(status: int, reason: bytes, fields: object) -> None:
        await asyncio.sleep(0)
        heard.append(status)
        if status == 100:
            told.set()

    async def body() -> AsyncIterator[bytes]:
        await told.wait()
        yield b"body"

    message = request(server, "POST", headers=EXPECT, body=body(), interim=interim)
    assert await exchange(transport, message) == (200, b"ok")
    assert heard == [103, 100]


async def tunnel(transport: Transport, server: Server) -> None:
    response = await transport.handle_async_request(request(server, headers=UPGRADE))
    tunnel = response.extensions["network_stream"]
    try:
        for message in (b"one", b"two" * 100_000):
            await tunnel.write(message)
            received = b""
            while len(received) < len(message):
                received += await tunnel.read()
        await tunnel.aclose()
    finally:
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await response.stream.aclose()


async def crowd(transport: Transport, server: Server) -> None:
    """Two that wait for the one connection there is."""
    await asyncio.gather(plain(transport, server), upload(transport, server), plain(transport, server))


def strangers(mine: set["asyncio.Task[object]"], server: Server) -> list["asyncio.Task[object]"]:
    """Tasks that are there beside `mine` and the server's."""
    return [task for task in asyncio.all_tasks() - mine if not server.owns(task)]


async def cancelled_at_every_await(transport: Transport, server: Server, work: Work, warm: bool) -> int:
    """How many turns `work` takes; what has to be true after each cancellation was."""
    mine = asyncio.all_tasks()
    for step in range(STEPS_MAX):
        if warm:
            await plain(transport, server)
        task = asyncio.ensure_future(work(transport, server))
        await turns(step)
        finished = task.done()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() or task.exception() is None, f"cancelled at turn {step}"
        stats = transport.stats()
        assert (stats.in_use, stats.waiting) == (0, 0), f"cancelled at turn {step}"
        await plain(transport, server)  # the slot serves the next, and no byte of an earlier answer is in the way
        await until(lambda: transport.stats().dialling == 0)
        # The server sees the connections closed that are not in the pool.
        await until(lambda: server.open == transport.stats().open)
        assert server.open <= 1
        await until(lambda: not strangers(mine, server))
        if finished:
            return step
    raise AssertionError("the work never ended")


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("work", [plain, pieces, upload, large, asked, tunnel, crowd])
async def test_cancelling_at_any_await_loses_nothing(server: Server, work: Work, warm: bool) -> None:
    server.script = upstream
    transport = Transport(connections_max=1)
    assert await cancelled_at_every_await(transport, server, work, warm) > 5
    await transport.aclose()
    assert transport.stats() == Stats(0, 0, 0, 0, 0)
    await until(lambda: server.open == 0)


@pytest.mark.parametrize("work", [plain, tunnel])
async def test_cancelling_at_any_await_inside_tls_loses_nothing(tmp_path: Path, work: Work) -> None:
    pem = self_signed(tmp_path / "server.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    transport = Transport(connections_max=1, tls=tls_context(ca_file=str(pem)))
    async with Server(upstream, tls=context) as server:
        assert await cancelled_at_every_await(transport, server, work, False) > 5
        await transport.aclose()
        assert transport.stats() == Stats(0, 0, 0, 0, 0)
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("tls", [False, True])
async def test_closing_the_transport_at_any_turn_ends_everything(server: Server, tls: bool) -> None:
    """The same for `aclose`, which may come in the middle of a dial."""
    server.script = upstream if not tls else Peer.closed
    mine = asyncio.all_tasks()
    url = f"https://127.0.0.1:{server.port}/"
    for step in range(30):
        transport = Transport(connections_max=1)
        message = httpx.Request("GET", url, stream=httpx.ByteStream(b"")) if tls else request(server)
        tasks = {asyncio.ensure_future(exchange(transport, message)), asyncio.ensure_future(transport_wait(transport))}
        await turns(step)
        await transport.aclose()
        assert transport.stats() == Stats(0, 0, 0, 0, 0), f"closed at turn {step}"
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: server.open == 0)
        await until(lambda: not strangers(mine, server))


async def transport_wait(transport: Transport) -> None:
    while transport.stats() != Stats(0, 0, 0, 0, 0):
        await asyncio.sleep(0)


async def test_an_exchange_that_is_dropped_while_its_body_is_read_stops_the_upload(server: Server) -> None:
    """Leaving a half-read answer ends the body that is still being sent, before `aclose` returns."""
    ended: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"part"
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(OK[:-1])
        await peer.closed()

    server.script = script
    transport = Transport()
    stream = await exchange_of(transport, request(server, "POST", body=body()))
    await stream.aclose()
    assert ended == [1]
    assert transport.stats().open == 0

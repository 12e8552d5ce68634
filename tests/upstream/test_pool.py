"""Connections: reused, bounded, handed out in order, and never lost or shared, whoever is cancelled when."""

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx
import pytest

from gateway.upstream import Stats, Transport
from gateway.upstream.connection import UNCHECKED_S, Connection
from gateway.upstream.pool import Origin, Pool, dial
from tests.upstream.scripted import OK, Peer, Server, exchange, read, request, stream_of, turns, until


class Held:
    """A server that answers each request when told to, with the number of the connection."""

    def __init__(self, server: Server) -> None:
        self.asked: asyncio.Queue[tuple[Peer, bytes]] = asyncio.Queue()
        server.script = self.script

    async def script(self, peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            self.asked.put_nowait((peer, head))

    async def has(self, count: int) -> None:
        """So many requests are waiting for their answer."""
        await until(lambda: self.asked.qsize() == count)

    async def answer(self) -> tuple[bytes, bytes]:
        """The oldest open request is answered; returns its target and the number of its connection."""
        peer, head = await self.asked.get()
        number = b"%d" % peer.number
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n" + number)
        return head.split(b" ")[1], number


async def test_connections_are_reused_last_in_first_out(server: Server, transport: Transport) -> None:
    held = Held(server)
    tasks = [asyncio.ensure_future(exchange(transport, request(server))) for _ in range(3)]
    await until(lambda: held.asked.qsize() == 3)
    order = []
    for _ in range(3):
        _, number = await held.answer()
        order.append(number)
        await until(lambda: transport.stats().idle == len(order))
    await asyncio.gather(*tasks)
    again = asyncio.ensure_future(exchange(transport, request(server)))
    await held.answer()
    assert (await again)[1] == order[-1]
    assert server.connections == 3


async def test_connections_are_bounded_and_waiters_served_in_order(server: Server) -> None:
    held = Held(server)
    transport = Transport(connections_max=2)
    tasks = []
    for number in range(6):
        tasks.append(asyncio.ensure_future(exchange(transport, request(server, target=b"/%d" % number))))
        await until(lambda: held.asked.qsize() == min(len(tasks), 2))
        await until(lambda: transport.stats().waiting == max(len(tasks) - 2, 0))
    assert transport.stats() == Stats(open=2, idle=0, in_use=2, waiting=4, dialling=0)
    for number in range(6):
        # Two at a time are with the server, in the order they were asked for.
        await held.has(min(6 - number, 2))
        assert (await held.answer())[0] == b"/%d" % number
    await asyncio.gather(*tasks)
    assert server.connections == 2
    assert transport.stats() == Stats(open=2, idle=2, in_use=0, waiting=0, dialling=0)
    await transport.aclose()
    assert transport.stats().open == 0


@pytest.mark.parametrize("how", ["close", "reset", "bytes"])
async def test_an_idle_connection_the_upstream_touches_leaves_the_pool(server: Server, how: str) -> None:
    go = asyncio.Event()
    transport = Transport(keepalive_ms=60_000)

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        if peer.number == 1:
            await go.wait()
            if how == "bytes":
                await peer.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
                await peer.closed()
            peer.close() if how != "reset" else peer.reset()
        await peer.closed()

    server.script = script
    await exchange(transport, request(server))
    assert transport.stats().idle == 1
    go.set()
    await until(lambda: transport.stats().open == 0)
    assert await exchange(transport, request(server)) == (200, b"ok")


class Raw:
    """An upstream whose sockets a test uses by hand: what it does happens before the loop can notice."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.origin = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    async def accept(self) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(self.listener)
        connection.setblocking(False)
        return connection

    def ask(self, transport: Transport) -> "asyncio.Task[tuple[int, bytes]]":
        message = httpx.Request("POST", self.origin, stream=httpx.ByteStream(b"body"))
        return asyncio.ensure_future(exchange(transport, message))

    async def answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        received = b""
        while not received.endswith(b"body"):
            part = await loop.sock_recv(connection, 65_536)
            assert part, "the gateway closed the connection"
            received += part
        connection.send(OK)


@pytest.mark.parametrize("how", ["close", "reset", "bytes"])
async def test_a_connection_that_ended_is_not_used_even_if_the_loop_has_not_read_its_end(how: str) -> None:
    raw, transport = Raw(), Transport()
    with raw.listener:
        first = raw.ask(transport)
        with await raw.accept() as connection:
            await raw.answer(connection)
            assert await first == (200, b"ok")
            assert transport.stats().idle == 1
            time.sleep(2 * UNCHECKED_S)  # noqa: ASYNC251  # the rest is the thing under test
            await asyncio.sleep(0)  # uvloop looks at the clock once per turn
            if how == "bytes":
                connection.send(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            elif how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            else:
                connection.close()
            second = raw.ask(transport)
            with await raw.accept() as another:
                await raw.answer(another)
                assert await second == (200, b"ok")
        await transport.aclose()


async def test_a_connection_that_ends_with_its_answer_is_not_handed_to_who_waits() -> None:
    raw, transport = Raw(), Transport(connections_max=1)
    with raw.listener:
        tasks = [raw.ask(transport) for _ in range(3)]
        for _ in tasks:
            connection = await raw.accept()
            await raw.answer(connection)
            connection.close()
        assert await asyncio.gather(*tasks) == [(200, b"ok")] * 3
        await transport.aclose()


async def test_who_gets_a_dead_connection_waits_no_longer_than_the_deadline_and_not_behind_others() -> None:
    raw, transport = Raw(), Transport(connections_max=1)
    order: list[int] = []
    with raw.listener:
        tasks = [raw.ask(transport) for _ in range(4)]
        for task in tasks:
            task.add_done_callback(lambda done: order.append(tasks.index(done)))
        for _ in tasks:
            connection = await raw.accept()
            await raw.answer(connection)
            connection.close()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2, 3]
        await transport.aclose()


async def test_an_idle_connection_expires(server: Server) -> None:
    transport = Transport(keepalive_ms=20)
    await exchange(transport, request(server))
    assert transport.stats().idle == 1
    await until(lambda: transport.stats().open == 0)
    await exchange(transport, request(server))
    assert server.connections == 2
    await transport.aclose()


async def test_an_expired_connection_is_not_used_even_if_the_loop_was_too_busy_to_close_it(server: Server) -> None:
    transport = Transport(keepalive_ms=20)
    await exchange(transport, request(server))
    assert transport.stats().idle == 1
    time.sleep(0.04)  # noqa: ASYNC251  # the loop is busy: no timer runs
    await asyncio.sleep(0)  # uvloop looks at the clock once per turn, before it runs timers
    await exchange(transport, request(server))
    assert server.connections == 2
    await transport.aclose()


async def test_no_keepalive_keeps_nothing(server: Server) -> None:
    transport = Transport(keepalive_ms=0)
    await exchange(transport, request(server))
    assert transport.stats().open == 0


async def test_a_connection_that_closes_makes_room_for_who_waits(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    server.script = script
    transport = Transport(connections_max=1)
    results = await asyncio.gather(*[exchange(transport, request(server)) for _ in range(5)])
    assert results == [(200, b"ok")] * 5
    assert server.connections == 5
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_a_failed_dial_fails_one_waiter_and_the_slot_serves_the_next(server: Server) -> None:
    transport = Transport(connections_max=1)
    async with Server() as gone:
        pass
    for _ in range(2):
        results = await asyncio.gather(*[exchange(transport, request(gone)) for _ in range(5)], return_exceptions=True)
        assert [type(result) for result in results] == [httpx.ConnectError] * 5
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_an_upstream_that_accepts_and_closes_is_an_error_not_a_loop(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        peer.reset()

    server.script = script
    with pytest.raises((httpx.ConnectError, httpx.RemoteProtocolError)):
        await exchange(transport, request(server))
    assert transport.stats().open == 0


async def test_a_new_connection_that_closes_while_it_is_handed_over_is_an_error_not_a_loop(
    server: Server, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    dials: list[Connection] = []

    async def short_lived(origin: Origin, pool: Pool, timeout_s: float) -> Connection:
        connection = await dial(origin, pool, timeout_s)
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, connection.abort)  # after the pool has it, before the request has it
        dials.append(connection)
        return connection

    monkeypatch.setattr("gateway.upstream.pool.dial", short_lived)
    with pytest.raises(httpx.ConnectError):
        await exchange(transport, request(server))
    assert len(dials) == 1
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_closing_the_transport_fails_whoever_uses_it(server: Server) -> None:
    held = Held(server)
    transport = Transport(connections_max=1)
    tasks = [asyncio.ensure_future(exchange(transport, request(server))) for _ in range(2)]
    await until(lambda: held.asked.qsize() == 1)
    await transport.aclose()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [httpx.ReadError, httpx.ConnectError]
    assert transport.stats() == Stats(0, 0, 0, 0, 0)
    with pytest.raises(httpx.ConnectError):
        await exchange(transport, request(server))


async def test_closing_the_transport_ends_a_dial(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.closed()

    server.script = script
    transport = Transport()
    message = httpx.Request("GET", f"https://127.0.0.1:{server.port}/", stream=httpx.ByteStream(b""))
    task = asyncio.ensure_future(transport.handle_async_request(message))
    await until(lambda: server.connections == 1)
    await transport.aclose()
    with pytest.raises(httpx.ConnectError):
        await task
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


# -- cancellation ------------------------------------------------------------------------------------------------


async def _plain(transport: Transport, server: Server) -> None:
    assert await exchange(transport, request(server)) == (200, b"hello world")


async def _upload(transport: Transport, server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0)
            yield b"piece"

    assert (await exchange(transport, request(server, "POST", body=body())))[0] == 200


async def _large(transport: Transport, server: Server) -> None:
    assert (await exchange(transport, request(server, "POST", body=b"x" * 1_000_000)))[0] == 200


async def _slow_answer(peer: Peer) -> None:
    while True:
        await peer.request()
        for piece in (b"HTTP/1.1 200 OK\r\nContent-", b"Length: 11\r\n\r\nhello", b" world"):
            await peer.send(piece)
            await turns(2)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("work", [_plain, _upload, _large])
async def test_cancelling_at_any_await_loses_no_slot_and_no_answer(
    server: Server, work: Callable[[Transport, Server], Awaitable[None]], warm: bool
) -> None:
    server.script = _slow_answer
    transport = Transport(connections_max=1)
    finished = False
    step = 0
    while not finished:
        if warm:
            await _plain(transport, server)
        task = asyncio.ensure_future(work(transport, server))
        await turns(step)
        finished = task.done()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() or task.exception() is None
        assert transport.stats().in_use == 0 and transport.stats().waiting == 0, f"cancelled at step {step}"
        await _plain(transport, server)
        step += 1
        assert step < 2_000
    assert step > 5
    await transport.aclose()
    assert transport.stats() == Stats(0, 0, 0, 0, 0)


async def test_cancelling_a_waiter_at_any_await_loses_no_slot(server: Server) -> None:
    server.script = _slow_answer
    transport = Transport(connections_max=1)
    finished = False
    step = 0
    while not finished:
        first = asyncio.ensure_future(_plain(transport, server))
        await turns(1)
        second = asyncio.ensure_future(_plain(transport, server))
        await turns(step)
        finished = second.done()
        second.cancel()
        await asyncio.wait({second})
        await first
        await _plain(transport, server)
        assert transport.stats().in_use == 0 and transport.stats().waiting == 0, f"cancelled at step {step}"
        step += 1
        assert step < 2_000
    assert step > 5
    await transport.aclose()


async def test_a_cancelled_request_leaves_its_dial_to_the_next(server: Server, transport: Transport) -> None:
    task = asyncio.ensure_future(exchange(transport, request(server)))
    await turns(1)
    assert transport.stats().dialling == 1
    task.cancel()
    await asyncio.wait({task})
    assert await exchange(transport, request(server)) == (200, b"ok")
    await until(lambda: transport.stats().dialling == 0)
    assert transport.stats().in_use == 0


async def _echo_id(peer: Peer) -> None:
    """Answers with the id of the request, in head and body, at an uneven pace."""
    rng = random.Random(peer.number)
    while True:
        head, body = await peer.request()
        name = head.split(b" ")[1][1:]
        assert body in (b"", name * 50), "a request arrived with somebody else's body"
        await turns(rng.randrange(4))
        answer = b"HTTP/1.1 200 OK\r\nX-Id: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % name
        answer += b"".join(b"%x\r\n%b\r\n" % (len(name), name) for _ in range(20)) + b"0\r\n\r\n"
        at = rng.randrange(len(answer))
        await peer.send(answer[:at])
        await turns(rng.randrange(4))
        await peer.send(answer[at:])


async def _ask_id(transport: Transport, server: Server, number: int) -> None:
    name = b"id-%d" % number

    async def body() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield name

    sent: bytes | AsyncIterator[bytes] = (b"", name * 50, body())[number % 3]
    response = await transport.handle_async_request(request(server, "POST", target=b"/" + name, body=sent))
    assert response.headers["x-id"] == name.decode()
    assert await read(response) == name * 20


async def test_a_hundred_requests_share_ten_connections(server: Server) -> None:
    server.script = _echo_id
    transport = Transport(connections_max=10)
    await asyncio.gather(*[_ask_id(transport, server, number) for number in range(100)])
    assert server.connections == 10
    assert transport.stats() == Stats(10, 10, 0, 0, 0)
    await transport.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_random_cancellations_never_mix_two_answers(server: Server, seed: int) -> None:
    server.script = _echo_id
    rng = random.Random(seed)
    transport = Transport(connections_max=10)
    tasks = [asyncio.ensure_future(_ask_id(transport, server, number)) for number in range(200)]
    for victim in rng.sample(tasks, 100):
        await turns(rng.randrange(4))
        victim.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
    assert sum(task.cancelled() for task in tasks) > 20
    assert transport.stats().in_use == 0 and transport.stats().waiting == 0
    await asyncio.gather(*[_ask_id(transport, server, number) for number in range(30)])
    await transport.aclose()


async def test_a_cancelled_read_closes_the_connection(server: Server, transport: Transport) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        await peer.closed()

    server.script = script
    response = await transport.handle_async_request(request(server))
    reading = asyncio.ensure_future(anext(aiter(stream_of(response))))
    await turns(3)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert transport.stats().open == 0

"""Several targets over real sockets: refused, black-holed, closed at once, killed under load, and checked."""

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from gateway import errors
from gateway.upstream import Timeouts, Upstreams
from tests.upstream.configured import Clock, Config, Ejection, HealthCheck
from tests.upstream.scripted import OK, Peer, Server, answering, until

TWO = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntwo"


async def ask(upstreams: Upstreams, method: str = "POST") -> bytes:
    async with upstreams.forward("ai", method, b"/", [], b"x") as answer:
        return b"".join([b"".join(pieces) async for pieces in answer.pieces])


def states(upstreams: Upstreams) -> list[str]:
    return [target.state for target in upstreams.stats()["ai"].targets]


def nothing_in_flight(upstreams: Upstreams) -> bool:
    stats = upstreams.stats()["ai"]
    return (stats.in_flight, stats.queued, sum(target.in_flight for target in stats.targets)) == (0, 0, 0)


@pytest.fixture
async def second() -> AsyncIterator[Server]:
    async with Server(answering(TWO)) as second:
        yield second


@pytest.fixture
def refusing() -> str:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return f"http://127.0.0.1:{gone.getsockname()[1]}"


@pytest.fixture
def black_hole() -> Iterator[str]:
    """An address whose listener lets nobody in: its queue is full, so that the kernel drops every SYN."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, _filled(listener.getsockname()):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _filled(address: tuple[str, int]) -> Iterator[None]:
    fillers = [socket.socket() for _ in range(4)]
    try:
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield
    finally:
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("dead", ["refusing", "black_hole"])
async def test_a_dead_target_is_ejected_and_costs_no_request(
    server: Server, dead: str, request: pytest.FixtureRequest
) -> None:
    origin: str = request.getfixturevalue(dead)
    clock = Clock()
    config = Config((origin, server.origin), Timeouts(connect_ms=50), ejection=Ejection(failures=2))
    upstreams = Upstreams({"ai": config}, clock=clock)
    assert [await ask(upstreams) for _ in range(8)] == [b"ok"] * 8
    assert states(upstreams) == ["ejected", "healthy"]
    await upstreams.aclose()


async def test_one_request_finds_out_that_a_target_is_back(server: Server, second: Server) -> None:
    clock = Clock()
    config = Config((server.origin, second.origin), ejection=Ejection(failures=1), keepalive_ms=0)
    upstreams = Upstreams({"ai": config}, clock=clock)
    server.stop_listening()
    assert {await ask(upstreams) for _ in range(3)} == {b"two"}
    assert states(upstreams) == ["ejected", "healthy"]
    clock.now_s += 0.8
    assert {await ask(upstreams) for _ in range(3)} == {b"two"}, "its time has not come"
    async with Server(port=server.port):
        clock.now_s += 0.3
        assert {await ask(upstreams) for _ in range(2)} == {b"ok", b"two"}
    assert states(upstreams) == ["healthy", "healthy"]
    await upstreams.aclose()


async def test_the_only_target_is_tried_even_when_it_is_ejected(server: Server) -> None:
    upstreams = Upstreams({"ai": Config((server.origin,), ejection=Ejection(failures=1))}, clock=Clock())
    server.stop_listening()
    with pytest.raises(errors.UpstreamUnreachable):
        await ask(upstreams)
    assert states(upstreams) == ["ejected"]
    async with Server(port=server.port):
        assert await ask(upstreams) == b"ok"
        assert states(upstreams) == ["healthy"]
    await upstreams.aclose()


async def test_who_accepts_and_closes_is_not_ejected_for_it(server: Server, second: Server) -> None:
    """A request can make a server close its connection; it must not be able to take the server from everybody."""

    async def script(peer: Peer) -> None:
        await peer.request()

    server.script = script
    config = Config((server.origin, second.origin), ejection=Ejection(failures=1))
    upstreams = Upstreams({"ai": config}, clock=Clock())
    for _ in range(3):
        with pytest.raises(errors.UpstreamBroke):
            await ask(upstreams)
        assert await ask(upstreams) == b"two"
    assert states(upstreams) == ["healthy", "healthy"]
    assert nothing_in_flight(upstreams)
    await upstreams.aclose()


async def test_a_busy_target_gets_fewer_requests(server: Server, second: Server) -> None:
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.closed()

    server.script = silent
    upstreams = Upstreams({"ai": Config((server.origin, second.origin))})
    stuck = asyncio.ensure_future(ask(upstreams))
    await until(lambda: server.connections == 1)
    assert [await ask(upstreams) for _ in range(5)] == [b"two"] * 5
    stuck.cancel()
    await asyncio.wait({stuck})
    assert nothing_in_flight(upstreams)
    await upstreams.aclose()


async def test_no_request_fails_unsent_when_a_target_is_killed_under_load(server: Server, second: Server) -> None:
    peers: list[Peer] = []

    async def script(peer: Peer) -> None:
        peers.append(peer)
        while True:
            await peer.request()
            await peer.send(OK)

    server.script = script
    upstreams = Upstreams({"ai": Config((server.origin, second.origin), connections_max=64)})
    became: Counter[str] = Counter()

    async def client() -> None:
        for _ in range(40):
            forwarding = upstreams.forward("ai", "POST", b"/", [], b"x")
            try:
                async with forwarding as answer:
                    became[b"".join([b"".join(pieces) async for pieces in answer.pieces]).decode()] += 1
            except errors.GatewayError:
                became["sent, lost" if forwarding.reached else "unsent, lost"] += 1

    async def killer() -> None:
        await until(lambda: became["ok"] >= 100)
        server.stop_listening()
        for peer in peers:
            peer.reset()

    await asyncio.gather(killer(), *(client() for _ in range(20)))
    assert became["unsent, lost"] == 0
    assert became["sent, lost"] <= 20, "only what was at the killed target in that moment"
    assert became.total() == 800
    assert states(upstreams) == ["ejected", "healthy"]
    assert nothing_in_flight(upstreams)
    await upstreams.aclose()


async def test_requests_beyond_the_bound_wait_their_turn(server: Server) -> None:
    together = most = 0

    async def script(peer: Peer) -> None:
        nonlocal together, most
        while True:
            await peer.request()
            together += 1
            most = max(most, together)
            await asyncio.sleep(0)
            together -= 1
            await peer.send(OK)

    server.script = script
    upstreams = Upstreams({"ai": Config((server.origin,), requests_max=3, queue_timeout_ms=60_000)})
    answers = await asyncio.gather(*(ask(upstreams) for _ in range(50)))
    assert answers == [b"ok"] * 50
    assert most <= 3
    assert nothing_in_flight(upstreams)
    await upstreams.aclose()


# -- health checks and probes ------------------------------------------------------------------------------------


@pytest.fixture
async def checked(server: Server, second: Server) -> AsyncIterator[Upstreams]:
    config = Config((server.origin, second.origin), health_check=HealthCheck())
    upstreams = Upstreams({"ai": config})
    running = asyncio.create_task(upstreams.run())
    yield upstreams
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    await upstreams.aclose()


async def test_a_target_whose_check_fails_gets_no_requests_until_one_passes(
    server: Server, second: Server, checked: Upstreams
) -> None:
    asked: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            asked.append(head)
            await peer.send(OK if well or not head.startswith(b"GET /health ") else UNWELL)

    UNWELL = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    well = False
    server.script = script
    await until(lambda: states(checked) == ["ejected", "healthy"])
    assert [await ask(checked) for _ in range(4)] == [b"two"] * 4
    well = True
    await until(lambda: states(checked) == ["healthy", "healthy"])
    assert {await ask(checked) for _ in range(2)} == {b"ok", b"two"}
    assert asked[0].startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % server.port)


async def test_a_check_that_is_not_answered_in_time_fails(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        await peer.closed()

    server.script = script
    config = Config((server.origin,), health_check=HealthCheck(timeout_ms=20))
    upstreams = Upstreams({"ai": config})
    running = asyncio.create_task(upstreams.run())
    await until(lambda: states(upstreams) == ["ejected"])
    with pytest.raises(errors.UpstreamUnreachable):
        await upstreams.probe("ai")
    running.cancel()
    await asyncio.wait({running})
    await upstreams.aclose()


async def test_a_target_that_has_all_its_requests_is_still_checked(server: Server) -> None:
    async def script(peer: Peer) -> None:
        head, _ = await peer.request()
        if head.startswith(b"GET /health "):
            await peer.send(OK)
        await peer.closed()

    server.script = script
    config = Config((server.origin,), connections_max=1, health_check=HealthCheck(failures=1))
    upstreams = Upstreams({"ai": config})
    stuck = asyncio.ensure_future(ask(upstreams))
    await until(lambda: server.connections == 1)
    running = asyncio.create_task(upstreams.run())
    await until(lambda: server.connections >= 5)
    assert states(upstreams) == ["healthy"]
    for task in (stuck, running):
        task.cancel()
    await asyncio.wait({stuck, running})
    await upstreams.aclose()


async def test_a_probe_does_not_wait_for_a_dead_target_when_another_lives(server: Server, black_hole: str) -> None:
    upstreams = Upstreams({"ai": Config((black_hole, server.origin), Timeouts(connect_ms=60_000))})
    async with asyncio.timeout(5):
        await upstreams.probe("ai")
    await upstreams.aclose()


async def test_a_probe_that_connects_brings_a_target_back(server: Server) -> None:
    upstreams = Upstreams({"ai": Config((server.origin,), ejection=Ejection(failures=1))}, clock=Clock())
    server.stop_listening()
    with pytest.raises(errors.UpstreamUnreachable):
        await ask(upstreams)
    async with Server(port=server.port):
        await upstreams.probe("ai")
        assert states(upstreams) == ["healthy"]
    await upstreams.aclose()

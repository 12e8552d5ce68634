"""A primary that sentinels know: found, lost, and found again under another address."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.embedded.process import free_port
from gateway.errors import StoreUnavailable
from gateway.redis_address import RedisAddress
from gateway.stores import Redis
from tests.cluster import SERVICE, SentinelHandle, sentinels
from tests.nodes import nodes
from tests.stores.conftest import COUNT, Connect
from tests.stores.test_redis import Frozen
from tests.waiting import until


@pytest.fixture(scope="module")
def handle(binary: Path | None) -> Iterator[SentinelHandle]:
    with sentinels(replicas=1, binary=binary) as handle:
        yield handle


async def outage(url: str, match: str) -> StoreUnavailable:
    """How a call fails there."""
    redis = Redis(url, timeout_ms=1_000, connect_timeout_ms=500)
    redis.start()
    with pytest.raises(StoreUnavailable, match=match) as caught:
        await redis.call("PING")
    await redis.close()
    assert not caught.value.ambiguous
    return caught.value


async def test_the_primary_is_found_and_its_replica_known(handle: SentinelHandle, connect: Connect) -> None:
    store = await connect(handle.url)
    assert await store.run(COUNT, ["found"], [1]) == 1
    assert handle.primary.do("GET", "found") == "1"
    ports = {server.address.port: server.primary for server in await store.servers()}
    assert ports == {node.port: node is handle.primary for node in handle.nodes}


async def test_one_sentinel_that_answers_is_enough(
    handle: SentinelHandle, connect: Connect, unused_tcp_port: int
) -> None:
    url = handle.url.replace(handle.sentinels[0].place, f"127.0.0.1:{unused_tcp_port}")
    store = await connect(url.replace(handle.sentinels[1].place, "127.0.0.1:1"))
    assert await store.call("PING") == b"PONG"


async def test_a_service_that_no_sentinel_knows_is_named(handle: SentinelHandle) -> None:
    exc = await outage(handle.url.replace(f"/{SERVICE}", "/monie"), "knows no service monie")
    assert handle.sentinels[2].place in str(exc) and handle.sentinels[0].password not in str(exc)


async def test_sentinels_that_want_a_password_are_told_theirs(handle: SentinelHandle) -> None:
    await outage(handle.url.partition("?")[0], "NOAUTH")
    await outage(handle.url + "x", "WRONGPASS|invalid")


class Mistaken(Frozen):
    """A sentinel that names whom the test wants."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self.names = (host, port)

    async def __aenter__(self) -> "Mistaken":
        await super().__aenter__()
        return self

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        host, port = self.names[0], str(self.names[1])
        writer.write(f"*2\r\n${len(host)}\r\n{host}\r\n${len(port)}\r\n{port}\r\n".encode())


async def test_a_replica_that_is_named_as_the_primary_is_not_used(handle: SentinelHandle) -> None:
    replica = next(node for node in handle.nodes if node is not handle.primary)
    async with Mistaken("127.0.0.1", replica.port) as sentinel:
        place = sentinel.url.removeprefix("redis://")
        await outage(
            f"redis+sentinel://:{replica.password}@{place}/{SERVICE}", "is said to be the primary, but is none"
        )


async def test_a_primary_that_was_replaced_is_left_though_it_goes_on_as_if_nothing_had_happened(
    handle: SentinelHandle, connect: Connect
) -> None:
    with nodes() as others:
        others.password = handle.primary.password
        other = others.start("primary", free_port())
        async with Mistaken("127.0.0.1", handle.primary.port) as sentinel:
            place = sentinel.url.removeprefix("redis://")
            store = await connect(f"redis+sentinel://:{other.password}@{place}/{SERVICE}")
            asked_count = sentinel.connections
            await until(lambda: sentinel.connections > asked_count)
            sentinel.names = ("127.0.0.1", other.port)

            async def moved() -> bool:
                with contextlib.suppress(StoreUnavailable):
                    await store.call("SET", "moved", "x")
                return bool(other.do("EXISTS", "moved"))

            await until(moved)
            assert handle.primary.info("replication")["role"] == "master"


@pytest.mark.parametrize("host", ["", "127.0.0.1", "nowhere.invalid"])
async def test_sentinels_that_name_nobody_of_use_change_nothing(
    handle: SentinelHandle, connect: Connect, host: str
) -> None:
    async with Mistaken("127.0.0.1", handle.primary.port) as sentinel:
        place = sentinel.url.removeprefix("redis://")
        store = await connect(f"redis+sentinel://:{handle.primary.password}@{place}/{SERVICE}")
        connected_id = await store.call("CLIENT", "ID")
        sentinel.names = (host, 1)
        asked_count = sentinel.connections
        await until(lambda: sentinel.connections > asked_count + 1)
        assert await store.call("CLIENT", "ID") == connected_id


async def test_a_sentinel_that_never_answers_costs_one_deadline_and_then_the_next_is_asked(
    handle: SentinelHandle, connect: Connect
) -> None:
    async with Frozen() as silent:
        url = handle.url.replace(handle.sentinels[0].place, silent.url.removeprefix("redis://"))
        store = await connect(url)
        assert await store.call("PING") == b"PONG"
        assert silent.connections == 1
        sentinels = store._sentinels
        assert sentinels is not None
        assert isinstance(await sentinels.primary(), RedisAddress)
        assert silent.connections == 1  # the one that answered is asked first from now on


async def test_a_primary_that_dies_is_replaced(binary: Path | None, connect: Connect) -> None:
    with sentinels(replicas=1, binary=binary) as handle:
        store = await connect(handle.url)
        await store.run(COUNT, ["kept"], [1])
        old = handle.primary
        old.do("WAIT", 1, 5_000)
        handle.kill(old)
        await until(lambda: not store.usable)

        async def turned_away() -> bool:
            try:
                await store.run(COUNT, ["kept"], [1])
            except StoreUnavailable as exc:
                return not exc.ambiguous
            return False

        await until(turned_away)
        await until(lambda: store.usable)
        assert await store.run(COUNT, ["kept"], [1]) == 2
        assert handle.primary is not old
        assert handle.primary.do("GET", "kept") == "2"


# Last: it takes a while until the sentinels have made a replica of the former primary.
async def test_a_planned_failover_is_followed(handle: SentinelHandle, connect: Connect) -> None:
    store = await connect(handle.url)
    old = handle.primary
    handle.sentinels[0].do("SENTINEL", "FAILOVER", SERVICE)
    await until(lambda: handle.primary is not old)

    async def served() -> bool:
        with contextlib.suppress(StoreUnavailable):
            await store.run(COUNT, ["planned"], [1])
            return bool(int(handle.primary.do("GET", "planned") or 0))
        return False

    await until(served)

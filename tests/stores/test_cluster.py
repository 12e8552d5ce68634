"""A cluster behind the interface of one server: every command goes where its key is, and nothing runs twice."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import StoreUnavailable
from gateway.stores import Redis, Script
from gateway.stores.cluster import Cluster
from gateway.stores.slots import slot_of
from tests.cluster import ClusterHandle, cluster
from tests.stores.conftest import COUNT, ECHO, Connect
from tests.waiting import until

TWO_KEYS = Script("two", "return redis.call('INCR', KEYS[1]) + redis.call('INCR', KEYS[2])")


@pytest.fixture(scope="module")
def handle(binary: Path | None) -> Iterator[ClusterHandle]:
    with cluster(nodes=3, binary=binary) as handle:
        yield handle


@pytest.fixture
async def store(handle: ClusterHandle, connect: Connect) -> Redis:
    for node in handle.nodes:
        node.do("FLUSHALL")
        node.do("CONFIG", "RESETSTAT")
    store = await connect(handle.url)
    await until(lambda: store.trouble is None)
    return store


def redirected_count(handle: ClusterHandle, *kinds: str) -> int:
    """How many commands were answered with one of these errors."""
    stats = [node.info("errorstats").get(f"errorstat_{kind}", "count=0") for node in handle.alive for kind in kinds]
    return sum(int(text.removeprefix("count=")) for text in stats)


async def test_every_command_goes_straight_to_the_server_of_its_first_key(handle: ClusterHandle, store: Redis) -> None:
    owners: set[int] = set()
    for number in range(60):
        key = f"{{ai_credits:org_{number}}}:a"
        assert await store.run(COUNT, [key], [number]) == number
        assert await store.call("INCR", key) == number + 1
        owner = handle.owner(key)
        owners.add(owner.port)
        assert owner.do("GET", key) == str(number + 1)
    assert owners == {node.port for node in handle.nodes}
    assert redirected_count(handle, "MOVED", "ASK") == 0


@pytest.mark.parametrize("key", ["", "a", "{a}b", "x{a}{b}", "{}{a}", "a{b", "a}b{", "{{a}}", "{ü}", "ä{}", "12345"])
async def test_slots_are_counted_as_the_server_does(handle: ClusterHandle, key: str) -> None:
    assert slot_of(key) == slot_of(key.encode()) == handle.slot(key)
    assert slot_of(12345) == slot_of("12345")


async def test_commands_without_a_key_are_answered_by_any_server(store: Redis) -> None:
    assert await store.call("PING") == b"PONG"
    assert len(await store.call("TIME")) == 2
    assert await store.call("SCRIPT", "LOAD", ECHO.text) == ECHO.sha.encode()
    assert await store.run(ECHO, [], ["x"]) == b"x"


async def test_keys_of_two_slots_in_one_call_are_refused_and_nothing_ran(store: Redis) -> None:
    with pytest.raises(StoreUnavailable, match="CROSSSLOT") as caught:
        await store.run(TWO_KEYS, ["a", "b"], [])
    assert not caught.value.ambiguous
    assert await store.call("GET", "a") is None


async def test_a_server_that_forgot_its_scripts_is_given_them_again(handle: ClusterHandle, store: Redis) -> None:
    for node in handle.nodes:
        node.do("SCRIPT", "FLUSH")
    assert [await store.run(COUNT, [key], [1]) for key in ("a", "b", "c", "d")] == [1, 1, 1, 1]


async def test_a_slot_that_moved_is_followed_once_and_then_known(handle: ClusterHandle, store: Redis) -> None:
    key = handle.key_of(handle.nodes[0])
    await store.run(COUNT, [key], [5])
    try:
        handle.move(slot_of(key), handle.nodes[1])
        assert await asyncio.gather(*(store.run(COUNT, [key], [1]) for _ in range(20))) == list(range(6, 26))
        moved_count = redirected_count(handle, "MOVED")
        assert moved_count == 20
        assert await store.call("INCR", key) == 26
        assert redirected_count(handle, "MOVED") == moved_count
    finally:
        handle.move(slot_of(key), handle.nodes[0])


async def test_commands_that_nobody_waits_for_follow_a_slot_too(handle: ClusterHandle, store: Redis) -> None:
    key = handle.key_of(handle.nodes[0])
    try:
        handle.move(slot_of(key), handle.nodes[1])
        store.run_detached(COUNT, [key], [3])
        await until(lambda: handle.nodes[1].do("GET", key) == "3")
    finally:
        handle.move(slot_of(key), handle.nodes[0])


async def test_while_a_slot_is_on_its_way_both_servers_are_asked(handle: ClusterHandle, store: Redis) -> None:
    old = handle.key_of(handle.nodes[0], "{{key{}}}:old")
    new, slot = old.replace("old", "new"), slot_of(old)
    await store.call("SET", old, "old")
    for node in handle.nodes:
        node.do("SCRIPT", "FLUSH")
    source = handle.begin_move(slot, handle.nodes[1])
    try:
        assert await store.call("GET", old) == b"old"
        assert redirected_count(handle, "ASK") == 0
        assert await store.run(COUNT, [new], [7]) == 7
        assert await store.reply(store.send("INCR", new)) == 8
        assert handle.nodes[1].do("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
        with pytest.raises(StoreUnavailable, match="TRYAGAIN") as caught:
            await store.run(TWO_KEYS, [old, new], [])
        assert not caught.value.ambiguous
    finally:
        handle.end_move(slot, source, handle.nodes[1])
    assert await store.call("GET", old) == b"old"
    assert await store.call("GET", new) == b"8"
    handle.move(slot, handle.nodes[0])


async def test_a_command_that_timed_out_is_not_sent_again(handle: ClusterHandle, connect: Connect) -> None:
    store = await connect(handle.url, timeout_ms=200)
    await until(lambda: store.trouble is None)
    key = handle.key_of(handle.nodes[2])
    handle.nodes[2].do("DEL", key)
    os.kill(handle.nodes[2].pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable) as caught:
            await store.run(COUNT, [key], [1])
        assert caught.value.ambiguous
        assert await store.call("GET", handle.key_of(handle.nodes[0], "none{}")) is None  # the others are asked as ever
    finally:
        os.kill(handle.nodes[2].pid, signal.SIGCONT)
    await until(lambda: handle.nodes[2].do("GET", key) == "1")
    await until(lambda: handle.whole and store.trouble is None)
    assert await store.call("GET", key) == b"1"


async def test_a_reconnect_that_has_just_begun_is_waited_for(handle: ClusterHandle, store: Redis) -> None:
    key = handle.key_of(handle.nodes[0])
    assert isinstance(store._servers, Cluster)
    node = store._servers._owners[slot_of(key)]
    assert node is not None and node.link is not None
    lost = node.link
    lost.abort()
    while not lost.lost:
        await asyncio.sleep(0)
    assert await asyncio.gather(*(store.run(COUNT, [key], [1]) for _ in range(3))) == [1, 2, 3]


async def test_one_server_that_answers_is_enough_to_find_the_others(
    handle: ClusterHandle, connect: Connect, unused_tcp_port: int
) -> None:
    node = handle.nodes[1]
    url = f"redis+cluster://:{node.password}@127.0.0.1:{unused_tcp_port},{node.place}"
    store = await connect(url)
    assert [await store.run(COUNT, [f"few{number}"], [1]) for number in range(10)] == [1] * 10
    assert {server.address.port for server in await store.servers()} == {node.port for node in handle.nodes}


# Outages


@pytest.fixture
def doomed(binary: Path | None) -> Iterator[ClusterHandle]:
    """A cluster in which servers may be killed; what is left of it is served."""
    with cluster(nodes=3, replicas=1, binary=binary, full_coverage=False) as handle:
        yield handle


async def test_a_primary_that_dies_is_replaced_and_meanwhile_only_its_keys_are_away(
    doomed: ClusterHandle, connect: Connect
) -> None:
    store = await connect(doomed.url)
    await until(lambda: store.trouble is None)
    lost, kept = doomed.key_of(doomed.nodes[0]), doomed.key_of(doomed.nodes[1])
    await store.run(COUNT, [lost], [1])
    doomed.nodes[0].do("WAIT", 1, 5_000)
    doomed.kill(doomed.nodes[0])

    async def away() -> bool:
        try:
            await store.run(COUNT, [lost], [0])
        except StoreUnavailable as exc:
            assert "secret" not in str(exc) and doomed.nodes[0].password not in str(exc)
            return not exc.ambiguous
        return False

    await until(away)
    assert store.usable
    assert store.trouble is not None and doomed.nodes[0].place in store.trouble
    # Callers that ask whether it is usable and then send are not surprised by one part that is away.
    store.send_detached("ZADD", lost, 1, "x")
    store.run_detached(COUNT, [lost], [0])
    with pytest.raises(StoreUnavailable):
        await store.reply(store.send("GET", lost))
    assert await store.run(COUNT, [kept], [1]) == 1

    async def back() -> bool:
        with contextlib.suppress(StoreUnavailable):
            return bool(await store.run(COUNT, [lost], [1]) > 1)
        return False

    await until(back)
    await until(lambda: store.trouble is None)
    assert doomed.owner(lost) is not doomed.nodes[0]


async def test_a_planned_failover_loses_no_command(doomed: ClusterHandle, connect: Connect) -> None:
    """The server that is replaced answers MOVED from then on; what was sent to it did not run there."""
    store = await connect(doomed.url)
    await until(lambda: store.trouble is None)
    key = doomed.key_of(doomed.nodes[0])
    replica = doomed.replica_of(doomed.nodes[0])
    replica.do("CLUSTER", "FAILOVER")
    count = 0

    async def replaced() -> bool:
        nonlocal count
        count += 1
        assert await store.run(COUNT, [key], [1]) == count
        return doomed.owner(key) is replica

    await until(replaced)
    assert await store.run(COUNT, [key], [1]) == count + 1
    servers = store._servers
    assert isinstance(servers, Cluster)
    await until(lambda: {("127.0.0.1", doomed.owner(slot).port) for slot in (0, 8000, 16383)} == servers._nodes.keys())


async def test_a_cluster_that_is_down_is_an_outage_and_nothing_ran(connect: Connect) -> None:
    with cluster(nodes=3, full_coverage=True) as handle:
        store = await connect(handle.url)
        await until(lambda: store.trouble is None)
        kept = handle.key_of(handle.nodes[1])
        handle.kill(handle.nodes[0])
        seen: list[StoreUnavailable] = []

        async def down() -> bool:
            with contextlib.suppress(StoreUnavailable):
                try:
                    await store.call("INCR", kept)
                except StoreUnavailable as exc:
                    seen.append(exc)
                    raise
            return bool(seen)

        await until(down)
        assert "CLUSTERDOWN" in str(seen[0]) and not seen[0].ambiguous


async def test_no_server_of_a_cluster_listening_fails_at_once_and_says_where(unused_tcp_port: int) -> None:
    redis = Redis(f"redis+cluster://:secret@127.0.0.1:{unused_tcp_port}", timeout_ms=500, connect_timeout_ms=200)
    redis.start()
    with pytest.raises(StoreUnavailable) as caught:
        await redis.call("PING")
    assert str(unused_tcp_port) in str(caught.value) and "secret" not in str(caught.value)
    assert not caught.value.ambiguous and not redis.usable
    await redis.close()


async def test_a_server_that_is_no_cluster_says_so(redis_url: str) -> None:
    redis = Redis(redis_url.replace("redis://", "redis+cluster://"), timeout_ms=500, connect_timeout_ms=500)
    redis.start()
    with pytest.raises(StoreUnavailable, match="cluster support disabled"):
        await redis.call("PING")
    await redis.close()

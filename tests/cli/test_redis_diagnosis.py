"""What the doctor says of clusters, and of services that sentinels watch."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway.cli.diagnosis import Finding, Status, collect
from gateway.cli.diagnosis.redis import examine_redis
from gateway.config.sections import Stores
from tests.cluster import ClusterHandle, SentinelHandle, cluster, sentinels
from tests.nodes import Node
from tests.servers import system_redis
from tests.waiting import until


@pytest.fixture(scope="module", params=["embedded", "system"])
def binary(request: pytest.FixtureRequest) -> Path | None:
    if request.param == "system" and system_redis() is None:
        pytest.skip("no redis-server on PATH")
    return system_redis() if request.param == "system" else None


@pytest.fixture(scope="module")
def shards(binary: Path | None) -> Iterator[ClusterHandle]:
    with cluster(nodes=2, replicas=1, binary=binary, full_coverage=False) as handle:
        yield handle


@pytest.fixture(scope="module")
def watched(binary: Path | None) -> Iterator[SentinelHandle]:
    with sentinels(replicas=1, binary=binary) as handle:
        yield handle


async def examine(url: str) -> list[Finding]:
    found = await collect("redis", examine_redis(url, Stores(), 1_000))
    assert all(finding.hint for finding in found if finding.status is not Status.OK)
    return found


def says(found: list[Finding], name: str, status: Status = Status.OK) -> list[str]:
    return [finding.says for finding in found if finding.name == name and finding.status is status]


def problems(found: list[Finding]) -> set[str]:
    return {finding.name for finding in found if finding.status is Status.PROBLEM}


async def test_every_server_of_a_cluster_is_examined(shards: ClusterHandle) -> None:
    found = await examine(shards.url)
    assert problems(found) == set()
    assert says(found, "redis.topology") == ["cluster: 2 primaries, 2 replicas"]
    assert says(found, "redis.eviction") == ["all 4 servers: maxmemory-policy is noeviction"]
    [version] = says(found, "redis.version")
    assert version.startswith(("all 4 servers: Valkey ", "all 4 servers: Redis "))
    assert len(says(found, "redis.role")) == 2
    assert says(found, "redis.scripts") and says(found, "redis.clock")


async def test_the_one_server_of_a_cluster_that_evicts_is_named(shards: ClusterHandle) -> None:
    for node in (shards.nodes[1], shards.nodes[3]):  # a primary, and a replica that may become one
        node.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        try:
            found = await examine(shards.url)
        finally:
            node.do("CONFIG", "SET", "maxmemory-policy", "noeviction")
        [evicting] = says(found, "redis.eviction", Status.PROBLEM)
        assert evicting.startswith(f"{node.place}: maxmemory-policy is allkeys-lru")


async def test_a_node_of_a_cluster_is_not_a_server_by_itself(shards: ClusterHandle) -> None:
    found = await examine(shards.nodes[0].url)
    [finding] = [finding for finding in found if finding.name == "redis.role"]
    assert finding.status is Status.PROBLEM and "redis+cluster://" in finding.hint


async def test_a_primary_its_replica_and_its_sentinels_are_examined(watched: SentinelHandle) -> None:
    found = await examine(watched.url)
    assert problems(found) == set()
    assert says(found, "redis.topology") == ["sentinel: 1 primaries, 1 replicas"]
    assert says(found, "redis.sentinels") == [f"all 3 name {watched.primary.place}/0"]
    assert says(found, "redis.eviction") == ["all 2 servers: maxmemory-policy is noeviction"]


async def test_a_sentinel_is_not_a_server_of_data(watched: SentinelHandle) -> None:
    found = await examine(watched.sentinels[0].url)
    [finding] = [finding for finding in found if finding.name == "redis.role"]
    assert finding.status is Status.PROBLEM and "redis+sentinel://" in finding.hint


async def test_a_sentinel_that_is_away_is_named(watched: SentinelHandle, unused_tcp_port: int) -> None:
    found = await examine(watched.url.replace(watched.sentinels[2].place, f"127.0.0.1:{unused_tcp_port}"))
    [away] = says(found, "redis.sentinels", Status.WARNING)
    assert str(unused_tcp_port) in away
    assert problems(found) == set()


async def test_a_part_of_a_cluster_that_is_gone_does_not_hide_the_rest(shards: ClusterHandle) -> None:
    """Last: nobody brings it back."""
    gone = [shards.nodes[0], shards.replica_of(shards.nodes[0])]
    for node in gone:
        shards.kill(node)
    found = await examine(shards.url)
    away = says(found, "redis.reachable", Status.PROBLEM)
    assert len(away) == 2 and all(any(node.place in text for text in away) for node in gone)
    assert "all" not in says(found, "redis.eviction")[0]
    left = [node for node in shards.nodes if node.alive]
    for node in left:
        # Those who forget tell the others to, from Redis 7.2 on: one of them may have done it by now.
        with contextlib.suppress(StopIteration, redis.ResponseError):
            node.do("CLUSTER", "FORGET", _id(node, gone[0]))
    await until(lambda: all(len(node.do("CLUSTER", "SLOTS")) == 1 for node in left))
    found = await examine(shards.url)
    assert "slots are served by nobody" in says(found, "redis.topology", Status.PROBLEM)[0]


def _id(node: Node, other: Node) -> str:
    lines: list[list[str]] = [line.split() for line in node.do("CLUSTER", "NODES").splitlines()]
    return next(fields[0] for fields in lines if fields[1].startswith(f"{other.place}@"))

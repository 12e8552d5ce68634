"""Clusters whose servers answer as it pleases the test: how often commands are sent on, and the map is read."""

import asyncio
import contextlib

import pytest

from gateway.errors import StoreUnavailable
from gateway.stores import Redis
from gateway.stores.cluster import QUIET_S, Cluster
from tests.stores.test_redis import INFO, Frozen, Stalling
from tests.waiting import until


class Contrary(Frozen):
    """A cluster of one server, which says of every key that another has it: `other`, or itself. With nothing to say it
    finds everything."""

    def __init__(self, says: str = "MOVED", other: int = 0, port: int = 0) -> None:
        super().__init__(port)
        self.says = says
        self.other = other
        #: The port that its map names.
        self.owner = 0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        port, owner = self.port, self.owner or self.port
        answers = {
            b"CLUSTER": f"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:{owner}\r\n",
            b"PING": "+PONG\r\n",
            b"INFO": INFO.decode(),
            b"ASKING": "+OK\r\n",
            b"GET": f"-{self.says} 7 127.0.0.1:{self.other or port}\r\n" if self.says else "$5\r\nfound\r\n",
        }
        for word in data.split():
            writer.write(answers.get(word, "").encode())


@pytest.mark.parametrize("says", ["MOVED", "ASK"])
async def test_a_command_is_sent_on_once_however_often_it_is_told_to(says: str) -> None:
    async with Contrary(says) as server:
        redis = Redis(server.url.replace("redis:", "redis+cluster:"), timeout_ms=1_000, connect_timeout_ms=1_000)
        redis.start()
        with pytest.raises(StoreUnavailable, match=says) as caught:
            await redis.call("GET", "x")
        assert not caught.value.ambiguous
        assert server.received.count(b"GET") == 2
        assert server.received.count(b"ASKING") == (says == "ASK")
        assert isinstance(redis._servers, Cluster) and redis._servers._followed == {}
        await redis.close()


async def test_a_command_that_was_sent_on_and_not_answered_may_have_run() -> None:
    async with Stalling() as silent:
        async with Contrary("MOVED", int(silent.url.rpartition(":")[2])) as server:
            redis = Redis(server.url.replace("redis:", "redis+cluster:"), timeout_ms=300, connect_timeout_ms=1_000)
            redis.start()
            with pytest.raises(StoreUnavailable, match="no reply within 300 ms") as caught:
                await redis.call("GET", "x")
            assert caught.value.ambiguous
            assert silent.received.count(b"GET") == 1
            await redis.close()


async def test_a_cluster_that_comes_later_is_found(unused_tcp_port: int) -> None:
    redis = Redis(f"redis+cluster://127.0.0.1:{unused_tcp_port}", timeout_ms=500, connect_timeout_ms=500)
    redis.start()
    with pytest.raises(StoreUnavailable):
        await redis.call("PING")
    async with Contrary(says="", port=unused_tcp_port):
        await until(lambda: redis.usable, timeout_s=QUIET_S / 2)
        assert await redis.call("GET", "x") == b"found"
        await redis.close()


async def test_the_map_is_not_asked_for_with_every_command_that_moved() -> None:
    async with Contrary() as server:
        redis = Redis(server.url.replace("redis:", "redis+cluster:"), timeout_ms=1_000, connect_timeout_ms=1_000)
        redis.start()
        await redis.connected()
        for _ in range(200):
            with contextlib.suppress(StoreUnavailable):
                await redis.call("GET", "x")
        assert server.received.count(b"GET") == 400
        assert server.received.count(b"SLOTS") < 20
        await redis.close()


async def test_a_server_that_has_no_slot_yet_stays_connected_while_one_is_on_its_way_to_it() -> None:
    async with Contrary(says="") as new:
        assert isinstance(new, Contrary)
        async with Contrary("ASK", new.port) as old:
            new.owner = int(old.url.rpartition(":")[2])
            redis = Redis(old.url.replace("redis:", "redis+cluster:"), timeout_ms=1_000, connect_timeout_ms=1_000)
            redis.start()
            assert await redis.call("GET", "x") == b"found"
            assert isinstance(redis._servers, Cluster)
            read_count = _maps_read(old, new)
            for times in (1, 2, 3):
                redis._servers._stale.set()
                await until(lambda times=times: _maps_read(old, new) >= read_count + times)  # type: ignore[misc]
                assert await redis.call("GET", "x") == b"found"
            await redis.close()
            assert new.connections == 1


def _maps_read(*servers: Frozen) -> int:
    return sum(server.received.count(b"SLOTS") for server in servers)

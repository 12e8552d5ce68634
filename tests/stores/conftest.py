"""Stores to open, and servers: what asks for `binary` runs on the embedded Valkey and on the machine's own Redis."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from gateway.stores import Redis, Script
from tests import servers
from tests.authority import Pems, make_pems

#: Counts how often it ran.
COUNT = Script("count", "return redis.call('INCRBY', KEYS[1], ARGV[1])")
ECHO = Script("echo", "return ARGV[1]")

Connect = Callable[..., Awaitable[Redis]]


@pytest.fixture(scope="module", params=["embedded", "system"])
def binary(request: pytest.FixtureRequest) -> Path | None:
    if request.param == "embedded":
        return None
    return system_redis()


def system_redis() -> Path:
    found = servers.system_redis()
    if found is None:
        pytest.skip("no redis-server on PATH")
    return found


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Pems:
    return make_pems(tmp_path_factory.mktemp("pems"))


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens stores that are closed after the test. Connected already, unless `wait` is False."""
    opened: list[Redis] = []

    async def open_store(url: str, timeout_ms: int = 2_000, *, wait: bool = True) -> Redis:
        redis = Redis(url, timeout_ms=timeout_ms, connect_timeout_ms=1_000, scripts=[COUNT, ECHO])
        opened.append(redis)
        redis.start()
        if wait:
            await redis.connected()
        return redis

    yield open_store
    for redis in opened:
        await redis.close()

"""Fixtures of the walk: an org with credits, an upstream, a gateway in front of it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import redis.asyncio as redis_client

from gateway.ledger import migrate
from gateway.stores import Postgres
from tests.walk.house import House


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """asyncio's own loop, or those that a module names in `LOOPS`."""
    loops: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = getattr(
        getattr(item, "module", None), "LOOPS", {"asyncio": asyncio.new_event_loop}
    )
    return loops


@pytest.fixture
async def house(tmp_path: Path, redis_url: str, database_url: str, demo_router_url: str) -> AsyncIterator[House]:
    postgres = Postgres(database_url, timeout_ms=10_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    redis = redis_client.Redis.from_url(redis_url)
    house = House(tmp_path, redis_url, database_url, postgres, redis, upstream_url=demo_router_url)
    house.secret = await house.add_key(house.org_id, "ann")
    yield house
    await redis.aclose()
    await postgres.close()

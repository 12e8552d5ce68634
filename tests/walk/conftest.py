"""Fixtures of the walk: an org with credits, an upstream, a gateway in front of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio as redis_client

from gateway.ledger import migrate
from gateway.stores import Postgres
from tests.walk.house import House


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

"""The fixtures of tests/conftest.py give what they promise, on both kinds of servers."""

import asyncpg
import pytest
from redis.asyncio import Redis

both = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """What the schema is made of is what is tested here."""
    return empty_database_url


@both
@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_gets_an_empty_redis(redis_url: str, turn: int) -> None:
    async with Redis.from_url(redis_url) as client:
        assert await client.incr("turn") == 1
        assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"


@both
@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_gets_an_empty_database(database_url: str, turn: int) -> None:
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database_url)
    try:
        await connection.execute("CREATE TABLE orders (id bigint PRIMARY KEY)")
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
    finally:
        await connection.close()

"""Overrides in a whole gateway: what its own pages say of them, and what is known when the stores come late."""

from contextlib import AsyncExitStack

import httpx

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House, in_process

ADD = "INSERT INTO gateway.limit_override (org_id, limit_name, value) VALUES ($1, 'rpm', 3)"


async def says(client: httpx.AsyncClient, status: str, words: str) -> bool:
    seen = (await client.get("/-/health")).json()
    return seen["status"] == status and words in seen["checks"]["postgres"]["says"]


async def overrides_gauge(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/-/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("gateway_limit_overrides "))


async def test_overrides_that_do_not_apply_are_told_by_health(house: House) -> None:
    house.settings["limit_rules"] = "{ overrides_max: 1 }"
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(in_process(house))
        client = await stack.enter_async_context(house.client(running.address))
        await until(lambda: says(client, "ok", "schema is current"))
        assert await overrides_gauge(client) == 0
        await house.postgres.rows(ADD, "acme")
        await house.postgres.rows(ADD, "other")
        await until(lambda: says(client, "degraded", "limits.overrides_max (1)"))
        assert await overrides_gauge(client) == 1
        assert (await client.get("/-/ready")).status_code == 200
        await house.postgres.rows("DELETE FROM gateway.limit_override WHERE org_id = 'acme'")
        await until(lambda: says(client, "ok", "schema is current"))
        assert running.gateway.overrides.of("other") == {"rpm": 3}


async def test_a_gateway_that_was_there_before_postgres_learns_the_overrides_when_it_comes(house: House) -> None:
    await house.postgres.rows(ADD, "acme")
    async with AsyncExitStack() as stack:
        postgres = await stack.enter_async_context(raw.relay(house.database_url, is_open=False))
        house.settings["postgres"] = postgres.url
        running = await stack.enter_async_context(in_process(house))
        overrides = running.gateway.overrides
        assert (overrides.of("acme"), overrides.known) == ({}, False)
        await postgres.open()
        await until(lambda: overrides.of("acme"))


async def test_a_gateway_that_may_not_migrate_still_follows_the_overrides(house: House) -> None:
    """As during the return to the release before: the database has been migrated by a newer one."""
    await house.postgres.rows("INSERT INTO gateway.migration (version, name, sha256) VALUES (9999, 'later', '')")
    async with in_process(house) as running:
        await house.postgres.rows(ADD, "acme")
        await until(lambda: running.gateway.overrides.of("acme"))

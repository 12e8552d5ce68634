"""Clients that leave at any moment, thousands of them: afterwards the gateway holds what it held before."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, Running
from tests.walk.raw import Relay
from tests.walk.storm.clients import Plan, Report
from tests.walk.storm.remains import Remains, resident_bytes
from tests.walk.storm.running import CHAT, DRAINED, PLAIN, TOKENS, StormUpstream, storm, storm_gateway, storm_upstream

#: What the gateway is served with.
LOOPS = {"uvloop": uvloop.new_event_loop}

LIMITS = [
    TOKENS,
    {"name": "parallel", "count": "concurrent", "limit": 150, "per": "org"},
]
FATES = {"stay": 10, "pair": 1, "request": 30, "waiting": 30, "answer": 20, "end": 10}
CREDITS = 1_000_000
CLIENTS = 150
POOL = 12
#: Memory may grow by so much over two storms after the first: what malloc cannot give back of a fuller moment.
GROWTH_BYTES_MAX = 8 << 20


async def hesitate(redis: Relay) -> None:
    """Redis is slow now and then, so that clients leave while a hold is taken or settled."""
    chance = random.Random(2)
    while True:
        await asyncio.sleep(chance.uniform(0.01, 0.1))
        redis.freeze()
        await asyncio.sleep(chance.uniform(0.001, 0.03))
        redis.thaw()


async def at_rest(house: House, gateway: Running, upstream: StormUpstream) -> None:
    """Nothing is held anywhere: no request, hold or lease, no connection but those that rest, and in time not those."""
    inside = gateway.gateway
    await until(lambda: inside.admission.open_count == 0 and inside.settling.idle, 30)
    [stats] = inside.upstreams.stats().values()
    assert (stats.in_use, stats.waiting, stats.dialling, stats.in_flight, stats.queued) == (0, 0, 0, 0, 0)
    # Charges may be many; holds and leases are gone as soon as their requests are.
    account = await house.account()
    assert account.get("h", 0) == 0
    assert [key async for key in house.redis.scan_iter("*:l:parallel*")] == []
    await until(lambda: inside.upstreams.stats()["ai_router"].open == 0)

    async def forgotten_there_too() -> bool:
        return bool((await upstream.record())["open"] == 0)

    await until(forgotten_there_too)
    await house.settled(60)


@pytest.mark.timeout(1200)
async def test_after_a_storm_of_leaving_clients_nothing_is_left(
    house: House, full: bool, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[Report] = []
    levels: list[int] = []

    house.limits = LIMITS
    await house.credits(CREDITS)
    async with storm_upstream() as upstream, raw.relay(house.redis_url) as redis:
        house.upstream_url = upstream.url
        settings = {"redis": redis.url, "connections_max": str(POOL), "keepalive": "500ms"}
        async with storm_gateway(house, monkeypatch, **settings) as gateway:

            async def leave(requests: int, seed: int) -> None:
                """One storm, and the quiet after it."""
                hesitating = asyncio.create_task(hesitate(redis))
                try:
                    plan = Plan(
                        address=gateway.address,
                        secret=house.secret,
                        paths=(CHAT, PLAIN, DRAINED),
                        clients=CLIENTS,
                        fates=FATES,
                        seed=seed,
                        requests=requests,
                        pause_ms_max=4,
                    )
                    reports.append(await storm(plan))
                finally:
                    hesitating.cancel()
                    await asyncio.gather(hesitating, return_exceptions=True)
                    redis.thaw()
                await at_rest(house, gateway, upstream)
                levels.append(resident_bytes())

            half = 10_000 if full else 1_000
            # The first storm fills every cache and pool to the level at which it stays.
            await leave(half, 1)
            before = Remains.now((house.database_url, house.redis_url, redis.url))
            await leave(half, 2)
            await leave(half, 3)
            await before.none_new()
            await booked(house, await upstream.record())

    record_property("requests", sum(report.requests for report in reports))
    record_property("answers", sum(report.answers for report in reports))
    record_property("left", [report.left for report in reports])
    record_property("busy", [report.busy for report in reports])
    record_property("seconds", [report.seconds for report in reports])
    record_property("resident_bytes", levels)
    assert [wrong for report in reports for wrong in report.wrong] == []
    assert levels[2] - levels[0] < GROWTH_BYTES_MAX, levels


async def booked(house: House, record: dict[str, Any]) -> None:
    """What the ledger says agrees with itself, with Redis and with what the upstream saw."""
    assert record["offences"] == []
    assert len(set(record["ids"])) == len(record["ids"]), "a request was sent more than once"
    rows = await house.postgres.rows(
        "SELECT meta->>'request_id' AS id, kind, -amount AS charged FROM gateway.ledger"
        " WHERE kind IN ('settle', 'orphan')"
    )
    charged = {row["id"]: int(row["charged"]) for row in rows}
    assert {row["kind"] for row in rows} == {"settle"}, "a hold was lost and swept up"
    assert len(charged) == len(rows), "a request was charged twice"
    assert set(charged.values()) == {CREDIT}
    # Whatever the upstream has had whole was answered with 200, as far as its client was there to hear it.
    assert set(record["ids"]) <= charged.keys()
    assert await house.balance() == (CREDITS - len(charged)) * CREDIT
    assert await house.redis.get(f"ai_credits:org_{house.org_id}") == str(CREDITS - len(charged)).encode()

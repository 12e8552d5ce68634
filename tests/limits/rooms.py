"""`gateway.admission` on a real server, with hardly a ledger behind it."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway import keys, limits
from gateway.admission import Admission, Hold, Powers, Rules, Settling
from gateway.stores import INCARNATION, Redis, Script
from gateway.types import Balance, Charge, Demand, Limit, Principal, Quote, Refusal, Usage
from tests.ledger.faulty import FaultyRedis
from tests.limits.conftest import CREDIT, ORG, demand

HOUR_MS = 3_600_000
RPH = demand(3, HOUR_MS, name="rph")
TPH = demand(1_000, HOUR_MS, 400, unit="tokens", name="tph")
PARALLEL = demand(2, 0, unit="concurrent", name="parallel")
EVERYBODY = Demand(Limit("everybody", "sliding", "requests", "everybody", 3, HOUR_MS, shared=True), "", 1)
UPSTREAM = Demand(Limit("up", "concurrent", "concurrent", "upstream", 3, 30_000, shared=True), "gpu", 1)

numbers = itertools.count()
ASKER = Principal(ORG, "pro", "ann", "key_1", "api_key")
KEPT = Charge(0, None, keep_requests=True, basis="exact")


def used_tokens(count: int) -> Charge:
    return Charge(0, Usage(count, 0), keep_requests=True, basis="exact")


def rules(deny_cache_ms: int = 0, deny_cache_entries_max: int = 100) -> Rules:
    return Rules(
        lease_ms=30_000,
        heartbeat_ms=10_000,
        settle_timeout_ms=2_000,
        outbox_entries_max=1_000,
        mirror_ttl_s=3_600,
        deny_cache_ms=deny_cache_ms,
        deny_cache_entries_max=deny_cache_entries_max,
        capped=False,
        holds_in_postgres=False,
        counts_locally=False,
    )


def desk(redis: Redis, rules: Rules) -> Admission:
    """The admission of one gateway. Every org has ten credits until it is told otherwise."""
    powers = ledgerless(redis)
    return Admission(redis, rules, Settling(redis, rules, powers), powers)


def ledgerless(redis: Redis, credits: int = 10) -> Powers:
    """Every org has so many credits, in Redis and nowhere else."""

    async def never(*asked: object) -> Any:
        raise AssertionError(f"nothing here is lost by Redis, yet PostgreSQL is asked for {asked}")

    async def nothing_new(org_id: str, plan: str) -> None:
        return None

    async def nothing_waits(org_id: str) -> None:
        return None

    async def install(balance: Balance) -> None:
        org_id = balance.org_id
        await redis.run(
            Script("install", limits.script_text("install")),
            [keys.account(org_id), keys.holds(org_id), keys.outbox(org_id), keys.mirror(org_id)],
            [*limits.state_row(balance), 3_600, 0, INCARNATION],
        )

    return Powers(
        load=lambda org_id, plan, need: install(Balance(org_id, credits * CREDIT, 1)),
        raise_cap=never,
        begin_period=nothing_new,
        turn_period=never,
        carry=nothing_waits,
        recheck=lambda org_id: None,
        refresh=lambda org_id: None,
        recover=never,
        post=never,
        install=install,
        take_in_postgres=never,
        extend_in_postgres=never,
        renew_in_postgres=never,
        instances=lambda: 1,
        mark_dirty=lambda org_id: None,
    )


@asynccontextmanager
async def connected(redis_url: str) -> AsyncIterator[FaultyRedis]:
    """A connection of one gateway, with every script of admission loaded, that fails where a test says."""
    scripts = [Script(name, limits.script_text(name)) for name in limits.LOOPS]
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=scripts)
    redis.start()
    try:
        await redis.connected()
        yield redis
    finally:
        await redis.close()


async def calls(redis: FaultyRedis) -> int:
    """How many scripts the server has run."""
    info = (await redis.call("INFO", "commandstats")).decode()
    found = [line for line in info.splitlines() if line.startswith("cmdstat_evalsha:")]
    return int(found[0].partition("calls=")[2].partition(",")[0]) if found else 0


async def ask(admission: Admission, hold_id: str, *demands: Demand, price: int = 0) -> Hold | Refusal:
    async with admission.hold(hold_id, ASKER, demands, Quote.flat(price)) as held:
        if isinstance(held, Hold):
            held.charge = KEPT
        return held


async def refused(admission: Admission, hold_id: str, *demands: Demand, price: int = 0) -> Refusal:
    answer = await ask(admission, hold_id, *demands, price=price)
    assert isinstance(answer, Refusal)
    return answer


async def spend(admission: Admission, *demands: Demand) -> None:
    """Until it is refused, without anybody remembering that."""
    fresh = desk(admission.settling._redis, rules())
    for _ in range(100):
        if isinstance(await ask(fresh, f"spent{next(numbers)}", *demands), Refusal):
            return
    raise AssertionError("never refused")


async def used(redis: FaultyRedis, *demands: Demand) -> list[int]:
    """What counts of each now, whoever owns it: asked for in a request that is released."""
    fresh, found = desk(redis, rules()), []
    for one in demands:
        async with fresh.hold(f"look{next(numbers)}", ASKER, (one,), Quote.flat(0)) as held:
            judged = held.limits if isinstance(held, Refusal) else held.shared.states if held.shared else held.states
            found.append(judged[0].used)
    return found

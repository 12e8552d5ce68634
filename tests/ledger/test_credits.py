"""Credits: taken at admission, charged once, posted once."""

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from gateway import keys
from gateway.admission import Hold
from gateway.errors import StoreUnavailable
from gateway.ledger import post
from gateway.stores import Postgres, Redis
from gateway.types import Charge, Entry, Refusal
from tests.ledger.conftest import ASKER, ORG, House, rules
from tests.waiting import until

CREDIT = 1_000_000
PAID = Charge(CREDIT, None, keep_requests=True, basis="exact")


async def pay(house: House, hold_id: str) -> Refusal | None:
    async with house.admission.hold(hold_id, ASKER, (), CREDIT) as verdict:
        if isinstance(verdict, Refusal):
            return verdict
        verdict.charge = PAID
        return None


async def test_a_charge_reaches_the_ledger_the_balance_and_the_mirror(house: House) -> None:
    await house.credits(3)
    assert await pay(house, "r1") is None
    assert await house.redis.call("GET", f"ai_credits:org_{ORG}") == b"2"
    await house.outbox.flush()
    assert await house.ledger() == [("grant:test", "grant", 3 * CREDIT), ("r1", "settle", -CREDIT)]
    account = await house.account()
    assert (account["p"], account["u"], account["h"]) == (2 * CREDIT, 0, 0)
    ttl = await house.redis.call("TTL", f"ai_credits:org_{ORG}")
    assert 3590 <= ttl <= 3600


async def test_twenty_credits_admit_exactly_twenty_of_two_hundred(house: House) -> None:
    await house.credits(20)
    refusals = await asyncio.gather(*(pay(house, f"r{number}") for number in range(200)))
    assert refusals.count(None) == 20
    assert {refusal.code for refusal in refusals if refusal} <= {"insufficient_credits", "credits_in_flight"}
    await house.outbox.flush()
    assert len([entry for entry in await house.ledger() if entry[1] == "settle"]) == 20
    assert await house.redis.call("GET", f"ai_credits:org_{ORG}") == b"0"
    row = await house.postgres.row("SELECT credits FROM ai_credits WHERE organization_id = $1", ORG)
    assert row is not None and row["credits"] == 0


async def test_no_credits_is_402_and_credits_in_flight_is_429(house: House) -> None:
    await house.credits(1)
    async with house.admission.hold("r1", ASKER, (), CREDIT) as first:
        assert isinstance(first, Hold)
        in_flight = await pay(house, "r2")
        assert in_flight is not None and (in_flight.status, in_flight.code) == (429, "credits_in_flight")
        first.charge = PAID
    out = await pay(house, "r3")
    assert out is not None and (out.status, out.code, out.should_retry) == (402, "insufficient_credits", False)
    assert out.retry_after_ms is None


async def test_a_request_that_never_reached_the_upstream_is_free(house: House) -> None:
    await house.credits(1)
    async with house.admission.hold("r1", ASKER, (), CREDIT):
        pass
    await house.outbox.flush()
    assert [kind for _, kind, _ in await house.ledger()] == ["grant"]
    assert (await house.account())["h"] == 0


async def test_posting_twice_charges_once(house: House) -> None:
    await house.credits(5)
    entry = Entry(ORG, "r1", "settle", -CREDIT)
    first = await post(house.postgres, [entry])
    second = await post(house.postgres, [entry])
    assert first == second
    assert first[0].ucredits == 4 * CREDIT


async def test_fractions_of_a_credit_add_up(house: House) -> None:
    await house.credits(1)
    for number in range(3):
        balances = await post(house.postgres, [Entry(ORG, f"r{number}", "settle", -300_001)])
    assert balances[0].ucredits == CREDIT - 3 * 300_001
    balances = await post(house.postgres, [Entry(ORG, "debt", "settle", -200_000)])
    assert balances[0].ucredits == CREDIT - 3 * 300_001 - 200_000  # below zero: a debt keeps its fraction


async def test_an_orphan_and_its_late_settle_charge_once(house: House) -> None:
    await house.credits(10)
    await post(house.postgres, [Entry(ORG, "r1", "orphan", -5 * CREDIT)])
    balances = await post(house.postgres, [Entry(ORG, "r1", "settle", -2 * CREDIT)])
    assert balances[0].ucredits == 8 * CREDIT
    balances = await post(house.postgres, [Entry(ORG, "r1", "orphan", -5 * CREDIT)])
    assert balances[0].ucredits == 8 * CREDIT
    both = [Entry(ORG, "r2", "orphan", -CREDIT), Entry(ORG, "r2", "settle", -3 * CREDIT)]
    balances = await post(house.postgres, both)
    assert balances[0].ucredits == 5 * CREDIT


async def test_a_charge_for_a_deleted_org_is_kept_for_a_person(house: House) -> None:
    await post(house.postgres, [Entry("nobody", "r1", "settle", -CREDIT)])
    row = await house.postgres.row("SELECT org_id, amount FROM gateway.dead_letter")
    assert row is not None and (row["org_id"], row["amount"]) == ("nobody", -CREDIT)


async def test_a_top_up_by_hand_becomes_an_external_entry(house: House) -> None:
    await house.credits(1)
    await house.postgres.row("UPDATE ai_credits SET credits = credits + 500 WHERE organization_id = $1", ORG)
    assert (await house.ledger())[-1][1:] == ("external", 500 * CREDIT)


@pytest.mark.parametrize(
    "statement", ["UPDATE gateway.ledger SET amount = 0", "DELETE FROM gateway.ledger", "TRUNCATE gateway.ledger"]
)
async def test_the_ledger_only_grows(house: House, statement: str) -> None:
    await house.credits(1)
    with pytest.raises(StoreUnavailable, match="append-only"):
        await house.postgres.rows(statement)


async def test_the_hold_of_a_dead_gateway_ends_and_is_charged_once(house: House) -> None:
    await house.credits(5)
    house.admission._rules = rules(lease_ms=1)
    context = house.admission.hold("r1", ASKER, (), CREDIT)
    hold = await context.__aenter__()
    assert isinstance(hold, Hold)
    await until(house.sweeper.sweep)
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "orphan", -CREDIT)
    # Its gateway was only stalled: the settle that comes late books the difference, which is nothing.
    hold.charge = PAID
    await context.__aexit__(None, None, None)
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "settle", 0)
    account = await house.account()
    assert (account["p"], account["u"], account["h"]) == (4 * CREDIT, 0, 0)


async def test_a_settle_after_redis_lost_its_state_goes_to_postgres_directly(house: House) -> None:
    await house.credits(5)
    async with house.admission.hold("r1", ASKER, (), CREDIT) as hold:
        assert isinstance(hold, Hold)
        await house.redis.call("FLUSHALL")
        hold.charge = PAID
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
    async with house.admission.hold("r2", ASKER, (), CREDIT) as hold:
        assert isinstance(hold, Hold)
        assert hold.available_ucredits == 3 * CREDIT


async def test_a_settle_that_no_store_takes_is_kept_until_one_does(house: House) -> None:
    await house.credits(5)
    async with house.admission.hold("r1", ASKER, (), CREDIT) as hold:
        assert isinstance(hold, Hold)
        hold.charge = PAID
        # The server refuses every write from here on, as a replica or one whose disk is full does.
        await house.redis.call("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        assert house.admission.settling.backlog_count == 1
    finally:
        await house.redis.call("CONFIG", "SET", "min-replicas-to-write", "0")
    await house.admission.drain(5)
    assert house.admission.settling.backlog_count == 0
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)


async def test_an_org_nobody_knows_has_no_credits(house: House) -> None:
    refusal = await pay(house, "r1")
    assert refusal is not None and refusal.code == "insufficient_credits"


async def test_an_unknown_org_receives_its_plans_credits_once_when_provisioned(house: House) -> None:
    house.accounts._provision = True
    asker = type(ASKER)("fresh", "trial", None, None, "jwt")
    async with house.admission.hold("r1", asker, (), CREDIT) as verdict:
        assert isinstance(verdict, Hold)
        assert verdict.available_ucredits == 99 * CREDIT  # beside this hold of one
    await house.redis.call("FLUSHALL")
    async with house.admission.hold("r2", asker, (), CREDIT) as verdict:
        assert isinstance(verdict, Hold)
        assert verdict.available_ucredits == 99 * CREDIT  # beside this hold of one


async def test_a_foreign_key_of_one_org_stops_neither_sweep_nor_posting_of_the_others(house: House) -> None:
    await house.credits(5)
    house.admission._rules = rules(lease_ms=1)
    hold = house.admission.hold("r1", ASKER, (), CREDIT)
    await hold.__aenter__()
    await house.redis.call("ZADD", keys.ACTIVE_ORGS, 1, "aaa-broken")
    for key in (keys.outbox("aaa-broken"), keys.deadlines("aaa-broken")):
        await house.redis.call("SET", key, "not ours")
    house.outbox.mark("aaa-broken")
    await until(house.sweeper.sweep)
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "orphan", -CREDIT)
    await hold.__aexit__(None, None, None)


class Parted:
    """A cluster of which the part with these keys is away."""

    def __init__(self, redis: Redis, away: str) -> None:
        self._redis = redis
        self._away = away

    async def call(self, *command: str | int) -> object:
        if self._away in str(command[1:]):
            raise StoreUnavailable(detail="away")
        return await self._redis.call(*command)

    def __getattr__(self, name: str) -> object:
        return getattr(self._redis, name)


async def test_a_part_of_a_cluster_that_is_away_stops_neither_sweep_nor_posting_of_the_others(house: House) -> None:
    await house.credits(5)
    await house.credits(5, "aaa-away")
    house.admission._rules = rules(lease_ms=1)
    gone = replace(ASKER, org_id="aaa-away")
    holds = [house.admission.hold(f"r-{who.org_id}", who, (), CREDIT) for who in (gone, ASKER)]
    for hold in holds:
        await hold.__aenter__()
    house.outbox.mark("aaa-away")
    house.sweeper._redis = house.outbox._redis = cast(Redis, Parted(house.redis, "aaa-away"))
    await until(house.sweeper.sweep)
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r-acme", "orphan", -CREDIT)
    # With nobody else to post for, it is told that there is nobody to ask; and it is not forgotten.
    with pytest.raises(StoreUnavailable):
        await house.outbox.flush()
    house.sweeper._redis = house.outbox._redis = house.redis
    await until(house.sweeper.sweep)
    await house.outbox.flush()
    assert (await house.ledger("aaa-away"))[-1] == ("r-aaa-away", "orphan", -CREDIT)
    for hold in holds:
        await hold.__aexit__(None, None, None)


async def test_what_postgres_did_not_take_is_posted_by_the_next_flush(house: House) -> None:
    await house.credits(5)
    await pay(house, "r1")
    whole, house.outbox._postgres = (
        house.outbox._postgres,
        Postgres("postgresql://127.0.0.1:1/x", timeout_ms=50, pool_max=1),
    )
    with pytest.raises(StoreUnavailable):
        await house.outbox.flush()
    house.outbox._postgres = whole
    assert await house.outbox.flush() == 1
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)

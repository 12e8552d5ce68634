"""Credits: taken at admission, charged once, posted once."""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import cast

import pytest

from gateway import keys
from gateway.admission import Hold
from gateway.errors import StoreRefused, StoreUnavailable, UnknownBalance
from gateway.ledger import post
from gateway.stores import Postgres, Redis
from gateway.types import Charge, Entry, Price, Quote, Refusal
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyRedis
from tests.ledger.running import gateway, state
from tests.limits.given import demand
from tests.waiting import until

CREDIT = 1_000_000
PRICE = Quote.flat(CREDIT)
PAID = Charge(CREDIT, None, keep_requests=True, basis="exact")
RPM = demand("rpm", "sliding", "requests", "org", ORG, 100, 60_000, 1)
SLOT = demand("parallel", "concurrent", "concurrent", "org", ORG, 1, 30_000, 1)


async def pay(house: House, hold_id: str) -> Refusal | None:
    async with house.admission.hold(hold_id, ASKER, (), PRICE) as verdict:
        if isinstance(verdict, Refusal):
            return verdict
        verdict.charge = PAID
        return None


@asynccontextmanager
async def without_redis(redis_url: str, database_url: str, **credits: object) -> AsyncIterator[House]:
    """A house whose Redis is `away` when a test says so."""
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    async with furnished(redis, Postgres(database_url, timeout_ms=2_000, pool_max=4), **credits) as house:
        yield house


def faulty(house: House) -> FaultyRedis:
    return cast(FaultyRedis, house.redis)


def away(house: House, is_away: bool) -> None:
    faulty(house).away = is_away


async def shows(house: House, ucredits: int) -> bool:
    """Redis has this balance."""
    return (await house.account()).get("p") == ucredits


async def test_a_charge_reaches_the_ledger_the_balance_and_the_mirror(house: House) -> None:
    await house.credits(3)
    assert await pay(house, "r1") is None
    assert await house.redis.call("GET", f"ai_credits:org_{ORG}") == b"2"
    await house.outbox.flush()
    assert await house.ledger() == [("grant:test", "grant", 3 * CREDIT), ("r1", "settle", -CREDIT)]
    account = await house.account()
    assert (account["p"], account["u"], account["h"]) == (2 * CREDIT, 0, 0)
    ttl = await house.redis.call("TTL", f"ai_credits:org_{ORG}")
    assert 3600 * 0.95 - 10 <= ttl <= 3600 * 1.05


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
    async with house.admission.hold("r1", ASKER, (), PRICE) as first:
        assert isinstance(first, Hold)
        in_flight = await pay(house, "r2")
        assert in_flight is not None and (in_flight.status, in_flight.code) == (429, "credits_in_flight")
        assert in_flight.retry_after_ms == 1000
        assert in_flight.details == {"required_credits": 1.0, "available_credits": 0.0, "held_credits": 1.0}
        first.charge = PAID
    out = await pay(house, "r3")
    assert out is not None and (out.status, out.code, out.should_retry) == (402, "insufficient_credits", False)
    assert out.retry_after_ms is None
    assert out.details == {"required_credits": 1.0, "available_credits": 0.0, "held_credits": 0.0}


async def test_a_request_larger_than_the_whole_balance_is_402_of_its_own_kind(house: House) -> None:
    await house.credits(2)
    async with house.admission.hold("r1", ASKER, (), PRICE):
        async with house.admission.hold("r2", ASKER, (), Quote.flat(3 * CREDIT)) as refusal:
            assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.should_retry) == (402, "request_exceeds_balance", False)
    assert refusal.details == {"required_credits": 3.0, "available_credits": 1.0, "held_credits": 1.0}


async def test_a_request_that_never_reached_the_upstream_is_free(house: House) -> None:
    await house.credits(1)
    async with house.admission.hold("r1", ASKER, (), PRICE):
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
    house.obey(lease_ms=1)
    context = house.admission.hold("r1", ASKER, (), PRICE)
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


async def test_a_settle_after_redis_lost_its_state_goes_to_postgres_directly(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.losses.beat()
        await house.credits(5)
        async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold)
            await house.redis.call("FLUSHALL")
            hold.charge = PAID
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)

        async def admitted() -> bool:
            async with house.admission.hold("r2", ASKER, (), PRICE) as hold:
                return isinstance(hold, Hold) and hold.available_ucredits == 3 * CREDIT

        await until(admitted)


async def test_a_settle_that_no_store_takes_is_kept_until_one_does(house: House) -> None:
    await house.credits(5)
    async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
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


async def test_an_unknown_org_receives_its_plans_credits_once_when_provisioned(
    redis_url: str, database_url: str
) -> None:
    asker = type(ASKER)("fresh", "trial", None, None, "jwt")
    async with gateway(redis_url, database_url, works=False, provision=True) as house:
        async with house.admission.hold("r1", asker, (), PRICE) as verdict:
            assert isinstance(verdict, Hold)
            assert verdict.available_ucredits == 99 * CREDIT  # beside this hold of one
        await house.redis.call("FLUSHALL")
        async with house.admission.hold("r2", asker, (), PRICE) as verdict:
            assert isinstance(verdict, Hold)
        assert [entry for entry in await house.ledger("fresh") if entry[1] == "grant"] == [
            ("grant:trial:initial", "grant", 100 * CREDIT)
        ]


async def test_a_foreign_key_of_one_org_stops_neither_sweep_nor_posting_of_the_others(house: House) -> None:
    await house.credits(5)
    house.obey(lease_ms=1)
    hold = house.admission.hold("r1", ASKER, (), PRICE)
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
    house.obey(lease_ms=1)
    gone = replace(ASKER, org_id="aaa-away")
    holds = [house.admission.hold(f"r-{who.org_id}", who, (), PRICE) for who in (gone, ASKER)]
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


# Holding less than what is wanted, and more later

ON_DEMAND = Quote(Price(0, CREDIT, CREDIT), 4 * CREDIT, CREDIT, 4 * CREDIT, CREDIT)


async def test_what_there_is_is_held_when_it_is_enough_to_begin_with(house: House) -> None:
    await house.credits(3)
    async with house.admission.hold("r1", ASKER, (), PRICE), house.admission.hold("r2", ASKER, (), ON_DEMAND) as hold:
        assert isinstance(hold, Hold)
        assert (hold.ucredits, hold.available_ucredits) == (2 * CREDIT, 0)
        assert await house.admission.extend(hold, CREDIT) == 0
        hold.charge = Charge(CREDIT // 2, None, keep_requests=True, basis="exact")
    assert (await house.account())["h"] == 0


@pytest.mark.parametrize("write", ["behind", "through"])
async def test_a_hold_grows_as_long_as_there_is_something_left(redis_url: str, database_url: str, write: str) -> None:
    async with gateway(redis_url, database_url, works=False, write=write, cap_floor=1, cap_percent=0) as house:
        await house.credits(7)
        async with house.admission.hold("r1", ASKER, (), ON_DEMAND) as hold:
            assert isinstance(hold, Hold)
            assert hold.where == ("redis" if write == "behind" else "postgres")
            assert [await house.admission.extend(hold, 2 * CREDIT) for _ in range(3)] == [2 * CREDIT, CREDIT, 0]
            assert hold.ucredits == 7 * CREDIT
            in_flight = await pay(house, "r2")
            assert in_flight is not None and in_flight.code == "credits_in_flight"
            hold.charge = Charge(hold.ucredits, None, keep_requests=True, basis="exact")
        assert (await pay(house, "r3")) is not None
        await house.outbox.flush()
        assert (await state(house))["credits"] == 0


async def test_a_hold_that_has_ended_does_not_grow(house: House) -> None:
    await house.credits(7)
    async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
        assert isinstance(hold, Hold)
    assert await house.admission.extend(hold, CREDIT) == 0
    assert (await house.account())["h"] == 0


async def test_a_hold_that_redis_has_lost_grows_in_the_new_account(house: House) -> None:
    await house.losses.beat()
    await house.credits(20)
    async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
        assert isinstance(hold, Hold)
        await house.redis.call("FLUSHALL")

        async def grown() -> int:
            return await house.admission.extend(hold, CREDIT)

        await until(grown)
        assert (await house.account())["h"] == hold.ucredits == 2 * CREDIT


# Without Redis, or past it


async def test_while_redis_is_away_credits_are_held_in_postgres(redis_url: str, database_url: str) -> None:
    async with without_redis(redis_url, database_url) as house:
        await house.credits(20)
        assert await pay(house, "warm") is None
        await house.outbox.flush()
        away(house, True)
        async with house.admission.hold("r1", ASKER, (RPM,), PRICE) as hold:
            assert isinstance(hold, Hold)
            assert (hold.where, hold.judged_by) == ("postgres", "local")
            assert (await state(house))["held"] == CREDIT
            hold.charge = PAID
        assert (await state(house))["held"] == 0
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
        away(house, False)
        await until(lambda: shows(house, 18 * CREDIT))


async def test_what_redis_may_owe_is_not_held_in_postgres_as_well(redis_url: str, database_url: str) -> None:
    async with without_redis(redis_url, database_url, cap_floor=3, cap_percent=0) as house:
        await house.credits(5)
        async with house.admission.hold("r1", ASKER, (), PRICE) as first:
            assert isinstance(first, Hold)
            away(house, True)
            verdicts = [await pay(house, f"away{number}") for number in range(4)]
            assert [verdict and verdict.code for verdict in verdicts] == [
                None,
                None,
                "credits_in_flight",
                "credits_in_flight",
            ]
            away(house, False)


async def test_without_either_store_nothing_is_admitted_and_nothing_piles_up(redis_url: str, database_url: str) -> None:
    async with without_redis(redis_url, database_url) as house:
        await house.credits(5)
        assert await pay(house, "warm") is None
        away(house, True)
        await house.postgres.close()
        for number in range(5):
            with pytest.raises(UnknownBalance):
                await pay(house, f"r{number}")
        assert house.settling.backlog_count == 0
        await house.postgres.open()
        away(house, False)


async def test_what_is_wrong_with_a_key_is_no_reason_to_go_past_redis(house: House) -> None:
    await house.credits(5)
    await house.redis.call("SET", keys.account(ORG), "not ours")
    with pytest.raises(StoreRefused):
        await pay(house, "r1")
    await house.redis.call("DEL", keys.account(ORG))
    assert (await state(house))["held"] == 0


async def test_written_through_nothing_of_a_charge_is_in_redis(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False, write="through") as house:
        await house.credits(3)
        async with house.admission.hold("r1", ASKER, (RPM, SLOT), PRICE) as hold:
            assert isinstance(hold, Hold)
            assert (hold.where, hold.judged_by, hold.available_ucredits) == ("postgres", "redis", 2 * CREDIT)
            assert await house.redis.call("EXISTS", keys.holds(ORG), keys.outbox(ORG)) == 0
            async with house.admission.hold("r2", ASKER, (SLOT,), PRICE) as refusal:
                assert isinstance(refusal, Refusal) and refusal.code == "rate_limit_exceeded"
            hold.charge = PAID
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
        assert await house.redis.call("GET", keys.mirror(ORG)) == b"2"
        async with house.admission.hold("r3", ASKER, (SLOT,), Quote.flat(3 * CREDIT)) as refusal:
            assert isinstance(refusal, Refusal) and refusal.code == "request_exceeds_balance"
        async with house.admission.hold("r4", ASKER, (SLOT,), PRICE) as hold:
            assert isinstance(hold, Hold)  # the refusal has given its place back


async def test_leases_in_postgres_are_renewed_with_what_was_used(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False, write="through") as house:
        await house.credits(9)
        async with house.admission.hold("r1", ASKER, (), ON_DEMAND) as hold:
            assert isinstance(hold, Hold)
            before = await house.postgres.row("SELECT deadline FROM gateway.hold")
            hold.used_ucredits = 7
            await house.admission._leases.beat([hold])
            after = await house.postgres.row("SELECT deadline, used FROM gateway.hold")
            assert before is not None and after is not None
            assert after["deadline"] > before["deadline"] and after["used"] == 7


# Charges that PostgreSQL does not have yet


async def test_a_charge_is_remembered_until_postgres_has_it(house: House) -> None:
    await house.credits(5)
    await pay(house, "r1")
    assert house.settling.unconfirmed_count == 1
    await house.outbox.flush()
    assert house.settling.unconfirmed_count == 0


async def test_a_charge_that_another_gateway_carried_is_found_out(redis_url: str, database_url: str) -> None:
    async with (
        gateway(redis_url, database_url, works=False) as one,
        gateway(redis_url, database_url, works=False) as other,
    ):
        await one.credits(5)
        await pay(one, "r1")
        await one.settling._unconfirmed.ask(math.inf)
        assert one.settling.unconfirmed_count == 1  # it still waits in Redis
        other.outbox.mark(ORG)
        await other.outbox.flush()
        await pay(one, "r2")
        await one.settling._unconfirmed.ask(math.inf)
        assert [*one.settling._unconfirmed._by_org[ORG]] == ["r2"]


@pytest.mark.parametrize("way", ["emptied", "emptied and built again", "of another process", "away"])
async def test_a_charge_that_redis_may_have_lost_is_posted(redis_url: str, database_url: str, way: str) -> None:
    async with without_redis(redis_url, database_url) as house:
        await house.credits(5)
        await pay(house, "r1")
        match way:
            case "of another process":
                await house.redis.call("HSET", keys.account(ORG), "r", "gone")
            case "away":
                away(house, True)
            case _:
                await house.redis.call("FLUSHALL")
        if way == "emptied and built again":
            await house.accounts.load(ORG, "pro")
        await house.settling._unconfirmed.ask(math.inf)
        assert house.settling.unconfirmed_count == 0
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
        away(house, False)


async def test_a_charge_whose_reply_was_lost_is_remembered_as_well(redis_url: str, database_url: str) -> None:
    async with without_redis(redis_url, database_url) as house:
        await house.credits(5)
        async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold)
            hold.charge = PAID
            faulty(house).arm(1, "reply lost")
        await house.settling.work_off()
        assert (house.settling.backlog_count, house.settling.unconfirmed_count) == (0, 1)
        await house.redis.call("FLUSHALL")
        await house.settling._unconfirmed.ask(math.inf)
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)


async def test_with_too_many_charges_unconfirmed_only_what_costs_nothing_is_admitted(house: House) -> None:
    await house.credits(5)
    house.obey(unconfirmed_entries_max=2)
    for number in range(2):
        assert await pay(house, f"r{number}") is None
    with pytest.raises(UnknownBalance) as refused:
        await pay(house, "r3")
    assert (refused.value.status, refused.value.code) == (503, "credits_unavailable")
    async with house.admission.hold("free", ASKER, (RPM,), Quote.flat(0)) as hold:
        assert isinstance(hold, Hold)
    await house.outbox.flush()
    assert await pay(house, "r4") is None


async def test_a_full_outbox_is_503(house: House) -> None:
    await house.credits(5)
    house.obey(outbox_entries_max=1)
    assert await pay(house, "r1") is None
    with pytest.raises(UnknownBalance):
        await pay(house, "r2")
    await house.outbox.flush()
    assert await pay(house, "r3") is None


# What has to be known before a request goes on, and before a charge counts


class Notes:
    """A journal that says what it was told, and fails while it is told to."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int]] = []
        self.fails = False

    async def held(self, hold_id: str, org_id: str, held_ucredits: int, owed_ucredits: int) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise StoreUnavailable(detail="no space")
        self.told.append((hold_id, "held", held_ucredits))

    async def settled(self, entry: Entry) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise StoreUnavailable(detail="no space")
        self.told.append((entry.request_id, "settled", -entry.amount_ucredits))

    def confirmed(self, org_id: str, request_ids: Sequence[str]) -> None:
        self.told += [(request_id, "confirmed", 0) for request_id in request_ids]


def noting(house: House) -> Notes:
    notes = Notes()
    admission, settling = house.admission, house.settling
    for part in (admission, admission._asking, admission._leases, settling, settling._unconfirmed):
        part._powers = replace(part._powers, journal=notes)
    return notes


async def test_a_journal_is_told_of_holds_before_they_run_and_of_charges_before_they_count(house: House) -> None:
    await house.credits(5)
    notes = noting(house)
    async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
        assert notes.told == [("r1", "held", CREDIT)]
        assert isinstance(hold, Hold)
        hold.charge = PAID
    async with house.admission.hold("r2", ASKER, (), PRICE):
        pass
    await house.outbox.flush()
    assert notes.told[1:] == [
        ("r1", "settled", CREDIT),
        ("r2", "held", CREDIT),
        ("r2", "settled", 0),
        ("r1", "confirmed", 0),
    ]


async def test_a_journal_that_cannot_be_written_admits_nobody_and_keeps_no_charge_from_redis(house: House) -> None:
    await house.credits(5)
    notes = noting(house)
    async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
        assert isinstance(hold, Hold)
        hold.charge = PAID
        notes.fails = True
    assert house.settling.backlog_count == 0
    with pytest.raises(StoreUnavailable):
        await pay(house, "r2")
    account = await house.account()
    assert (account["u"], account["h"]) == (CREDIT, 0)


# After a loss


async def test_an_admission_by_a_state_that_is_lost_is_registered_before_it_goes_on(
    redis_url: str, database_url: str
) -> None:
    """Its reply comes after this process has told all that it knew."""
    async with gateway(redis_url, database_url, works=False) as house:
        await house.losses.beat()
        await house.credits(5)
        assert await pay(house, "warm") is None
        recovered = []

        async def recover(org_id: str) -> None:
            recovered.append(org_id)

        house.admission._powers = replace(house.admission._powers, recover=recover)
        house.admission._leases.expect(ORG, (await state(house))["epoch"] + 1)
        async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold)
            assert recovered == [ORG]


async def test_what_runs_is_registered_in_one_account_or_in_none(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.credits(50)
        async with AsyncExitStack() as running:
            for number in range(30):
                await running.enter_async_context(house.admission.hold(f"r{number}", ASKER, (), PRICE))
            epoch = (await state(house))["epoch"]
            await house.redis.call("FLUSHALL")
            owed, birth = await house.admission.register(ORG, epoch)
            assert (owed, (await house.account())["h"]) == (30 * CREDIT, 30 * CREDIT)
            assert birth == (await house.redis.call("HGET", keys.account(ORG), "b")).decode()


async def test_an_admission_under_way_is_waited_for(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.credits(5)
        asking = asyncio.create_task(pay(house, "r1"))
        await asyncio.sleep(0)
        answered = asyncio.create_task(house.admission.answered(ORG))
        await asyncio.wait({asking, answered}, return_when=asyncio.FIRST_COMPLETED)
        await answered
        assert not house.admission._asking._under_way
        assert await asking is None


async def test_rounds_that_lead_nowhere_end(house: House) -> None:
    await house.credits(5)

    async def nothing(*_: object) -> None:
        return None

    house.admission._asking._powers = replace(house.admission._powers, load=nothing)
    with pytest.raises(UnknownBalance, match="still MISS after 8 rounds"):
        await pay(house, "r1")
    await house.admission.drain(5)
    assert house.settling.idle

"""`write: through`, and beside it the other way: every hold and every charge is exact in either, however much at once.

Redis may do what it likes here: nothing of the money is in it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway import charge, keys
from gateway.admission import Hold
from gateway.policy.prices import Hold as HoldMode
from gateway.policy.prices import quote_of
from gateway.types import Outcome, Peek, Price, Quote, Refusal, Usage
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ASKER, ORG, House
from tests.ledger.running import CREDIT, Request, gateway, pay, state
from tests.limits.given import demand
from tests.waiting import until

WRITES = pytest.mark.parametrize("write", ["behind", "through"])
SLOT = demand("parallel", "concurrent", "concurrent", "org", ORG, 3, 30_000, 1)
MODES: list[HoldMode] = ["clamp", "incremental"]

#: A credit is a thousand tokens of output; input costs nothing.
PRICE = Price(0, 0, 1_000 * CREDIT)
TOKEN = CREDIT // 1_000
#: Two credits, should the client get all that it allows.
STREAM = Peek(body_bytes=4, stream=True, max_output_tokens=2_000)


def quote(mode: HoldMode, peek: Peek = STREAM) -> Quote:
    return quote_of(PRICE, peek, 1_024, mode)


@asynccontextmanager
async def fleet(redis_url: str, database_url: str, *writes: str, **credits: Any) -> AsyncIterator[list[House]]:
    """A gateway for each, at work. Flushed and at rest when the block ends."""
    async with AsyncExitStack() as stack:
        houses = [
            await stack.enter_async_context(gateway(redis_url, database_url, write=write, **credits))
            for write in writes
        ]
        yield houses
        for house in houses:
            await house.outbox.flush()
        await until(lambda: not any(house.settling.unconfirmed_count for house in houses))
        await books_are_right(houses[0].postgres)
        assert (await state(houses[0]))["held"] == 0
        account = await houses[0].account()
        assert (account.get("u", 0), account.get("h", 0)) == (0, 0)


async def charged(house: House) -> dict[str, int]:
    """By request; each at most once."""
    entries = [(rid, -amount) for rid, kind, amount in await house.ledger() if kind == "settle"]
    assert len(dict(entries)) == len(entries)
    return dict(entries)


async def in_postgres(house: House) -> int:
    """Micro-credits."""
    now = await state(house)
    return now["credits"] * CREDIT + now["micro"]


# Exactly what there is


async def test_twenty_credits_admit_exactly_twenty_of_two_hundred_over_two_gateways(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, "through", "through") as houses:
        await houses[0].credits(20)
        verdicts = await asyncio.gather(*(pay(houses[number % 2], f"r{number}") for number in range(200)))
        assert verdicts.count("paid") == 20
        assert set(verdicts) <= {"paid", "insufficient_credits", "credits_in_flight"}
        assert len(await charged(houses[0])) == 20
        assert await in_postgres(houses[0]) == 0
        assert await pay(houses[1], "more") == "insufficient_credits"
        assert await houses[0].redis.call("EXISTS", keys.outbox(ORG), keys.holds(ORG)) == 0

        async def shown() -> bool:
            return bool(await houses[0].redis.call("GET", keys.mirror(ORG)) == b"0")

        await until(shown)


async def test_gateways_that_write_in_different_ways_spend_one_balance(redis_url: str, database_url: str) -> None:
    """As in a rollout: what Redis may owe for the one is not there for the other."""
    async with fleet(redis_url, database_url, "behind", "through", cap_floor=3, cap_percent=0) as houses:
        await houses[0].credits(20)
        verdicts = await asyncio.gather(*(pay(houses[number % 2], f"r{number}") for number in range(200)))
        assert verdicts.count("paid") <= 20
        names = iter(range(1_000))

        async def spent() -> bool:
            await pay(houses[0], f"rest{next(names)}")
            return await in_postgres(houses[0]) == 0

        await until(spent)
        assert sum((await charged(houses[0])).values()) == 20 * CREDIT


@pytest.mark.parametrize("is_lost", [False, True])
async def test_what_redis_could_owe_before_is_spent_to_the_last_credit(
    redis_url: str, database_url: str, is_lost: bool
) -> None:
    """Its cap was half of the balance, when charges were written behind; requests with limits keep the org in use."""
    async with fleet(redis_url, database_url, "behind") as (before,):
        await before.credits(20)
        assert await pay(before, "first") == "paid"
        assert (await state(before))["cap"] == 10 * CREDIT
        if is_lost:
            await before.redis.call("FLUSHALL")
    async with fleet(redis_url, database_url, "through") as (house,):
        names = iter(range(1_000))

        async def spent() -> bool:
            async with house.admission.hold(f"free{next(names)}", ASKER, (SLOT,), Quote.flat(0)) as hold:
                assert isinstance(hold, Hold)
            await pay(house, f"r{next(names)}")
            return await in_postgres(house) == 0

        await until(spent)
        assert (await state(house))["cap"] == 0
        assert sum((await charged(house)).values()) == 20 * CREDIT


async def test_nothing_that_happens_to_redis_changes_what_is_charged(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, "through", "through") as houses:
        await houses[0].credits(20)
        paying = [asyncio.create_task(pay(houses[number % 2], f"r{number}")) for number in range(60)]
        for _ in range(10):
            await houses[0].redis.call("FLUSHALL")
            await asyncio.sleep(0.002)  # the pace of the load
        assert [await one for one in paying].count("paid") == 20
        assert sum((await charged(houses[0])).values()) == 20 * CREDIT


async def test_one_request_that_is_asked_for_twice_holds_and_is_charged_once(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, "through") as (house,):
        await house.credits(5)
        both = [Request(house, "r1", 2 * CREDIT) for _ in range(2)]
        assert await asyncio.gather(*(request.begin() for request in both)) == [True, True]
        assert (await state(house))["held"] == 2 * CREDIT
        house.admission._open.clear()
        for request in both:
            assert request.hold is not None
            request.hold.charge = charge.settle(Outcome.COMPLETE, None, Quote.flat(2 * CREDIT), 0, 2 * CREDIT)
        await house.settling.end(*(request.hold for request in both if request.hold))
        assert await charged(house) == {"r1": 2 * CREDIT}


async def test_a_hold_of_a_dead_gateway_is_charged_its_checkpoint_and_a_late_settle_the_difference(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, "through", "through") as (dead, other):
        await dead.credits(5)
        holding = dead.admission.hold("r1", ASKER, (), quote("clamp"))
        hold = await holding.__aenter__()
        assert isinstance(hold, Hold)
        hold.used_ucredits = 700 * TOKEN
        await dead.admission._leases.beat([hold])
        await dead.postgres.rows("UPDATE gateway.hold SET deadline = now() - interval '1 s'")
        await until(lambda: other.sweeper.swept_count + dead.sweeper.swept_count)
        assert ("r1", "orphan", -700 * TOKEN) in await other.ledger()
        assert (await state(other))["held"] == 0
        hold.charge = charge.settle(Outcome.COMPLETE, Usage(0, 1_200), hold.quote, 0, hold.ucredits)
        await holding.__aexit__(None, None, None)
        assert await charged(other) == {"r1": 500 * TOKEN}
        assert await in_postgres(other) == 5 * CREDIT - 1_200 * TOKEN


# What is held


@WRITES
async def test_what_is_held_where_there_is_less_than_the_estimate(
    redis_url: str, database_url: str, write: str
) -> None:
    async with fleet(redis_url, database_url, write) as (house,):
        await house.credits(1)
        async with house.admission.hold("full", ASKER, (), quote("full")) as refused:
            assert isinstance(refused, Refusal)
            assert (refused.code, refused.status) == ("request_exceeds_balance", 402)
        left = CREDIT
        for mode, held in zip(MODES, (CREDIT, 512 * TOKEN), strict=True):
            async with house.admission.hold(mode, ASKER, (), quote(mode)) as hold:
                assert isinstance(hold, Hold)
                assert (hold.ucredits, hold.available_ucredits) == (held, left - held)
                hold.charge = charge.settle(Outcome.COMPLETE, Usage(0, 100), hold.quote, 0, hold.ucredits)
            left -= 100 * TOKEN
        await house.outbox.flush()
        assert await in_postgres(house) == left


@WRITES
async def test_a_hold_in_full_waits_for_what_others_hold(redis_url: str, database_url: str, write: str) -> None:
    async with fleet(redis_url, database_url, write) as (house,):
        await house.credits(3)
        async with house.admission.hold("r1", ASKER, (), quote("full")) as first:
            assert isinstance(first, Hold)
            async with house.admission.hold("r2", ASKER, (), quote("full")) as second:
                assert isinstance(second, Refusal) and (second.code, second.status) == ("credits_in_flight", 429)
            async with house.admission.hold("r3", ASKER, (), quote("clamp")) as third:
                assert isinstance(third, Hold) and third.ucredits == CREDIT
        async with house.admission.hold("r4", ASKER, (), quote("full")) as again:
            assert isinstance(again, Hold) and again.ucredits == 2 * CREDIT


@WRITES
async def test_streams_that_grow_at_once_hold_what_there_is_and_not_more(
    redis_url: str, database_url: str, write: str
) -> None:
    """Each takes as much as it can get, in steps, over two gateways."""
    async with fleet(redis_url, database_url, write, write, cap_floor=1, cap_percent=0) as houses:
        await houses[0].credits(10)
        together, most = 0, 0

        async def stream(number: int) -> int:
            nonlocal together, most
            house = houses[number % 2]
            async with house.admission.hold(f"r{number}", ASKER, (), quote(MODES[number % 4 // 2])) as hold:
                if isinstance(hold, Refusal):
                    assert hold.code in ("credits_in_flight", "insufficient_credits", "request_exceeds_balance")
                    return 0
                together += hold.ucredits
                most = max(most, together)
                while granted := await house.admission.extend(hold, hold.quote.step_ucredits):
                    together += granted
                    most = max(most, together)
                hold.used_ucredits = hold.ucredits
                hold.charge = charge.settle(
                    Outcome.OUT_OF_CREDITS, Usage(0, hold.ucredits // TOKEN, exact=False), hold.quote, 0, hold.ucredits
                )
                together -= hold.ucredits
                return hold.charge.ucredits

        spent = sum(await asyncio.gather(*(stream(number) for number in range(20))))
        for house in houses:
            await house.outbox.flush()
        await until(lambda: not any(house.settling.unconfirmed_count for house in houses))
        assert 0 < most <= 10 * CREDIT
        assert sum((await charged(houses[0])).values()) == spent <= 10 * CREDIT
        assert await in_postgres(houses[0]) == 10 * CREDIT - spent


async def test_a_hold_grows_as_far_as_there_is_something_where_redis_has_no_cap(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, "behind", on_state_loss="optimistic") as (house,):
        await house.credits(7)
        async with house.admission.hold("r1", ASKER, (), quote("clamp")) as hold:
            assert isinstance(hold, Hold) and hold.ucredits == 2 * CREDIT
            assert await pay(house, "r2", 2 * CREDIT) == "paid"
            assert [await house.admission.extend(hold, 2 * CREDIT) for _ in range(3)] == [2 * CREDIT, CREDIT, 0]


# More than was held


@WRITES
async def test_what_was_used_beyond_the_hold_is_owed_and_paid_back_first(
    redis_url: str, database_url: str, write: str
) -> None:
    async with fleet(redis_url, database_url, write) as (house,):
        await house.credits(1)
        async with house.admission.hold("r1", ASKER, (), quote("clamp")) as hold:
            assert isinstance(hold, Hold) and hold.ucredits == CREDIT
            hold.charge = charge.settle(Outcome.COMPLETE, Usage(0, 1_600), hold.quote, 0, hold.ucredits)
        assert await pay(house, "r2", TOKEN) == "insufficient_credits"
        await house.outbox.flush()
        assert await in_postgres(house) == -600 * TOKEN
        await house.credits(1, grant_id="grant:second")
        names = iter(range(1_000))

        async def paid() -> bool:
            return await pay(house, f"r3.{next(names)}", 400 * TOKEN) == "paid"

        await until(paid)
        assert await pay(house, "r4", TOKEN) == "insufficient_credits"


@WRITES
async def test_what_was_used_beyond_the_hold_may_be_forgiven(redis_url: str, database_url: str, write: str) -> None:
    async with fleet(redis_url, database_url, write) as (house,):
        await house.credits(1)
        async with house.admission.hold("r1", ASKER, (), quote("clamp")) as hold:
            assert isinstance(hold, Hold)
            hold.charge = charge.settle(Outcome.COMPLETE, Usage(0, 1_600), hold.quote, 0, hold.ucredits, "absorb")
        await house.outbox.flush()
        assert (await charged(house), await in_postgres(house)) == ({"r1": CREDIT}, 0)


@WRITES
async def test_what_many_use_beyond_their_holds_at_once_is_all_owed(
    redis_url: str, database_url: str, write: str
) -> None:
    async with fleet(redis_url, database_url, write, write) as houses:
        await houses[0].credits(10)

        async def overruns(number: int) -> int:
            request = Request(houses[number % 2], f"r{number}")
            if not await request.begin():
                return 0
            await request.end(3 * CREDIT)
            return 3 * CREDIT

        owed = sum(await asyncio.gather(*(overruns(number) for number in range(40))))
        for house in houses:
            await house.outbox.flush()
        await until(lambda: not any(house.settling.unconfirmed_count for house in houses))
        # Never beyond what was held by the over-run of those that were admitted.
        assert sum((await charged(houses[0])).values()) == owed <= 30 * CREDIT
        assert await in_postgres(houses[0]) == 10 * CREDIT - owed < 0

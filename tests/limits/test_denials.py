"""What this process remembers of denials: nobody is refused who would fit, and the server is left in peace."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from gateway.admission import Admission, Hold, Rules, denials
from gateway.types import Charge, Demand, Limit, Quote, Refusal
from tests.ledger.faulty import FaultyRedis
from tests.limits.conftest import CREDIT, demand, gcra, session
from tests.limits.rooms import (
    ASKER,
    EVERYBODY,
    HOUR_MS,
    KEPT,
    PARALLEL,
    RPH,
    TPH,
    ask,
    calls,
    connected,
    desk,
    numbers,
    refused,
    rules,
    spend,
    used,
)

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
TTL_MS = 1_000


class Clock:
    """In place of `time` where denials are remembered: the monotonic one stands still."""

    time, time_ns = staticmethod(time.time), staticmethod(time.time_ns)

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(denials, "time", clock)
    monkeypatch.setattr("gateway.admission.desk.time", clock)
    return clock


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[FaultyRedis]:
    async with connected(redis_url) as redis:
        yield redis


@pytest.fixture
def remembering(redis: FaultyRedis, clock: Clock) -> Admission:
    return desk(redis, rules(TTL_MS))


@BOTH_STORES
async def test_a_denial_is_told_again_without_asking_the_server(
    remembering: Admission, redis: FaultyRedis, clock: Clock
) -> None:
    await spend(remembering, RPH)
    first = await refused(remembering, "r1", RPH)
    asked = await calls(redis)
    for number in range(5):
        clock.now_s += 0.1
        again = await refused(remembering, f"again{number}", RPH)
        assert again.retry_after_ms is not None and first.retry_after_ms is not None
        assert 0 <= first.retry_after_ms - again.retry_after_ms - 100 * (number + 1) <= 1
        assert (again.code, again.details["limit"], again.limits[0].used) == (first.code, "rph", 3)
    assert await calls(redis) == asked


async def test_what_is_remembered_is_forgotten_in_time(
    remembering: Admission, redis: FaultyRedis, clock: Clock
) -> None:
    await spend(remembering, RPH)
    await refused(remembering, "r1", RPH)
    clock.now_s += TTL_MS / 1000 - 0.001
    asked = await calls(redis)
    await refused(remembering, "r2", RPH)
    assert await calls(redis) == asked
    clock.now_s += 0.001
    await refused(remembering, "r3", RPH)
    assert await calls(redis) == asked + 1


async def test_a_denial_is_never_remembered_for_longer_than_it_lasts(
    remembering: Admission, redis: FaultyRedis, clock: Clock
) -> None:
    """A bucket that leaks one in 500 ms: the server is asked again then, whatever the memory's bound."""
    quick = gcra(1, 500, 1)
    while isinstance(await ask(remembering, f"r{next(numbers)}", quick), Hold):
        pass
    asked = await calls(redis)
    clock.now_s += 0.5
    await ask(remembering, "later", quick)
    assert await calls(redis) > asked


@pytest.mark.parametrize("charge", [None, replace(KEPT, keep_requests=False)], ids=["never reached", "released"])
async def test_a_release_in_this_process_lets_the_next_one_in(remembering: Admission, charge: Charge | None) -> None:
    async with remembering.hold("r1", ASKER, (RPH,), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        await spend(remembering, RPH)
        await refused(remembering, "r2", RPH)
        held.charge = charge
    assert isinstance(await ask(remembering, "r3", RPH), Hold)


async def test_a_denial_that_is_judged_before_a_release_and_noted_during_it_is_forgotten(
    remembering: Admission, redis: FaultyRedis
) -> None:
    async with AsyncExitStack() as running:
        await running.enter_async_context(remembering.hold("r1", ASKER, (RPH,), Quote.flat(0)))
        await spend(remembering, RPH)
        late = asyncio.create_task(ask(remembering, "r2", RPH))
        await asyncio.sleep(0)  # it has been sent, in front of the settle
    assert isinstance(await late, Refusal)
    assert isinstance(await ask(remembering, "r3", RPH), Hold)


async def test_a_request_that_ends_as_it_should_changes_nothing_of_what_is_remembered(
    remembering: Admission, redis: FaultyRedis
) -> None:
    async with remembering.hold("r1", ASKER, (RPH,), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        await spend(remembering, RPH)
        await refused(remembering, "r2", RPH)
        held.charge = KEPT
    asked = await calls(redis)
    await refused(remembering, "r3", RPH)
    assert await calls(redis) == asked


@pytest.mark.parametrize(
    ("less", "more"),
    [(RPH, demand(4, HOUR_MS, name="rph")), (gcra(3, HOUR_MS, 3), gcra(3, HOUR_MS, 4))],
    ids=["limit", "burst"],
)
async def test_an_org_whose_limit_was_raised_is_asked_for_at_once(
    remembering: Admission, redis: FaultyRedis, less: Demand, more: Demand
) -> None:
    await spend(remembering, less)
    await refused(remembering, "r1", less)
    asked = await calls(redis)
    assert isinstance(await ask(remembering, "r2", more), Hold)
    assert await calls(redis) == asked + 2


async def test_an_org_whose_rate_was_raised_is_told_the_shorter_wait(remembering: Admission) -> None:
    less, more = gcra(3, HOUR_MS, 3), gcra(30, HOUR_MS, 3)
    await spend(remembering, less)
    first, second = await refused(remembering, "r1", less), await refused(remembering, "r2", more)
    assert first.retry_after_ms is not None and second.retry_after_ms is not None
    assert second.retry_after_ms <= first.retry_after_ms / 9


async def test_limits_that_are_given_back_to_all_the_time_are_never_remembered(
    remembering: Admission, redis: FaultyRedis
) -> None:
    async with AsyncExitStack() as running:
        for number in range(2):
            await running.enter_async_context(remembering.hold(f"r{number}", ASKER, (TPH, PARALLEL), Quote.flat(0)))
        for wanted in (TPH, PARALLEL):
            asked = await calls(redis)
            for number in range(3):
                await refused(remembering, f"{wanted.limit.name}{number}", wanted)
            assert await calls(redis) == asked + 3
            assert remembering.denials_count == 0


async def test_what_else_did_not_fit_is_told_again_too_so_nobody_is_sent_back_too_early(
    remembering: Admission, redis: FaultyRedis, clock: Clock
) -> None:
    """Tokens keep an hour, requests half a second: who is told half a second would be refused once more."""
    quick = gcra(2, 1_000, 1, name="rps")
    async with remembering.hold("tokens", ASKER, (TPH,), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        held.charge = KEPT
        await spend(remembering, TPH)
        while True:
            await ask(remembering, f"quick{next(numbers)}", quick)
            first = await refused(remembering, f"r{next(numbers)}", TPH, quick)
            if first.details["violated_policies"] == ["tph", "rps"]:
                break
        again = await refused(remembering, "again", TPH, quick)
        assert again.details["violated_policies"] == ["tph", "rps"]
        assert again.retry_after_ms == first.retry_after_ms
        # Alone, what the tokens said then refuses nobody: they may have been given back.
        asked = await calls(redis)
        await refused(remembering, "tokens alone", TPH)
        assert await calls(redis) == asked + 1
    # And now they have been, as far as anybody here can tell.
    assert (await refused(remembering, "later", TPH, quick)).details["violated_policies"] == ["rps"]


async def test_a_session_that_may_not_begin_keeps_no_other_from_going_on(remembering: Admission) -> None:
    known, new = session(1, HOUR_MS, "known"), session(1, HOUR_MS, "new")
    assert isinstance(await ask(remembering, "r1", known), Hold)
    await refused(remembering, "r2", new)
    await refused(remembering, "r3", new)
    assert remembering.denials_count == 1
    assert isinstance(await ask(remembering, "r4", known), Hold)


async def test_a_smaller_cost_is_judged_anew_and_a_larger_one_is_not(
    remembering: Admission, redis: FaultyRedis
) -> None:
    def of(cost: int) -> Demand:
        return Demand(Limit("r", "gcra", "requests", "org", 1, HOUR_MS, 10), "", cost)

    assert isinstance(await ask(remembering, "r1", of(6)), Hold)
    await refused(remembering, "r2", of(5))
    asked = await calls(redis)
    await refused(remembering, "r3", of(6))
    assert await calls(redis) == asked
    assert isinstance(await ask(remembering, "r4", of(4)), Hold)


async def test_a_shadow_is_never_refused_by_what_is_remembered(remembering: Admission) -> None:
    shadow = replace(RPH, limit=replace(RPH.limit, shadow=True))
    await spend(remembering, RPH)
    await refused(remembering, "r1", RPH)
    assert isinstance(await ask(remembering, "r2", shadow), Hold)


async def test_a_shadow_that_does_not_fit_is_never_remembered(remembering: Admission, redis: FaultyRedis) -> None:
    shadow = replace(RPH, limit=replace(RPH.limit, shadow=True))
    await spend(remembering, RPH)
    other = demand(1, HOUR_MS, name="other")
    assert isinstance(await ask(remembering, "r1", other, shadow), Hold)
    await refused(remembering, "r2", other, shadow)
    assert remembering.denials_count == 1


async def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first(
    redis: FaultyRedis, clock: Clock
) -> None:
    admission = desk(redis, rules(TTL_MS, 3))
    demands = [replace(demand(1, HOUR_MS, name="each"), subject=f"s{number}") for number in range(5)]
    for number, wanted in enumerate(demands):
        await ask(admission, f"a{number}", wanted)
        await refused(admission, f"b{number}", wanted)
        asked = await calls(redis)
        await refused(admission, f"c{number}", demands[0])  # the first is in use all the time
        assert await calls(redis) == asked
        assert admission.denials_count <= 3
    asked = await calls(redis)
    await refused(admission, "d0", demands[0])
    await refused(admission, "d4", demands[4])
    assert await calls(redis) == asked
    await refused(admission, "d1", demands[1])
    assert await calls(redis) == asked + 1


@pytest.mark.parametrize("off", [rules(0, 100), rules(TTL_MS, 0)], ids=["no time", "no entries"])
async def test_a_memory_that_is_turned_off_remembers_nothing(redis: FaultyRedis, off: Rules) -> None:
    admission = desk(redis, off)
    await spend(admission, RPH)
    asked = await calls(redis)
    for number in range(3):
        await refused(admission, f"r{number}", RPH)
    assert (await calls(redis), admission.denials_count) == (asked + 3, 0)


async def test_who_is_refused_from_memory_takes_nothing_of_anything_else(
    remembering: Admission, redis: FaultyRedis
) -> None:
    await spend(remembering, RPH)
    await refused(remembering, "r1", EVERYBODY, RPH, TPH)
    asked = await calls(redis)
    await refused(remembering, "r2", EVERYBODY, RPH, TPH, price=CREDIT)
    assert await calls(redis) == asked
    assert await used(redis, EVERYBODY, TPH) == [0, 0]

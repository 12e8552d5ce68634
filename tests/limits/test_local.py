"""Limits that a gateway counts by itself while Redis is away: its share of four fifths, counted as Redis would."""

import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Admission, Hold, Rules, Settling, account_keys, counter_keys
from gateway.admission.local import LocalLimits
from gateway.errors import StoreUnavailable
from gateway.types import Calendar, Charge, Demand, Principal, Quote, Refusal, Usage
from tests.ledger.faulty import FaultyRedis
from tests.limits.conftest import LEASE_MS, START_MS, calendar, demand, gcra
from tests.limits.every import EVERY, WINDOW_MS, as_shadow
from tests.limits.rooms import ASKER, EVERYBODY, KEPT, connected, ledgerless, rules

COUNTED = [name for name in EVERY if name != "sessions"]
FREE = Quote.flat(0)

numbers = itertools.count()


class Process(LocalLimits):
    """What one gateway counts, on a clock that the test sets."""

    def __init__(self, instances: int = 1, counters_max: int = 1_000) -> None:
        super().__init__(lambda: self.instances, counters_max)
        self.instances = instances
        self.clock_ms = START_MS

    def _now_ms(self) -> int:
        self._last_ms = max(self._last_ms, self.clock_ms)
        return self._last_ms

    def asks(self, *demands: Demand, org_id: str = "acme") -> Hold | Refusal:
        hold = Hold(f"r{next(numbers)}", Principal(org_id, "pro", None, None, "api_key"), demands, FREE)
        hold.keys, hold.counters = account_keys(hold), counter_keys(hold.owner, hold.demands)
        return self.take(hold) or hold

    def runs(self, *demands: Demand, org_id: str = "acme") -> Hold:
        hold = self.asks(*demands, org_id=org_id)
        assert isinstance(hold, Hold), hold
        return hold

    def ends(self, hold: Hold, charge: Charge | None = KEPT) -> None:
        hold.charge = charge
        self.settle(hold)

    def admits(self, wanted: Demand) -> int:
        """How many at once."""
        return sum(isinstance(self.asks(wanted), Hold) for _ in range(2 * wanted.limit.capacity))


def refused(answer: Hold | Refusal) -> Refusal:
    assert isinstance(answer, Refusal)
    return answer


# The share


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("instances", [1, 2, 7])
def test_each_of_so_many_gateways_gives_away_its_part_of_four_fifths(name: str, instances: int) -> None:
    wanted = EVERY[name]
    share = math.ceil(0.8 * wanted.limit.limit / instances)
    assert Process(instances).admits(wanted) == max(1, share // wanted.cost)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 30))
def test_all_of_them_together_give_away_no_more_than_four_fifths_and_one_each(limit: int, instances: int) -> None:
    given_away = instances * Process(instances).admits(demand(limit, WINDOW_MS))
    assert 0.8 * limit <= given_away < 0.8 * limit + instances


def test_a_burst_is_shared_like_a_rate() -> None:
    process = Process(2)
    wanted = gcra(10, 1_000, 20)
    assert process.admits(wanted) == 8
    process.clock_ms += 1_000
    assert process.admits(wanted) == 4


def test_who_comes_or_leaves_changes_the_share_and_not_what_was_counted() -> None:
    process, wanted = Process(1), demand(10, WINDOW_MS)
    for _ in range(4):
        process.runs(wanted)
    process.instances = 2
    assert refused(process.asks(wanted)).details["max"] == 4
    process.instances = 1
    assert process.admits(wanted) == 4


def test_what_fits_the_whole_limit_fits_an_unused_share() -> None:
    large = demand(1_000, WINDOW_MS, 900, unit="tokens")
    process = Process(4)
    process.runs(large)
    assert refused(process.asks(large)).retry_after_ms


# Judged as Redis would


@pytest.mark.parametrize("name", COUNTED)
def test_a_refusal_is_honest_about_when_it_would_fit(name: str) -> None:
    process, wanted = Process(), EVERY[name]
    running = [one for one in (process.asks(wanted) for _ in range(10)) if isinstance(one, Hold)]
    told_ms = refused(process.asks(wanted)).retry_after_ms
    assert told_ms is not None
    if name == "concurrent":
        process.ends(running[0])  # nobody can know when
    else:
        process.clock_ms += told_ms - 1
        refused(process.asks(wanted))
        process.clock_ms += 1
    process.runs(wanted)


@pytest.mark.parametrize("name", COUNTED)
def test_all_is_taken_or_nothing(name: str) -> None:
    process, wanted = Process(), EVERY[name]
    full = demand(1, WINDOW_MS, name="full")
    process.runs(full)
    for _ in range(10):
        assert refused(process.asks(wanted, full)).details["violated_policies"] == ["full"]
    assert process.runs(wanted).states[0].used == 0


@pytest.mark.parametrize("name", COUNTED)
def test_what_was_not_used_is_there_again(name: str) -> None:
    process, wanted = Process(), EVERY[name]
    for _ in range(10):
        process.ends(process.runs(wanted), None)
    assert process.runs(wanted).states[0].used == 0


@pytest.mark.parametrize(("used", "after"), [(100, 100), (400, 400), (900, 900)])
def test_tokens_are_corrected_to_what_was_used(used: int, after: int) -> None:
    process, wanted = Process(), demand(1_000, WINDOW_MS, 400, unit="tokens")
    process.ends(process.runs(wanted), Charge(0, Usage(used, 0), keep_requests=True, basis="exact"))
    state = process.asks(replace(wanted, cost=1))
    judged = state.limits if isinstance(state, Refusal) else state.states
    assert judged[0].used == after


def test_a_shadow_refuses_nobody_and_counts_as_it_would_if_it_refused() -> None:
    process, wanted = Process(), as_shadow(demand(5, WINDOW_MS))
    states = [process.runs(wanted).states[0] for _ in range(8)]
    assert [state.used for state in states] == [0, 1, 2, 3, 4, 4, 4, 4]
    assert [state.retry_ms > 0 for state in states] == [False] * 4 + [True] * 4


def test_nobody_is_refused_for_a_new_session() -> None:
    """Which sessions are new only Redis knows."""
    process, wanted = Process(), EVERY["sessions"]
    assert process.admits(wanted) == 6
    assert process.runs(wanted).states[0].used == 0


def test_a_request_keeps_its_place_for_longer_than_a_lease() -> None:
    process, wanted = Process(), demand(1, 0, unit="concurrent")
    running = process.runs(wanted)
    process.clock_ms += 10 * LEASE_MS
    refused(process.asks(wanted))
    process.ends(running)
    process.runs(wanted)


def test_a_clock_that_steps_back_refills_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_ns = START_MS * 1_000_000
    monkeypatch.setattr("gateway.admission.local.time.time_ns", lambda: clock_ns)
    process, wanted = Process(), calendar(5, Calendar("day"))
    process._now_ms = lambda: LocalLimits._now_ms(process)  # type: ignore[method-assign]
    day_ns = 86_400_000 * 1_000_000
    assert process.admits(wanted) == 4
    clock_ns -= day_ns
    assert process.admits(wanted) == 0
    clock_ns += 2 * day_ns
    assert process.admits(wanted) == 4


@pytest.mark.parametrize("period", ["hour", "day", "week", "month"])
def test_a_quota_begins_anew_with_its_period(period: str) -> None:
    process, wanted = Process(), calendar(5, Calendar(period))
    assert process.admits(wanted) == 4
    retry_ms = refused(process.asks(wanted)).retry_after_ms
    assert retry_ms is not None
    process.clock_ms += retry_ms
    assert process.admits(wanted) == 4


# Memory


def test_no_more_counters_than_its_bound_and_who_was_asked_for_longest_ago_is_forgotten() -> None:
    process, wanted = Process(counters_max=3), demand(5, WINDOW_MS)
    for org_id in ("one", "two", "three"):
        assert [process.runs(wanted, org_id=org_id) for _ in range(4)]
    refused(process.asks(wanted, org_id="one"))
    process.runs(wanted, org_id="four")
    assert len(process) == 3
    refused(process.asks(wanted, org_id="one"))
    assert process.runs(wanted, org_id="two").states[0].used == 0
    for number in range(1_000):
        process.runs(wanted, demand(5, WINDOW_MS, name="other"), org_id=f"org{number}")
    assert len(process) == 3


def test_one_org_with_more_counters_than_the_bound_forgets_its_own() -> None:
    process = Process(counters_max=3)
    for number in range(10):
        process.runs(replace(demand(5, WINDOW_MS), subject=f"user{number}"))
    assert len(process) == 3


def test_once_redis_answers_nothing_is_left_of_what_was_counted() -> None:
    process, slot = Process(), demand(1, 0, unit="concurrent")
    running = process.runs(slot)
    process.runs(slot, org_id="other")
    process.drop("acme")
    assert len(process) == 1
    process.runs(slot)
    process.ends(running)
    refused(process.asks(slot))
    process.drop("acme")
    process.drop("acme")
    assert len(process) == 1


def test_ends_of_requests_that_ran_leave_nothing_behind() -> None:
    process = Process()
    for _ in range(20):
        process.ends(process.runs(*(EVERY[name] for name in COUNTED)), None)
    assert process._taken == {}


# In the admission of a gateway


RPH = demand(5, 3_600_000, name="rph")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[FaultyRedis]:
    async with connected(redis_url) as redis:
        yield redis


def desk(redis: FaultyRedis, instances: int = 1, **changes: object) -> Admission:
    rules_: Rules = replace(rules(), **{"counts_locally": True, **changes})  # type: ignore[arg-type]
    powers = replace(ledgerless(redis), instances=lambda: instances)
    return Admission(redis, rules_, Settling(redis, rules_, powers), powers)


async def ask(admission: Admission, *demands: Demand) -> Hold | Refusal:
    async with admission.hold(f"r{next(numbers)}", ASKER, demands, FREE) as held:
        if isinstance(held, Hold):
            held.charge = KEPT
        return held


async def test_requests_are_judged_here_while_redis_is_away_and_there_as_soon_as_it_is_back(redis: FaultyRedis) -> None:
    admission = desk(redis)
    before = await ask(admission, RPH)
    redis.away = True
    held = [await ask(admission, RPH) for _ in range(6)]
    assert [isinstance(one, Hold) for one in held] == [True] * 4 + [False] * 2
    assert {one.judged_by for one in held if isinstance(one, Hold)} == {"local"}
    assert refused(held[5]).code == "rate_limit_exceeded"
    assert len(admission._local) == 1
    redis.away = False
    after = await ask(admission, RPH)
    assert isinstance(before, Hold) and isinstance(after, Hold)
    # What was admitted here is not counted there.
    assert (before.judged_by, after.judged_by, after.states[0].used) == ("redis", "redis", 1)
    assert len(admission._local) == admission.settling.backlog_count == admission.open_count == 0


@pytest.mark.parametrize("instances", [2, 3])
async def test_gateways_without_redis_share_what_there_is(redis: FaultyRedis, instances: int) -> None:
    redis.away = True
    fleet = [desk(redis, instances) for _ in range(instances)]
    wanted = demand(100, 3_600_000, name="rph")
    held = [await ask(fleet[number % instances], wanted) for number in range(200)]
    assert sum(isinstance(one, Hold) for one in held) == instances * math.ceil(80 / instances)


async def test_what_belongs_to_no_org_is_shared_as_well(redis: FaultyRedis) -> None:
    admission = desk(redis, 3)
    redis.away = True
    held = [await ask(admission, EVERYBODY, RPH) for _ in range(3)]
    assert [isinstance(one, Hold) for one in held] == [True, False, False]
    assert refused(held[2]).details["limit"] == "everybody"
    # Nothing of the org's own was taken by those that were refused.
    assert [isinstance(one, Hold) for one in [await ask(admission, RPH) for _ in range(2)]] == [True, False]


async def test_where_nobody_counts_here_nothing_is_admitted_without_redis(redis: FaultyRedis) -> None:
    admission = desk(redis, counts_locally=False)
    redis.away = True
    with pytest.raises(StoreUnavailable):
        await ask(admission, RPH)
    assert admission.settling.backlog_count == len(admission._local) == 0


async def test_a_request_that_has_ended_leaves_its_place_to_the_next(redis: FaultyRedis) -> None:
    admission, slot = desk(redis), demand(1, 0, unit="concurrent", name="parallel")
    redis.away = True
    for _ in range(3):
        async with admission.hold(f"r{next(numbers)}", ASKER, (slot,), FREE) as held:
            assert isinstance(held, Hold)
            refused(await ask(admission, slot))


@pytest.mark.parametrize("fault", ["reply lost", "arrives late"])
async def test_who_may_have_been_admitted_there_is_not_admitted_here_as_well(redis: FaultyRedis, fault: str) -> None:
    admission = desk(redis)
    assert isinstance(await ask(admission, RPH), Hold)
    redis.arm(1, fault)
    with pytest.raises(StoreUnavailable):
        await ask(admission, RPH)
    assert (admission.settling.backlog_count, len(admission._local)) == (1, 0)
    await admission.settling.work_off()
    await redis.let_late_ones_arrive()
    held = await ask(admission, RPH)
    assert isinstance(held, Hold) and held.states[0].used == 1


async def test_a_request_that_began_in_redis_ends_there_though_redis_was_away(redis: FaultyRedis) -> None:
    """And one that began here ends here, though Redis is back."""
    admission, slot = desk(redis), demand(2, 0, unit="concurrent", name="parallel")
    there = admission.hold("there", ASKER, (slot,), FREE)
    assert isinstance(await there.__aenter__(), Hold)
    redis.away = True
    here = admission.hold("here", ASKER, (slot,), FREE)
    assert isinstance(await here.__aenter__(), Hold)
    await there.__aexit__(None, None, None)
    assert admission.settling.backlog_count == 1
    redis.away = False
    await admission.settling.work_off()
    await here.__aexit__(None, None, None)
    held = await ask(admission, slot)
    assert isinstance(held, Hold) and held.states[0].used == 0
    assert admission.settling.backlog_count == 0

"""`retry_ms` is honest: refused before it is over, admitted when it is; and more limit never means more refusals.

Requests in flight are left out: when one ends nobody knows, so a second is what everybody is told.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import keys, limits
from gateway.types import Calendar, Demand, Limit
from tests.limits.conftest import START_MS, Limiter, calendar, demand, gcra, session
from tests.limits.test_histories import HERE

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
WAITS_MS = (0, 0, 1, 16, 17, 18, 140, 999, 1_000, 6_000, 59_999, 60_000, 3_600_000)
KINDS = ("log", "buckets", "costly", "sessions", "gcra", "calendar")


def a_demand(kind: str, number: int, draw: random.Random, most: int) -> Demand:
    """A demand on a limit of that kind, one of several: the limit depends on `number` and `most` alone."""
    window_ms = (1_000, 7_000, 60_000)[number % 3]
    name = f"{kind}{number}"
    match kind:
        case "log":
            return demand(most, window_ms, name=name)
        case "buckets":
            return demand(most * 10, window_ms, draw.randint(1, 10), unit="tokens", name=name)
        case "costly":
            return demand(most * 100, window_ms, draw.randint(60, 100), unit="output_tokens", name=name)
        case "sessions":
            return session(most, window_ms, f"s{draw.randrange(8)}", name=name)
        case "gcra":
            return gcra(3 * most, window_ms, most, draw.randint(1, most), name=name)
        case _:
            rule = Calendar(("hour", "day", "month")[number % 3], "Asia/Kathmandu", 45)
            return calendar(5 * most, rule, draw.randint(1, 5), name=name)


mixtures = st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)


@BOTH_STORES
def test_of_any_mixture_who_waits_as_told_is_admitted_and_not_a_millisecond_earlier(
    limiter: Limiter, full: bool
) -> None:
    refused = 0

    @settings(HERE, max_examples=500 if full else 40)
    @given(mixtures, st.integers(0, 1 << 30))
    def every(kinds: list[str], seed: int) -> None:
        nonlocal refused
        dice = random.Random(seed)
        limiter.start_over()
        running: dict[str, list[Demand]] = {}
        for step in range(25):
            limiter.wait(dice.choice(WAITS_MS))
            if running and dice.random() < 0.3:
                rid = dice.choice(sorted(running))
                limiter.settle(rid, *((one, dice.choice([0, one.cost])) for one in running.pop(rid)))
                continue
            wanted = [a_demand(kind, number, dice, 2) for number, kind in enumerate(kinds)]
            verdict = limiter.admit(f"r{step}", *wanted)
            if verdict.status == "DENY":
                refused += 1
                told_ms = max(verdict.retry_ms)
                limiter.wait(told_ms - 1)
                assert limiter.admit(f"early{step}", *wanted).status == "DENY"
                limiter.wait(1)
                assert limiter.admit(f"r{step}", *wanted).status == "OK"
            running[f"r{step}"] = wanted

    every()
    assert refused > 100


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sessions"])
def test_after_its_reset_all_of_a_limit_is_there_again(limiter: Limiter, kind: str) -> None:
    for seed in range(20):
        dice = random.Random(seed)
        limiter.start_over()
        for step in range(12):
            limiter.wait(dice.choice(WAITS_MS[:9]))
            limiter.admit(f"r{step}", a_demand(kind, seed, dice, 2))
        wanted = a_demand(kind, seed, dice, 2)
        used = limiter.used(wanted)[0]
        reset_ms = limits.reset_ms(wanted.limit, used, limiter.now_ms)
        assert reset_ms is not None and (reset_ms > 0 or not used)
        limiter.wait(reset_ms)
        assert limiter.used(wanted) == (0,)


def test_when_a_slot_is_free_again_nobody_knows(limiter: Limiter) -> None:
    slot = demand(1, 0, unit="concurrent", name="parallel")
    limiter.admit("r1", slot)
    assert limiter.admit("r2", slot).retry_ms == (1_000,)
    assert limits.reset_ms(slot.limit, 1, limiter.now_ms) is None


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_same_state_a_higher_limit_never_refuses_more_nor_longer(limiter: Limiter, kind: str) -> None:
    for seed in range(15):
        dice = random.Random(seed)
        limiter.start_over()
        for step in range(20):
            limiter.wait(dice.choice(WAITS_MS[:9]))
            limiter.admit(f"r{step}", a_demand(kind, seed, dice, 4))
        wanted = a_demand(kind, seed, dice, 4)
        found = []
        for more in range(0, 6 * wanted.limit.capacity, max(1, wanted.limit.capacity // 4)):
            if kind == "gcra":
                bound = replace(wanted.limit, burst=wanted.limit.burst + more)
            else:
                bound = replace(wanted.limit, limit=wanted.limit.limit + more)
            found.append(limiter.peek(replace(wanted, limit=bound)).retry_ms[0])
        assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_under_a_limit_that_was_lowered_is_told_when_enough_has_left(limiter: Limiter, kind: str) -> None:
    """More is used than is allowed now, so waiting for the oldest alone would not do."""
    for seed in range(8):
        dice = random.Random(seed)
        limiter.start_over()
        for step in range(30):
            limiter.wait(dice.choice((0, 1, 17, 40, 90)))
            limiter.admit(f"r{step}", a_demand(kind, seed, dice, 6))
        wanted = a_demand(kind, seed, dice, 6)
        wanted = replace(wanted, cost=1, member=keys.digest("new") if wanted.member else "")
        few = {"log": 2, "sessions": 2, "calendar": 4, "gcra": wanted.limit.limit}.get(kind, wanted.limit.limit // 3)
        lowered = replace(wanted, limit=replace(wanted.limit, limit=few, burst=2 if kind == "gcra" else 0))
        told_ms = limiter.admit("refused", lowered).retry_ms[0]
        assert told_ms > 1
        limiter.wait(told_ms - 1)
        assert limiter.peek(lowered).retry_ms == (1,)
        limiter.wait(1)
        assert limiter.admit("later", lowered).status == "OK"


def admitted(limit: Limit, at_ms: Sequence[int]) -> list[int]:
    counter = limits.counter(limit)
    found = []
    for now_ms in at_ms:
        if not counter.check(limit, 1, now_ms)[1]:
            counter.take(limit, 1, now_ms, "")
            found.append(now_ms)
    return found


HISTORY = st.lists(st.sampled_from((0, 0, 1, 1, 2, 3, 9, 10, 11, 60)), max_size=60)


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_over_a_history_of_single_requests_a_higher_limit_admits_every_one_that_a_lower_one_does(unit: str) -> None:
    """Of requests one by one. With costs that differ it may not: a large one that fits takes the room of small ones."""

    @settings(HERE, max_examples=300)
    @given(HISTORY, st.integers(1, 5), st.integers(1, 5), st.sampled_from((10, 60, 120)))
    def every(gaps_ms: list[int], most: int, more: int, window_ms: int) -> None:
        times_ms = [START_MS + sum(gaps_ms[:number]) for number in range(len(gaps_ms))]
        fewer = admitted(Limit("one", "sliding", unit, "org", most, window_ms), times_ms)
        rest = admitted(Limit("one", "sliding", unit, "org", most + more, window_ms), times_ms)
        for at_ms in fewer:
            rest.remove(at_ms)

    every()


def test_over_a_history_of_single_requests_a_larger_burst_or_rate_is_never_behind() -> None:
    """Not the same ones: who was admitted early may be missing later. As many, at any time."""

    @settings(HERE, max_examples=300)
    @given(HISTORY, st.integers(1, 5), st.integers(0, 5), st.integers(1, 5), st.integers(0, 5))
    def every(gaps_ms: list[int], rate: int, faster: int, burst: int, more: int) -> None:
        times_ms = [START_MS + sum(gaps_ms[:number]) for number in range(len(gaps_ms))]
        fewer = admitted(Limit("one", "gcra", "requests", "org", rate, 10, burst), times_ms)
        rest = admitted(Limit("one", "gcra", "requests", "org", rate + faster, 10, burst + more), times_ms)
        for until_ms in times_ms:
            assert sum(at_ms <= until_ms for at_ms in fewer) <= sum(at_ms <= until_ms for at_ms in rest)

    every()

"""The promise of each kind, under an adversary: it is kept, and nothing is kept back that could be given."""

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
import redis

from gateway import limits
from gateway.types import Calendar, Limit
from tests.limits import adversary
from tests.limits.adversary import PHASES, Answer, Loot, Plan
from tests.limits.conftest import START_MS, Limiter, calendar
from tests.limits.history import DAY_MS, HOUR_MS
from tests.limits.oracle import period_begin_ms

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
LIMITS = (1, 2, 10, 100, 128, 129, 1000, 100_000)
WINDOWS_MS = (1_000, 10_000, 60_000, HOUR_MS, DAY_MS)
#: One limit of each shape is met in all its phases, the others in every ninth.
WHOLE = ((10, 60_000), (129, 10_000), (100_000, 60_000))
#: Of what is asked evenly at exactly the limit: one sub-bucket of 61 is on its way out.
THROUGHPUT_MIN = 60 / 61


def sliding(unit: str, most: int, window_ms: int) -> Limit:
    return Limit("attacked", "sliding", unit, "org", most, window_ms)


def assert_kept(limit: Limit, plan: Plan, answers: Sequence[Answer]) -> Loot:
    loot = Loot(limit, answers)
    assert loot.most_in_any_window() <= limit.limit
    # Less than a sub-bucket, and with the exact log not at all.
    bound_ms = 0 if adversary.one_by_one(limit) else limit.window_ms / PHASES
    assert 0 <= loot.longest_false_denial_ms() <= bound_ms
    return loot


@pytest.mark.parametrize("window_ms", WINDOWS_MS)
@pytest.mark.parametrize("most", LIMITS)
@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_an_adversary_gets_the_limit_in_some_window_and_never_more(
    unit: str, most: int, window_ms: int, full: bool
) -> None:
    limit = sliding(unit, most, window_ms)
    every = full or (most, window_ms) in WHOLE
    phases = range(PHASES) if every else range(most % 7, PHASES, 9 if most not in (100, 128) else 20)
    plans = [*adversary.bursts(limit, phases), adversary.trickle(limit)]
    plans += [adversary.mixed(limit, seed) for seed in range(50 if full else 3)]
    reached = 0
    for plan in plans:
        loot = assert_kept(limit, plan, adversary.play(limit, plan))
        reached = max(reached, loot.most_in_any_window())
    assert reached == most


@pytest.mark.parametrize("most", LIMITS)
@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_who_asks_evenly_for_exactly_the_limit_gets_nearly_all_of_it(unit: str, most: int) -> None:
    limit = sliding(unit, most, 60_000)
    got = adversary.throughput(limit, 20)
    assert got == pytest.approx(1.0, abs=1e-3) if adversary.one_by_one(limit) else THROUGHPUT_MIN <= got <= 1.0


@BOTH_STORES
@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_the_server_gives_an_adversary_what_the_twin_gives(redis_url: str, unit: str, full: bool) -> None:
    """The same plans inside the server: every answer is the same, and the promise is judged there too."""
    with redis.Redis.from_url(redis_url) as server:
        for number, (most, window_ms) in enumerate((most, window_ms) for most in LIMITS for window_ms in WINDOWS_MS):
            limit = sliding(unit, most, window_ms)
            phases = range(PHASES) if full else [number % PHASES]
            plans = [*adversary.bursts(limit, phases)][:: 1 if full else 7]
            plans += [adversary.trickle(limit), adversary.mixed(limit, number)]
            for plan in plans:
                answers = adversary.play_on_server(server, limit, plan)
                assert answers == adversary.play(limit, plan)
                assert_kept(limit, plan, answers)
            used_bytes = server.memory_usage("attacked")
            assert isinstance(used_bytes, int) and used_bytes <= limits.bytes_max(limit)


def most_over_the_line(limit: Limit, uses: Sequence[tuple[int, int]]) -> int:
    """How far any interval is above burst + rate * length, in units times the window; 0 at most if the promise holds,
    0 if it is reached."""
    ordered = sorted(uses)
    sums = [0]
    for _, amount in ordered:
        sums.append(sums[-1] + amount)
    return max(
        (sums[last + 1] - sums[first] - limit.burst) * limit.window_ms
        - limit.limit * (ordered[last][0] - ordered[first][0])
        for first, last in [*combinations(range(len(ordered)), 2), *((n, n) for n in range(len(ordered)))]
    )


GCRA = [(1, 1000, 1), (1, 1000, 10), (7, 1000, 3), (600, 60_000, 20), (50_000, 60_000, 10_000), (3, 7, 5)]


@pytest.mark.parametrize(("rate", "window_ms", "burst"), GCRA)
def test_a_burst_and_the_rate_are_reached_in_some_interval_and_exceeded_in_none(
    redis_url: str, rate: int, window_ms: int, burst: int
) -> None:
    limit = Limit("attacked", "gcra", "tokens", "org", rate, window_ms, burst)
    over = []
    with redis.Redis.from_url(redis_url) as server:
        for seed in range(6):
            dice = random.Random(seed)
            plan: Plan = [(0, "rest")]
            for _ in range(60):
                waits: list[int | str] = [0, 1, window_ms // rate, window_ms, "told", "almost"]
                plan.append((dice.choice(waits), "rest"))
            answers = adversary.play_on_server(server, limit, plan)
            assert answers == adversary.play(limit, plan)
            over.append(most_over_the_line(limit, [(one.at_ms, one.cost) for one in answers if not one.retry_ms]))
    assert max(over) == 0


@pytest.mark.parametrize(("rate", "window_ms", "burst"), GCRA)
def test_refunds_never_let_more_through_than_burst_and_rate(rate: int, window_ms: int, burst: int) -> None:
    """Judged by what was really used: what a request gave back was never used."""
    limit = Limit("one", "gcra", "tokens", "org", rate, window_ms, burst)
    gave_back = 0
    for seed in range(30):
        dice, counter, now_ms = random.Random(seed), limits.counter(limit), START_MS
        running: list[tuple[int, int]] = []
        uses: list[tuple[int, int]] = []
        for _ in range(150):
            now_ms += dice.choice([0, 0, 1, window_ms // rate, window_ms // 3, window_ms])
            cost = dice.randint(1, burst)
            before = counter.check(limit, 0, now_ms)[0]
            if running and dice.random() < 0.5:
                at_ms, cost = running.pop(dice.randrange(len(running)))
                actual = dice.choice([0, cost // 2, cost])
                counter.settle(limit, cost, actual, at_ms, now_ms, "")
                gave_back += before - counter.check(limit, 0, now_ms)[0]
                uses.append((at_ms, actual))
            elif counter.check(limit, cost, now_ms)[1] == 0:
                counter.take(limit, cost, now_ms, "")
                running.append((now_ms, cost))
        # Those that still run have used nothing yet.
        assert most_over_the_line(limit, uses) <= 0
    assert gave_back > 0 or burst == 1


SKEWS_MS = (0, -170_000, 170_000, -HOUR_MS + 1, HOUR_MS - 1)


@BOTH_STORES
@pytest.mark.parametrize("period", ["hour", "day", "week", "month"])
def test_gateways_whose_clocks_differ_admit_the_limit_in_each_period_and_never_more(
    limiter: Limiter, period: str
) -> None:
    """Every gateway works out the periods by its own clock; the server's decides which one it is."""
    rule = Calendar(period, "America/St_Johns", 90 if period != "hour" else 30)
    admitted: dict[int, int] = {}
    number = 0
    wanted = calendar(5, rule)
    boundary = limits.row(wanted, START_MS)[5]
    assert isinstance(boundary, int)
    for boundary_ms in (boundary, int(limits.row(wanted, boundary)[5]), int(limits.row(wanted, boundary)[6])):
        for offset_ms in (-180_000, -1, 0, 1, 180_000):
            limiter.set_clock(boundary_ms + offset_ms)
            for skew_ms in SKEWS_MS:
                for _ in range(2):
                    limiter.skew_ms = skew_ms
                    number += 1
                    if limiter.admit(f"r{number}", wanted).status == "OK":
                        begin_ms = period_begin_ms(rule, limiter.now_ms)
                        admitted[begin_ms] = admitted.get(begin_ms, 0) + 1
    assert len(admitted) == 4
    assert set(admitted.values()) == {5}


def test_twice_a_quota_may_pass_within_a_moment_at_the_turn_of_its_period(limiter: Limiter) -> None:
    """What a calendar does not promise."""
    wanted = calendar(5, Calendar("day"))
    limiter.set_clock(START_MS // DAY_MS * DAY_MS + DAY_MS - 1)
    assert [limiter.admit(f"a{number}", wanted).status for number in range(6)] == ["OK"] * 5 + ["DENY"]
    limiter.wait(1)
    assert [limiter.admit(f"b{number}", wanted).status for number in range(6)] == ["OK"] * 5 + ["DENY"]

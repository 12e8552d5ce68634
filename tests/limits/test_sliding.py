"""The promise of `sliding`, on the real scripts: never more than L in any interval of length W."""

import random

import pytest

from tests.limits.conftest import Limiter, demand

WINDOW_MS = 6_000
GRAIN_MS = 100


class Oracle:
    """Remembers every admission; slow and obviously right."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []

    def used(self, now_ms: int) -> int:
        return sum(cost for at_ms, cost in self.admitted if at_ms > now_ms - WINDOW_MS)

    def most_in_any_window(self) -> int:
        return max(
            sum(cost for at_ms, cost in self.admitted if start <= at_ms < start + WINDOW_MS)
            for start, _ in self.admitted
        )


def traffic(seed: int, count: int) -> list[int]:
    """Gaps in ms between requests: steady, bursts, and pauses around the window's length."""
    dice = random.Random(seed)
    choices = [0, 0, 0, 1, 7, 40, GRAIN_MS - 1, GRAIN_MS, WINDOW_MS - 1, WINDOW_MS, WINDOW_MS // 2]
    weights = [30, 20, 10, 8, 8, 8, 2, 2, 1, 1, 2]
    return dice.choices(choices, weights, k=count)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [1, 2, 10, 128])
def test_the_exact_log_admits_what_the_oracle_admits(limiter: Limiter, limit: int, seed: int) -> None:
    oracle, wanted = Oracle(), demand(limit, WINDOW_MS)
    for number, gap_ms in enumerate(traffic(seed, 300)):
        limiter.set_clock(limiter.now_ms + gap_ms)
        used = oracle.used(limiter.now_ms)
        verdict = limiter.admit(f"r{number}", wanted)
        assert verdict.used == (used,)
        assert (verdict.status == "OK") == (used < limit)
        if verdict.status == "OK":
            oracle.admitted.append((limiter.now_ms, 1))
    assert oracle.most_in_any_window() <= limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("limit", "cost_max"), [(129, 1), (1000, 400), (50, 50)])
def test_buckets_never_exceed_the_limit_and_deny_at_most_a_grain_longer(
    limiter: Limiter, limit: int, cost_max: int, seed: int
) -> None:
    oracle, dice = Oracle(), random.Random(seed)
    for number, gap_ms in enumerate(traffic(seed, 400)):
        limiter.set_clock(limiter.now_ms + gap_ms)
        cost = dice.randint(1, cost_max)
        wanted = demand(limit, WINDOW_MS, cost, unit="requests" if cost_max == 1 else "tokens")
        verdict = limiter.admit(f"r{number}", wanted)
        if verdict.status == "OK":
            oracle.admitted.append((limiter.now_ms, cost))
        else:
            # It would still not fit if everything older than a window and a grain were forgotten.
            recent = sum(c for at_ms, c in oracle.admitted if at_ms > limiter.now_ms - WINDOW_MS - GRAIN_MS)
            assert recent + cost > limit
    assert oracle.most_in_any_window() <= limit


@pytest.mark.parametrize(
    "wanted", [demand(3, WINDOW_MS), demand(300, WINDOW_MS), demand(90, WINDOW_MS, 40, unit="tokens")]
)
def test_who_waits_exactly_as_told_is_admitted_and_not_a_millisecond_earlier(limiter: Limiter, wanted: object) -> None:
    number = 0
    for _ in range(20):
        number += 1
        verdict = limiter.admit(f"r{number}", wanted)  # type: ignore[arg-type]  # parametrised
        if verdict.status == "DENY":
            told_ms = verdict.retry_ms[0]
            limiter.set_clock(limiter.now_ms + told_ms - 1)
            assert limiter.admit(f"early{number}", wanted).status == "DENY"  # type: ignore[arg-type]
            limiter.set_clock(limiter.now_ms + 1)
            assert limiter.admit(f"late{number}", wanted).status == "OK"  # type: ignore[arg-type]
        limiter.set_clock(limiter.now_ms + 130)


def test_an_unused_estimate_goes_back_to_its_own_bucket(limiter: Limiter) -> None:
    wanted = demand(100, WINDOW_MS, 80, unit="tokens")
    taken_at_ms = limiter.now_ms
    assert limiter.admit("r1", wanted).status == "OK"
    limiter.set_clock(limiter.now_ms + 3_000)
    assert limiter.admit("r2", wanted).status == "DENY"
    limiter.settle("r1", taken_at_ms, (wanted, 15))
    assert limiter.admit("r2", wanted).used == (15,)
    # The 15 leave with the bucket they were taken in, the 80 with theirs.
    limiter.set_clock(taken_at_ms + WINDOW_MS + GRAIN_MS)
    assert limiter.admit("r3", demand(100, WINDOW_MS, 1, unit="tokens")).used == (80,)


def test_more_than_the_estimate_is_booked_when_it_is_known(limiter: Limiter) -> None:
    wanted = demand(100, WINDOW_MS, 10, unit="tokens")
    limiter.admit("r1", wanted)
    limiter.settle("r1", limiter.now_ms, (wanted, 95))
    assert limiter.admit("r2", wanted).used == (95,)


def test_a_refund_never_exceeds_what_was_taken(limiter: Limiter) -> None:
    wanted = demand(100, WINDOW_MS, 60, unit="tokens")
    limiter.admit("r1", wanted)
    assert limiter.settle("r1", limiter.now_ms, (wanted, 0)) == "OK"
    assert limiter.settle("r1", limiter.now_ms, (wanted, 0)) == "DUP"
    assert limiter.admit("r2", wanted).used == (0,)

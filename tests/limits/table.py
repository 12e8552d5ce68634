"""Prints what an adversary gets of each kind of limit: the tables in docs/limits.md. No server is needed: the counters
of this process decide as the scripts do (test_histories.py, test_promise.py).

    python -m tests.limits.table
"""

import sys
from collections.abc import Iterator

from gateway import limits
from gateway.types import Calendar, Limit
from tests.limits import adversary
from tests.limits.adversary import Loot

UNITS = ("requests", "tokens")
SIZES = (1, 2, 10, 100, 128, 129, 1_000, 100_000)
WINDOWS_MS = {"1 s": 1_000, "10 s": 10_000, "1 min": 60_000, "1 h": 3_600_000, "1 day": 86_400_000}
#: Where requests are kept one by one there are no sub-buckets, so their phases tell little.
FEW_PHASES = range(0, adversary.PHASES, 10)


def table() -> str:
    """Both tables, as they stand in the page."""
    windows = (f"{name}: ms" for name in WINDOWS_MS)
    head = _head("count", "limit", "kept as", "max ÷ limit", *windows, "÷ window", "throughput", "bytes")
    return "\n".join([*head, *(row(unit, most) for unit in UNITS for most in SIZES), "", *others()])


def row(unit: str, most: int) -> str:
    """A row of the first table: a sliding limit of this size, over all windows."""
    worst, false_ms, parts, slowest, kept_as = 0.0, [], [], 1.0, ""
    for window_ms in WINDOWS_MS.values():
        limit = Limit("attacked", "sliding", unit, "org", most, window_ms)
        kept_as = "log" if adversary.one_by_one(limit) else "60 buckets"
        loot = [Loot(limit, adversary.play(limit, plan)) for plan in _plans(limit)]
        worst = max(worst, *(one.most_in_any_window() / most for one in loot))
        false_ms.append(max(one.longest_false_denial_ms() for one in loot))
        parts.append(false_ms[-1] / window_ms)
        slowest = min(slowest, adversary.throughput(limit, 20))
    denied = (*(f"{ms:,}" for ms in false_ms), _part(max(parts)))
    return _line(unit, f"{most:,}", kept_as, f"{worst:.3f}", *denied, f"{slowest:.3f}", _bytes(limit))


def _plans(limit: Limit) -> Iterator[adversary.Plan]:
    yield from adversary.bursts(limit, FEW_PHASES if adversary.one_by_one(limit) else range(adversary.PHASES))
    yield adversary.trickle(limit)
    yield from (adversary.mixed(limit, seed) for seed in range(20))


def _part(part: float) -> str:
    """As a fraction with one above: 1/60 is the bound."""
    return "0" if not part else f"1/{1 / part:.1f}"


def others() -> Iterator[str]:
    """The second table: each kind attacked by who takes all there is, and again as soon as there is more."""
    yield from _head("kind", "example", "promise", "max ÷ promise", "max ÷ limit in any window", "bytes")
    paced = Limit("attacked", "gcra", "tokens", "org", 1_000, 60_000, 100)
    plan: adversary.Plan = [(0, "rest"), *[("told", "rest")] * 3_000]
    answers = [one for one in adversary.play(paced, plan) if not one.retry_ms]
    line, begin_ms = 0.0, answers[0].at_ms
    taken = 0
    for one in answers:
        taken += one.cost
        line = max(line, taken / (paced.burst + paced.limit * (one.at_ms - begin_ms) / paced.window_ms))
    window = Loot(paced, answers).most_in_any_window() / paced.limit
    promise = "burst + rate × time"
    yield _line("gcra", "1,000 per 1 min, burst 100", promise, f"{line:.3f}", f"{window:.3f}", _bytes(paced))
    quota = Limit("attacked", "calendar", "tokens", "org", 1_000, 86_400_000, calendar=Calendar("day"))
    most, moment = _quota(quota)
    yield _line("calendar", "1,000 per day", "limit per period", f"{most:.3f}", f"{moment:.3f}", _bytes(quota))
    slots = Limit("attacked", "concurrent", "concurrent", "org", 100, 30_000)
    counter, held = limits.counter(slots), 0
    for number in range(300):
        if not counter.check(slots, 1, 0, f"r{number}")[1]:
            counter.take(slots, 1, 0, f"r{number}")
            held += 1
    yield _line("concurrent", "100", "limit in flight", f"{held / 100:.3f}", "", _bytes(slots))


def _quota(limit: Limit) -> tuple[float, float]:
    """Of somebody who takes all of it in the last and in the first millisecond of a day: the most in one day, and in
    any 24 hours."""
    counter, midnight_ms = limits.counter(limit), adversary.BASE_MS // 86_400_000 * 86_400_000
    days: dict[int, int] = {}
    for at_ms in (midnight_ms - 1, midnight_ms):
        for _ in range(2 * limit.limit):
            if not counter.check(limit, 1, at_ms)[1]:
                counter.take(limit, 1, at_ms, "")
                days[at_ms] = days.get(at_ms, 0) + 1
    return max(days.values()) / limit.limit, sum(days.values()) / limit.limit


def _bytes(limit: Limit) -> str:
    return f"{limits.bytes_max(limit):,}"


def _head(*names: str) -> list[str]:
    return [_line(*names), _line(*["---"] * len(names))]


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

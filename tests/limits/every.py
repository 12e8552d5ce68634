"""One demand of every algorithm, and ways to fill them up: what tests over all of them start from."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations

from gateway.types import Calendar, Demand
from tests.limits.conftest import Limiter, calendar, demand, gcra, session

WINDOW_MS = 60_000

EVERY: dict[str, Demand] = {
    "log": demand(3, WINDOW_MS, name="log"),
    "buckets": demand(300, WINDOW_MS, 100, unit="tokens", name="buckets"),
    "sessions": session(3, WINDOW_MS, "mine", name="sessions"),
    "gcra": gcra(3, WINDOW_MS, 3, name="gcra"),
    "calendar": calendar(3, Calendar("day"), name="calendar"),
    "concurrent": demand(3, 0, unit="concurrent", name="concurrent"),
}


def subsets(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All but the empty one."""
    names = tuple(names)
    return chain.from_iterable(combinations(names, count) for count in range(1, len(names) + 1))


def another(wanted: Demand, number: int) -> Demand:
    """The same of another caller: where sessions are counted, one of its own."""
    return session(wanted.limit.limit, WINDOW_MS, f"other{number}", name="sessions") if wanted.member else wanted


def as_shadow(wanted: Demand) -> Demand:
    return replace(wanted, limit=replace(wanted.limit, shadow=True))


def fill(limiter: Limiter, wanted: Demand) -> None:
    """Nothing is left of this limit for `wanted`."""
    for number in range(10):
        if limiter.admit(f"fill-{wanted.limit.name}-{number}", another(wanted, number)).status == "DENY":
            return
    raise AssertionError(f"{wanted.limit.name} is never full")


def actuals(demands: Sequence[Demand], part: float = 1.0) -> Iterator[tuple[Demand, int]]:
    """Each with what a request that used `part` of its estimate really took."""
    for wanted in demands:
        yield wanted, int(wanted.cost * part) if wanted.limit.unit == "tokens" else wanted.cost

"""Every counter that a log leads to, in this process: the Python twins of what Redis keeps, on the log's clock."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gateway import limits
from gateway.admission import actual_of
from gateway.types import Charge, Demand, Limit

#: Counters that are worth nothing any more are looked for when there are so many more, and twice as many as were kept.
_SWEEP_MIN = 10_000

#: Whose it is, and `limits.counter_name`.
Key = tuple[str, str]


@dataclass(slots=True)
class Found:
    """One demand as it was judged."""

    demand: Demand
    key: Key
    used: int
    #: 0: it fits.
    retry_ms: int
    #: False for what costs nothing: a session that is known.
    costs: bool = True


class World:
    """`judge` first, then `take` what fits, and `settle` it at the end. Times never go back for one owner."""

    def __init__(self) -> None:
        self._counters: dict[Key, tuple[Limit, limits.Counter]] = {}
        self._sweep_at = _SWEEP_MIN

    def __len__(self) -> int:
        return len(self._counters)

    def judge(
        self, owner: str, demands: Iterable[Demand], now_ms: int, *, session_known: bool = False
    ) -> tuple[Found, ...]:
        """What each of `demands` finds. session_known: the session has a record, so session limits take nothing."""
        found = []
        for demand in demands:
            key = owner, limits.counter_name(demand)
            limit, known = demand.limit, session_known and bool(demand.member)
            counter = self._counter(key, limit)
            used, retry_ms = counter.check(limit, 0 if known else demand.cost, now_ms, demand.member)
            found.append(Found(demand, key, used, 0 if known else retry_ms, costs=not known))
        if len(self._counters) >= self._sweep_at:
            self._sweep(now_ms)
        return tuple(found)

    def take(self, found: Iterable[Found], now_ms: int, holder: str) -> None:
        """Everything in `found` that fits is taken. holder: the request, told from all others."""
        for one in found:
            if not one.retry_ms and one.costs:
                demand = one.demand
                counter = self._counter(one.key, demand.limit)
                counter.take(demand.limit, demand.cost, now_ms, demand.member or holder)

    def settle(self, found: Iterable[Found], taken_at_ms: int, now_ms: int, charge: Charge | None, holder: str) -> None:
        """What `take` took has ended as `charge` says; None gives it all back."""
        for one in found:
            if not one.retry_ms and one.costs:
                demand = one.demand
                counter = self._counter(one.key, demand.limit)
                actual = actual_of(demand, charge)
                counter.settle(demand.limit, demand.cost, actual, taken_at_ms, now_ms, demand.member or holder)

    def _counter(self, key: Key, limit: Limit) -> limits.Counter:
        known = self._counters.get(key)
        if known is None:
            known = self._counters[key] = (limit, limits.counter(limit))
        elif known[0] is not limit:
            self._counters[key] = (limit, known[1])  # an override has changed it
        return known[1]

    def _sweep(self, now_ms: int) -> None:
        """Counters of which nothing is used are as good as none."""
        empty = [key for key, (limit, counter) in self._counters.items() if not counter.check(limit, 0, now_ms)[0]]
        for key in empty:
            del self._counters[key]
        self._sweep_at = max(_SWEEP_MIN, 2 * len(self._counters))


def refused_by(found: Sequence[Found]) -> Found | None:
    """The demand that the refusal is named after, the one that takes longest to fit; None when all that may refuse
    fit."""
    denied = [one for one in found if one.retry_ms and not one.demand.limit.shadow]
    return max(denied, key=lambda one: one.retry_ms, default=None)

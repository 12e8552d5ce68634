"""Limits counted in this process alone, while Redis is away: each gateway gives away its share of four fifths.

Bounded: a counter of the owner that was asked for longest ago is forgotten. Once Redis has answered for an owner, what
was counted here for it is dropped, and what was admitted here is not counted there.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from gateway import limits
from gateway.admission.hold import Hold, actual_of, counters_by_demand
from gateway.admission.refusals import limit_refusal
from gateway.types import Demand, Limit, LimitState, Refusal

COUNTERS_MAX = 100_000
#: Gateways come and go unnoticed for a while, so that not everything is given away.
SHARE_PERCENT = 80


@dataclass(frozen=True, slots=True)
class _Judged:
    demand: Demand
    #: This process's share of the limit, and what it costs of that: what fits the whole limit fits an unused share.
    limit: Limit
    cost: int
    counter: limits.Counter
    used: int
    retry_ms: int


class LocalLimits:
    """Judges as the scripts do, by the twins of their counters. State: the counters by owner and key, and what each
    hold that runs has taken of them."""

    def __init__(self, instances: Callable[[], int], counters_max: int = COUNTERS_MAX) -> None:
        self._instances = instances
        self._counters_max = counters_max
        self._counters: OrderedDict[str, dict[str, limits.Counter]] = OrderedDict()
        self._count = 0
        self._taken: dict[Hold, list[_Judged]] = {}
        self._last_ms = 0

    def __len__(self) -> int:
        """Counters in memory."""
        return self._count

    def take(self, hold: Hold) -> Refusal | None:
        """Every limit of `hold` is taken here, or none is and the answer says why. Sessions are not counted: which are
        new only Redis knows."""
        now_ms = self._now_ms()
        judged = [self._judge(hold.owner, demand, key, now_ms) for demand, key in counters_by_demand(hold)]
        fits = not any(one.retry_ms and not one.demand.limit.shadow for one in judged)
        hold.judged_by, hold.judged_at_us = "local", now_ms * 1000
        hold.states = tuple(_state(one, fits, now_ms) for one in judged)
        if not fits:
            return limit_refusal(hold.states)
        taken = [one for one in judged if not one.retry_ms and _is_counted(one.demand)]
        for one in taken:
            one.counter.take(one.limit, one.cost, now_ms, hold.hold_id)
        if taken:
            self._taken[hold] = taken
        return None

    def settle(self, hold: Hold) -> None:
        """What was taken is corrected to what `hold.charge` says."""
        now_ms = self._now_ms()
        for one in self._taken.pop(hold, ()):
            actual = actual_of(replace(one.demand, cost=one.cost), hold.charge)
            one.counter.settle(one.limit, one.cost, actual, hold.judged_at_us // 1000, now_ms, hold.hold_id)
        hold.settled_at_us = now_ms * 1000

    def drop(self, owner: str) -> None:
        """Redis judges the owner's limits again."""
        self._count -= len(self._counters.pop(owner, ()))

    def _judge(self, owner: str, demand: Demand, key: str, now_ms: int) -> _Judged:
        limit = _share(demand.limit, max(1, self._instances()))
        cost = min(demand.cost, limit.capacity)
        counter = self._counter(owner, limit, key)
        used, retry_ms = counter.check(limit, cost, now_ms) if _is_counted(demand) else (0, 0)
        return _Judged(demand, limit, cost, counter, used, retry_ms)

    def _counter(self, owner: str, limit: Limit, key: str) -> limits.Counter:
        counters = self._counters.setdefault(owner, {})
        self._counters.move_to_end(owner)
        counter = counters.get(key)
        if counter is None:
            counter = counters[key] = limits.counter(limit)
            self._count += 1
            if self._count > self._counters_max:
                self._forget_one()
        return counter

    def _forget_one(self) -> None:
        """Of an owner that alone has so many, the oldest."""
        owner, counters = next(iter(self._counters.items()))
        del counters[next(iter(counters))]
        self._count -= 1
        if not counters:
            del self._counters[owner]

    def _now_ms(self) -> int:
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        return self._last_ms


def _is_counted(demand: Demand) -> bool:
    return demand.limit.unit != "sessions"


def _state(one: _Judged, fits: bool, now_ms: int) -> LimitState:
    after = one.used + one.cost if fits and not one.retry_ms else one.used
    remaining = max(0, one.limit.capacity - after)
    return LimitState(one.limit, one.cost, one.used, remaining, one.retry_ms, limits.reset_ms(one.limit, after, now_ms))


@lru_cache(4096)
def _share(limit: Limit, instances: int) -> Limit:
    """What one of so many may give away: at least one."""

    def part(amount: int) -> int:
        return max(1, -(-amount * SHARE_PERCENT // (100 * instances)))

    return replace(limit, limit=part(limit.limit), burst=part(limit.burst) if limit.burst else 0)

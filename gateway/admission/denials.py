"""Denials that hold for a while, remembered so that whoever asks again at once is answered without the store.

Sound only where usage does not fall before it must: limits on requests and on sessions, whose counts are given back
only when the upstream was never reached. Such a release here drops what is remembered; one in another process may go
unseen, so nothing is remembered for longer than `ttl_ms`. What other limits said in the same
breath is remembered to be told with it, so that nobody is sent back too early; alone it refuses nobody.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from gateway.admission.hold import Hold, counters_by_demand
from gateway.admission.refusals import limit_refusal
from gateway.types import Demand, Limit, LimitState, Refusal

_UNITS = ("requests", "sessions")


@dataclass(frozen=True, slots=True)
class _Denial:
    state: LimitState
    #: Monotonic time of the asking: the server judged later, so what it said lasts at least until then plus retry_ms.
    asked_at_s: float
    until_s: float
    judged_at_us: int


class Denials:
    """Bounded; the longest unused is forgotten first."""

    def __init__(self, ttl_ms: int, entries_max: int) -> None:
        self._ttl_ms = ttl_ms
        self._entries_max = entries_max if ttl_ms else 0
        self._known: OrderedDict[str, _Denial] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def note(self, hold: Hold, asked_at_s: float) -> None:
        """The server has just refused `hold` for what its states say."""
        denied = [state.limit for state in hold.states if state.retry_ms and not state.limit.shadow]
        if not self._entries_max or not any(_is_certain(limit) for limit in denied):
            return
        for (demand, key), state in zip(counters_by_demand(hold), hold.states, strict=True):
            if state.retry_ms and not state.limit.shadow:
                until_s = asked_at_s + min(state.retry_ms, self._ttl_ms) / 1000
                name = _name(demand, key)
                self._known[name] = _Denial(state, asked_at_s, until_s, hold.judged_at_us)
                self._known.move_to_end(name)
                if len(self._known) > self._entries_max:
                    self._known.popitem(last=False)

    def find(self, hold: Hold) -> Refusal | None:
        """The refusal that the server's limits would give `hold` now, if that is certain."""
        if not self._known:
            return None
        now_s = time.monotonic()
        found = [known for demand, key in counters_by_demand(hold) if (known := self._find(demand, key, now_s))]
        certain = [known for known in found if _is_certain(known.state.limit)]
        if not certain:
            return None
        hold.judged_at_us = certain[0].judged_at_us + _waited_ms(certain[0], now_s) * 1000
        hold.states = tuple(
            known.state._replace(retry_ms=known.state.retry_ms - _waited_ms(known, now_s)) for known in found
        )
        hold.denied_at_us = tuple(known.judged_at_us for known in found)
        return limit_refusal(hold.states)

    def _find(self, demand: Demand, key: str, now_s: float) -> _Denial | None:
        name = _name(demand, key)
        known = self._known.get(name)
        if known is None or demand.limit.shadow:
            return None
        if known.until_s <= now_s:
            del self._known[name]
            return None
        state = known.state
        if demand.cost < state.cost or _allows_more(demand.limit, state.limit):
            return None
        self._known.move_to_end(name)
        return known

    def drop(self, hold: Hold, *, released: bool) -> None:
        """`hold` has ended, and something may have been given back; of requests only when it was released."""
        if self._known:
            for demand, key in counters_by_demand(hold):
                if released or not _is_certain(demand.limit):
                    self._known.pop(_name(demand, key), None)


def _is_certain(limit: Limit) -> bool:
    return limit.unit in _UNITS


def _allows_more(limit: Limit, than: Limit) -> bool:
    return limit.limit > than.limit or limit.burst > than.burst


def _name(demand: Demand, key: str) -> str:
    # One session may go on where another, a new one, may not begin.
    return f"{key}:{demand.member}" if demand.member else key


def _waited_ms(known: _Denial, now_s: float) -> int:
    return int((now_s - known.asked_at_s) * 1000)

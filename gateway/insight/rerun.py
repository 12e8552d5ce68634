"""A log against other policies: each request is judged again when it was judged, and ends when it ended.

    begun ──► remembered? ──► shared limits ──► the org's own ──► admitted ──► settled
                   │ denied         │ denied          │ denied: what shared ones gave is given back
                   └────────────────┴─────────────────┴──► refused

Under the policies that the log was written with every decision comes out as it was, because the log has all that a
limit depends on and the times at which Redis judged and settled. What it cannot have is said in `tally`.

Requests that were refused for credits, or failed before any limit was asked, stay as they were. One that was refused
by a limit and fits now is taken to end as it was reserved: its estimate stays, its price is due, and it runs for as
long as the route's requests did on average.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from gateway import charge, keys, policy
from gateway.config import Credits, Route, Settings
from gateway.insight.asking import Askings
from gateway.insight.logline import Line, decode
from gateway.insight.order import Placed
from gateway.insight.tally import ADMITTED, BEFORE, CREDITS, LIMITED, OVERSIZED, Tally, then
from gateway.insight.world import Found, Key, World, refused_by
from gateway.policy import Asking, CompiledPolicy, PolicySet
from gateway.types import Charge, Demand, Outcome, Quote, Refusal, Usage

_TOKEN_UNITS = ("tokens", "input_tokens", "output_tokens")
#: Denials by these are remembered by the gateway (`admission.denials`); others are only told with them.
_REMEMBERED_UNITS = ("requests", "sessions")

_NO_TIME_US = 1 << 62
#: Behind every line: what must come after all that Redis judged in the same microsecond.
_LAST = 1 << 62
#: Denials are remembered for 10 s at most; the ones noted here are looked through when there are so many.
_DENIED_KEPT_US, _DENIED_MAX = 10_000_000, 100_000


@dataclass(slots=True)
class _Request:
    """One line between its begin and its end."""

    line: Line
    then: str
    asking: Asking
    rules: CompiledPolicy
    own: tuple[Demand, ...]
    shared: tuple[Demand, ...]
    #: Of the line in the log; the counters know the request by it.
    place: int
    holder: str
    session_known: bool
    #: What was found and taken, and when.
    own_found: tuple[Found, ...] = ()
    shared_found: tuple[Found, ...] = ()
    own_at_us: int = 0
    shared_at_us: int = 0
    #: How it ends.
    charge: Charge | None = None
    #: Limits that deny it as they were remembered, by name.
    recalled: tuple[str, ...] = ()


_Step = Callable[["Rerun", int, _Request], None]


class Rerun:
    """`run` once; then `tally` has what came of it."""

    def __init__(self, settings: Settings) -> None:
        self.tally = Tally(settings)
        self._askings = Askings(settings)
        self._policies = PolicySet.compile(settings)
        self._credits = settings.credits
        self._world = World()
        #: What is still to happen: time, place of the line in the log, a number that no other has, what, to whom.
        self._ahead: list[tuple[int, int, int, _Step, _Request]] = []
        self._scheduled = 0
        self._durations: dict[str, _Mean] = {}
        #: When each counter has denied somebody last.
        self._denied_us: dict[Key, int] = {}
        self._denied_max = _DENIED_MAX

    def run(self, placed: Iterable[Placed]) -> None:
        """Every line, in its order, has been judged and has ended."""
        for at_us, place, text in placed:
            self._until(at_us, place)
            self._begin(at_us, place, decode(text))
        self._until(_NO_TIME_US, 0)

    def _until(self, at_us: int, place: int) -> None:
        ahead = self._ahead
        while ahead and ahead[0][:2] < (at_us, place):
            now_us, _, _, step, request = heapq.heappop(ahead)
            step(self, now_us, request)

    def _later(self, at_us: int, now_us: int, step: _Step, request: _Request) -> None:
        """`step` is done at `at_us`; at once when that is not later than now."""
        if at_us <= now_us:
            step(self, now_us, request)
        else:
            self._push(at_us, request.place, step, request)

    def _push(self, at_us: int, place: int, step: _Step, request: _Request) -> None:
        self._scheduled += 1
        heapq.heappush(self._ahead, (at_us, place, self._scheduled, step, request))

    def _begin(self, at_us: int, place: int, line: Line) -> None:
        tally, was = self.tally, then(line)
        tally.begin(line, was)
        asking = self._askings.of(line)
        rules = None if asking is None else self._policies.plan(asking.principal.plan)
        if asking is None or rules is None:
            tally.stays(line, was, known=was == BEFORE)
            return
        if was == BEFORE and line.shared_judged_at_us is None:
            tally.stays(line, was)
            return
        demands = policy.demands(rules, asking)
        own = tuple(demand for demand in demands if not demand.limit.shared)
        shared = tuple(demand for demand in demands if demand.limit.shared) if len(own) < len(demands) else ()
        session_known = line.session_known is True or (line.session_known is None and (line.turn or 0) > 1)
        request = _Request(
            line, was, asking, rules, _enforced_first(own), _enforced_first(shared), place, f"{place:x}", session_known
        )
        if was not in (CREDITS, BEFORE) and (oversized := policy.never_fits(demands)) is not None:
            tally.decided(line, was, OVERSIZED, oversized.limit, at_us)
        elif line.limits and line.limits[0].denied_at_us:
            self._push(at_us, _LAST, Rerun._recall, request)
        else:
            self._first(at_us, request)

    def _recall(self, at_us: int, request: _Request) -> None:
        """The request was answered with a denial that had been judged now. It stands if that one does."""
        line = request.line
        demands = {demand.limit.name: demand for demand in (*request.own, *request.shared) if not demand.limit.shadow}
        for judged in line.limits:
            demand = demands.get(judged.name)
            if demand is not None and judged.denied_at_us == at_us:
                owner = keys.SHARED if demand.limit.shared else request.asking.principal.org_id
                (found,) = self._world.judge(owner, [replace(demand, cost=judged.cost)], at_us // 1000)
                self.tally.compare(line, judged, found.used)
                if self._denied_us.get(found.key) == at_us:
                    request.recalled = (*request.recalled, judged.name)
        next_us = min((judged.denied_at_us for judged in line.limits if judged.denied_at_us > at_us), default=None)
        if next_us is not None:
            self._push(next_us, _LAST, Rerun._recall, request)
        elif any(demands[name].limit.unit in _REMEMBERED_UNITS for name in request.recalled):
            denied = [judged for judged in line.limits if judged.name in request.recalled]
            longest = max(denied, key=lambda judged: judged.retry_ms)
            self.tally.decided(line, request.then, LIMITED, demands[longest.name].limit, at_us)
        else:
            self._later(line.shared_judged_at_us or line.judged_at_us or at_us, at_us, Rerun._first, request)

    def _first(self, at_us: int, request: _Request) -> None:
        """What no org owns is asked first."""
        line = request.line
        self.tally.look(line, request.asking, request.rules)
        if request.shared:
            found = self._judge(keys.SHARED, request.shared, at_us, request)
            if (denied := refused_by(found)) is not None:
                self._refused(at_us, request, denied, found)
                return
            self._world.take(found, at_us // 1000, request.holder)
            request.shared_found, request.shared_at_us = found, at_us
        self._later(line.judged_at_us or at_us, at_us, Rerun._own, request)

    def _own(self, at_us: int, request: _Request) -> None:
        found = self._judge(request.asking.principal.org_id, request.own, at_us, request)
        if request.then in (CREDITS, BEFORE):
            self.tally.stays(request.line, request.then)
            self._give_back_shared(at_us, request)
        elif (denied := refused_by(found)) is not None:
            self._give_back_shared(at_us, request)
            self._refused(at_us, request, denied, found)
        else:
            self._world.take(found, at_us // 1000, request.holder)
            request.own_found, request.own_at_us = found, at_us
            self._admitted(at_us, request)

    def _judge(self, owner: str, demands: tuple[Demand, ...], at_us: int, request: _Request) -> tuple[Found, ...]:
        found = self._world.judge(owner, demands, at_us // 1000, session_known=request.session_known)
        if found:
            self.tally.judged(request.line, found, at_us)
        return found

    def _refused(self, at_us: int, request: _Request, denied: Found, found: tuple[Found, ...]) -> None:
        if request.then in (CREDITS, BEFORE):
            self.tally.stays(request.line, request.then)
            return
        self.tally.decided(request.line, request.then, LIMITED, denied.demand.limit, at_us)
        for one in found:
            if one.retry_ms:
                self._denied_us[one.key] = at_us
        if len(self._denied_us) > self._denied_max:
            self._denied_us = {
                key: known_us for key, known_us in self._denied_us.items() if known_us > at_us - _DENIED_KEPT_US
            }
            self._denied_max = max(_DENIED_MAX, 2 * len(self._denied_us))

    def _admitted(self, at_us: int, request: _Request) -> None:
        line, rules = request.line, request.rules
        quote = self._quote(rules, request.asking)
        estimate = max(
            (one.demand.cost for one in request.own_found if one.demand.limit.unit in _TOKEN_UNITS), default=0
        )
        route = request.asking.route
        mean = self._durations.setdefault(route.name, _Mean())
        if request.then == ADMITTED:
            request.charge = charge_of(line, quote, estimate, self._credits)
            own_us = line.settled_at_us or line.shared_settled_at_us or line.ended_at_us
            shared_us = line.shared_settled_at_us or own_us
            mean.add(own_us - at_us)
        else:
            request.charge = charge.settle(Outcome.COMPLETE, None, quote, estimate, quote.want_ucredits)
            own_us = shared_us = at_us + mean.value
        ucredits = (request.charge.ucredits if request.charge else 0) + _messages_ucredits(line, route, rules)
        self.tally.decided(line, request.then, ADMITTED, None, at_us, ucredits)
        if request.own_found:
            self._later(own_us, at_us, Rerun._settle_own, request)
        if request.shared_found:
            self._later(shared_us, at_us, Rerun._settle_shared, request)

    def _quote(self, rules: CompiledPolicy, asking: Asking) -> Quote:
        """What the request may cost. One whose model has no price is not refused here: it went on, and is free."""
        quote = policy.quote(rules, asking.route, asking.peek, self._credits)
        return Quote.flat(0) if isinstance(quote, Refusal) else quote

    def _give_back_shared(self, at_us: int, request: _Request) -> None:
        if request.shared_found:
            line = request.line
            then_us = None if request.then == ADMITTED else line.shared_settled_at_us
            self._later(then_us or at_us, at_us, Rerun._settle_shared, request)

    def _settle_own(self, at_us: int, request: _Request) -> None:
        taken_ms = request.own_at_us // 1000
        self._world.settle(request.own_found, taken_ms, at_us // 1000, request.charge, request.holder)

    def _settle_shared(self, at_us: int, request: _Request) -> None:
        taken_ms = request.shared_at_us // 1000
        self._world.settle(request.shared_found, taken_ms, at_us // 1000, request.charge, request.holder)


def charge_of(line: Line, quote: Quote, token_estimate: int, credits: Credits) -> Charge | None:
    """What the request costs at this price, as it ended; None when it never came to its upstream. What was held when
    it ended is taken from the log; where that has nothing of it, from the quote."""
    if line.outcome is None:
        return None
    usage = None
    if line.input_tokens is not None:
        usage = Usage(line.input_tokens, line.output_tokens or 0, exact=line.basis == "exact")
    held_ucredits = quote.want_ucredits if line.held_ucredits is None else line.held_ucredits
    return charge.settle(line.outcome, usage, quote, token_estimate, held_ucredits, credits.overrun)


def _enforced_first(demands: tuple[Demand, ...]) -> tuple[Demand, ...]:
    """As a hold has them."""
    return tuple(sorted(demands, key=lambda demand: demand.limit.shadow)) if len(demands) > 1 else demands


def _messages_ucredits(line: Line, route: Route, rules: CompiledPolicy) -> int:
    counted = line.messages_in and route.websocket is not None and route.websocket.count_messages
    return (line.messages_in or 0) * rules.per_message_ucredits if counted else 0


@dataclass(slots=True)
class _Mean:
    count: int = 0
    sum_us: int = 0

    def add(self, value_us: int) -> None:
        self.count += 1
        self.sum_us += max(0, value_us)

    @property
    def value(self) -> int:
        return self.sum_us // self.count if self.count else 0

"""What a request asks of each limit it meets."""

from collections.abc import Mapping

from gateway.config import Route
from gateway.policy.asking import Asking
from gateway.policy.compile import Applied, Ask, CompiledPolicy
from gateway.policy.conditions import Check
from gateway.policy.estimate import TOKEN_UNITS, token_estimate
from gateway.policy.subjects import Memo
from gateway.types import Demand, Limit


def demands(policy: CompiledPolicy, asking: Asking) -> tuple[Demand, ...]:
    """What this request asks, in the order of the policy, shared limits last: <= 1 for each limit.

    A request costs 1 of requests and of concurrent, its price of credits, of tokens what `token_estimate` reserves, and
    of sessions 1 for its session, if it has any. Where nobody reads the body (`peek` is None) token limits do not
    apply, as `gateway check` shows.
    """
    return _demands(policy, policy.on(asking.route).request, asking)


def message_demands(policy: CompiledPolicy, asking: Asking) -> tuple[Demand, ...]:
    """What one message of a client on an open WebSocket asks: 1 of requests, and its price of credits. The connection
    around it is among the concurrent ones and the sessions already, and nobody can tell a message's tokens before it
    ends; nor what it says, so `peek` is None."""
    return _demands(policy, policy.on(asking.route).message, asking)


def needs_peek(policy: CompiledPolicy, route: Route) -> bool:
    """The request's body must be read before the request can be judged: some limit on `route`, if only a shadow one,
    counts tokens or depends on the model or on whether the answer is streamed."""
    return policy.on(route).reads_body


def price_ucredits(policy: CompiledPolicy) -> int:
    """The flat price of one request, in micro-credits."""
    return policy.price_ucredits


def _demands(policy: CompiledPolicy, ask: Ask, asking: Asking) -> tuple[Demand, ...]:
    overrides = asking.overrides
    if ask.ready is not None and not overrides:
        return ask.ready
    met = [
        (one, one.rule.bound_by(overrides) if overrides else one.rule.limit)
        for one in ask.applied
        if not one.checks or _hold(one.checks, asking)
    ]
    costs = _costs(policy, ask, asking, met)
    memo: Memo = {}
    wanted = []
    for one, limit in met:
        if one.ready is not None and limit is one.rule.limit:
            wanted.append(one.ready)
        elif (cost := costs.get(limit.unit)) is not None:
            subject = one.subject if isinstance(one.subject, str) else one.subject.of(asking, memo)
            member = asking.session_digest if limit.unit == "sessions" else None
            wanted.append(Demand(limit, subject, cost, member or ""))
    return tuple(wanted)


def _hold(checks: tuple[Check, ...], asking: Asking) -> bool:
    for check in checks:
        if not check(asking):
            return False
    return True


def _costs(policy: CompiledPolicy, ask: Ask, asking: Asking, met: list[tuple[Applied, Limit]]) -> Mapping[str, int]:
    """Unit -> cost for this request; a unit that is missing is one that it takes nothing of."""
    costs = dict(ask.costs)
    if asking.session_digest is not None:
        costs["sessions"] = 1
    if asking.peek is not None:
        limits = [limit for _, limit in met]
        if any([limit.unit in TOKEN_UNITS for limit in limits]):
            costs |= token_estimate(asking.peek, policy.default_output_tokens, limits)
    return costs

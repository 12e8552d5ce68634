"""What a request asks of each limit it meets."""

from collections.abc import Mapping

from gateway.config import Credits, Route
from gateway.policy.asking import Asking
from gateway.policy.compile import Applied, Ask, CompiledPolicy
from gateway.policy.conditions import Check
from gateway.policy.estimate import TOKEN_UNITS, token_estimate
from gateway.policy.prices import credits_asked, quote_of
from gateway.policy.refusals import unknown_model_price
from gateway.policy.subjects import Memo
from gateway.types import Demand, Limit, Peek, Quote, Refusal


def demands(policy: CompiledPolicy, asking: Asking) -> tuple[Demand, ...]:
    """What this request asks, in the order of the policy, shared limits last: <= 1 for each limit.

    A request costs 1 of requests and of concurrent, of credits what it may come to, of tokens what `token_estimate`
    reserves, and of sessions 1 for its session, if it has any. Where nobody reads the body (`peek` is None) token
    limits do not apply, as `gateway check` shows.
    """
    return _demands(policy, policy.on(asking.route).request, asking)


def message_demands(policy: CompiledPolicy, asking: Asking) -> tuple[Demand, ...]:
    """What one message of a client on an open WebSocket asks: 1 of requests, and its price of credits. The connection
    around it is among the concurrent ones and the sessions already, and nobody can tell a message's tokens before it
    ends; nor what it says, so `peek` is None."""
    return _demands(policy, policy.on(asking.route).message, asking)


def needs_peek(policy: CompiledPolicy, route: Route) -> bool:
    """The request's body must be read before the request can be judged: some limit on `route`, if only a shadow one,
    counts tokens or depends on the model or on whether the answer is streamed; or the price does."""
    return policy.on(route).reads_body


def quote(policy: CompiledPolicy, route: Route, peek: Peek | None, credits: Credits) -> Quote | Refusal:
    """What a request may cost and how much of it is to be held. A Refusal: nobody knows what its model costs.

    Where nobody reads the body (`peek` is None, or the route has no usage reader) it is the flat part of the price, as
    `gateway check` shows.
    """
    price = policy.prices.of(route, peek)
    if price is None:
        return unknown_model_price(None if peek is None else peek.model)
    if peek is None or not price.by_token:
        return Quote.flat(price.flat_ucredits)
    return quote_of(price, peek, policy.default_output_tokens, credits.hold)


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
    if ask.prices_differ and any([limit.unit == "ucredits" for _, limit in met]):
        credits = _credits(policy, asking, met)
        if credits:
            costs["ucredits"] = credits
    return costs


def _credits(policy: CompiledPolicy, asking: Asking, met: list[tuple[Applied, Limit]]) -> int:
    price = policy.prices.of(asking.route, asking.peek)
    if price is None:
        return 0  # it is refused for that
    room = [limit.capacity for _, limit in met if limit.unit == "ucredits" and not limit.shadow]
    return credits_asked(price, asking.peek, policy.default_output_tokens, min(room, default=None))

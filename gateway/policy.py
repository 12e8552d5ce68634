"""Which limits and which price a request lives under: plans and policies, compiled once into an immutable PolicySet.

Pure: it decides nothing and counts nothing. `demands` says what to take, admission takes it. Where an org's credential
carries no user, key or session, a limit `per` that thing falls on one share of the org under the subject `-`: everybody
anonymous in the org together, so leaving an id out never escapes a limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from gateway.config import Limit, Policy, Settings
from gateway.types import UCREDITS_PER_CREDIT, Demand, Facts, Peek, Principal, Refusal

#: The subject of a request that lacks the id a limit is per.
ANONYMOUS = "-"
#: Bytes of a JSON body that make about one token; the estimate is corrected when the answer reports its usage.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class CompiledLimit:
    """A limit ready to become a Demand; the fields mean what they mean there."""

    name: str
    kind: str
    unit: str
    scope: str
    limit: int
    window_ms: int


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """What a plan lives under. `limits` stand in the order of the policy file."""

    name: str
    limits: tuple[CompiledLimit, ...]
    price_ucredits: int
    #: Of each message of the client on a WebSocket route that counts them.
    per_message_ucredits: int
    default_output_tokens: int
    #: The tightest token limit, None when tokens are not limited.
    tokens_max: int | None


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Every plan with its policy. One request sees one PolicySet from its start to its end."""

    plans: Mapping[str, CompiledPolicy]

    @classmethod
    def compile(cls, settings: Settings) -> Self:
        """The policies of all plans. Settings from the loader are complete: every plan's policy exists."""
        lease_ms = settings.credits.lease_ms
        compiled = {name: _compile_policy(policy, lease_ms) for name, policy in settings.policies.items()}
        return cls(MappingProxyType({name: compiled[plan.policy] for name, plan in settings.plans.items()}))

    def plan(self, name: str) -> CompiledPolicy | None:
        """The policy of the plan `name`; None for a plan nobody configured, which is refused with `unknown_plan`."""
        return self.plans.get(name)


def demands(
    policy: CompiledPolicy, principal: Principal, facts: Facts, peek: Peek | None, session_id: str | None
) -> tuple[Demand, ...]:
    """What this request asks of each limit, in the order of the policy.

    A request costs 1 of requests and of concurrent; tokens cost the estimate that `token_estimate` makes. `peek` is
    None on a route whose format nobody reads: token limits do not apply there, as `gateway check` shows.
    """
    del facts  # No limit depends on the route yet; the walk hands over what it knows.
    tokens = None if peek is None else token_estimate(policy, peek)
    return _demands(policy, principal, session_id, {"requests": 1, "concurrent": 1, "tokens": tokens})


def message_demands(policy: CompiledPolicy, principal: Principal, session_id: str | None) -> tuple[Demand, ...]:
    """What one message of a client on an open WebSocket asks: 1 of requests. The connection around it has its place
    among the concurrent ones already, and nobody can tell a message's tokens before it ends."""
    return _demands(policy, principal, session_id, {"requests": 1})


def _demands(
    policy: CompiledPolicy, principal: Principal, session_id: str | None, costs: Mapping[str, int | None]
) -> tuple[Demand, ...]:
    """`costs` of each unit, for every limit on one that is there."""
    subjects = {
        "org": principal.org_id,
        "user": principal.user_id or ANONYMOUS,
        "key": principal.key_id or ANONYMOUS,
        "session": session_id or ANONYMOUS,
    }
    return tuple(
        Demand(rule.name, rule.kind, rule.unit, rule.scope, subjects[rule.scope], rule.limit, rule.window_ms, cost)
        for rule in policy.limits
        if (cost := costs.get(rule.unit)) is not None
    )


def token_estimate(policy: CompiledPolicy, peek: Peek) -> int:
    """Tokens to reserve: a quarter of the body's bytes, rounded up, plus the output the client allows; at least 1.

    When the client names no maximum, the policy's `default_output` is reserved, cut so that the whole fits the
    tightest token limit but never below 1: a first request must not be refused for a maximum that nobody named.
    """
    input_tokens = -(-peek.body_bytes // _BYTES_PER_TOKEN)
    if peek.max_output_tokens is not None:
        return max(1, input_tokens + peek.max_output_tokens)
    output_tokens = policy.default_output_tokens
    if policy.tokens_max is not None:
        output_tokens = max(1, min(output_tokens, policy.tokens_max - input_tokens))
    return input_tokens + output_tokens


def needs_peek(policy: CompiledPolicy) -> bool:
    """The request's body must be read before it can be judged: some limit counts tokens."""
    return policy.tokens_max is not None


def price_ucredits(policy: CompiledPolicy) -> int:
    """The flat price of one request, in micro-credits."""
    return policy.price_ucredits


def never_fits(wanted: Iterable[Demand]) -> Demand | None:
    """The first demand that no waiting can satisfy, because it alone is larger than its limit."""
    return next((demand for demand in wanted if demand.cost > demand.limit), None)


def request_exceeds_limit(demand: Demand) -> Refusal:
    """The answer for a demand that `never_fits`."""
    message = (
        f"This request needs about {demand.cost} {demand.unit}, more than the limit '{demand.name}' of {demand.limit} "
        f"ever allows at once. Send a shorter request or ask for fewer output tokens; waiting does not help."
    )
    details = {"limit": demand.name, "scope": demand.scope, "requested": demand.cost, "allowed": demand.limit}
    return Refusal(400, "request_exceeds_limit", message, should_retry=False, details=details)


def unknown_plan(plan: str) -> Refusal:
    """The answer for a principal whose plan has no policy here."""
    message = "The plan of this organization is not configured on this gateway."
    return Refusal(403, "unknown_plan", message, should_retry=False, details={"plan": plan})


def _compile_policy(policy: Policy, lease_ms: int) -> CompiledPolicy:
    token_limits = [limit.limit for limit in policy.limits if limit.count == "tokens"]
    return CompiledPolicy(
        name=policy.policy,
        limits=tuple(_compile_limit(limit, lease_ms) for limit in policy.limits),
        price_ucredits=policy.price.per_request * UCREDITS_PER_CREDIT,
        per_message_ucredits=policy.price.per_message * UCREDITS_PER_CREDIT,
        default_output_tokens=policy.tokens.default_output,
        tokens_max=min(token_limits, default=None),
    )


def _compile_limit(limit: Limit, lease_ms: int) -> CompiledLimit:
    # A slot in flight is a lease of the same length as the hold's, renewed by the same heartbeat.
    kind, window_ms = ("concurrent", lease_ms) if limit.window_ms is None else ("sliding", limit.window_ms)
    return CompiledLimit(limit.name, kind, limit.count, limit.per, limit.limit, window_ms)

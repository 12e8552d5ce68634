"""From the configuration to what each plan lives under, once; and from a plan and a route to what is left to decide.

    Settings ──compile──► PolicySet ──plan()──► CompiledPolicy ──on()──► OnRoute: limits of requests, of messages

What is known of a route is worked out when its first request comes, and kept: as many as there are plans and routes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Self

from gateway import config
from gateway.config import CREDITS_MAX, Policy, Route, Settings, When
from gateway.policy.conditions import Check, compile_when, reads_body
from gateway.policy.estimate import TOKEN_UNITS
from gateway.policy.prices import Prices
from gateway.policy.subjects import Slots, compile_subject
from gateway.types import UCREDITS_PER_CREDIT, Calendar, Demand, Limit

#: Values that orgs have in place of one limit's own, kept at once.
OVERRIDDEN_MAX = 4_096

_DAY_MS = 86_400_000
_PERIOD_MS_MAX = {"hour": 3_600_000, "day": _DAY_MS, "week": 7 * _DAY_MS, "month": 31 * _DAY_MS}
_MODEL = "model"


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit as configured: what it allows, whom, and for which requests."""

    limit: Limit
    #: Without `org`: what a policy says is per org anyway, what is shared never.
    dimensions: tuple[str, ...]
    cardinality: int
    when: When
    _overridden: dict[int, Limit] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reads_body(self) -> bool:
        """Whether it applies, to whom, or what it costs cannot be known from a request's head."""
        return self.limit.unit in TOKEN_UNITS or _MODEL in self.dimensions or reads_body(self.when)

    def bound_by(self, overrides: Mapping[str, int]) -> Limit:
        """The limit for an org with these overrides. A shared one is no org's own, so no org has another."""
        own = self.limit
        value = overrides.get(own.name)
        if value is None or own.shared:
            return own
        found = self._overridden.get(value)
        if found is None:
            if len(self._overridden) >= OVERRIDDEN_MAX:
                self._overridden.clear()
            found = self._overridden[value] = replace(own, limit=_in_unit(value, own.unit))
        return found


@dataclass(frozen=True, slots=True)
class Applied:
    """A rule on one route."""

    rule: Rule
    #: What a request must be asked before it counts here.
    checks: tuple[Check, ...]
    subject: str | Slots
    #: The demand of every request, where requests differ in nothing that matters here.
    ready: Demand | None


@dataclass(frozen=True, slots=True)
class Ask:
    """What one kind of request asks on a route: a request itself, or a message of its WebSocket."""

    applied: tuple[Applied, ...]
    #: Unit -> cost, of those that cost each request the same.
    costs: Mapping[str, int]
    #: Every demand, where requests differ in nothing that matters to any of them.
    ready: tuple[Demand, ...] | None
    #: Requests differ in what they cost.
    prices_differ: bool


@dataclass(frozen=True, slots=True)
class OnRoute:
    """A policy on one route."""

    request: Ask
    message: Ask
    #: Some limit here, or the price, depends on what a request's body says.
    reads_body: bool


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """What a plan lives under: its policy, and behind it what all plans share."""

    #: Of the policy.
    name: str
    plan: str
    #: In the order of the policy file, the shared ones last in theirs.
    rules: tuple[Rule, ...]
    prices: Prices
    #: Of each message of the client on a WebSocket route that counts them.
    per_message_ucredits: int
    default_output_tokens: int
    _on: dict[str, OnRoute] = field(default_factory=dict, compare=False, repr=False)

    @property
    def price_ucredits(self) -> int:
        """The flat part of the policy's own price."""
        return self.prices.own.flat_ucredits

    def on(self, route: Route) -> OnRoute:
        """This policy on `route`, one of the routes that it was compiled with."""
        name = route.name
        found = self._on.get(name)
        if found is None:
            found = self._on[name] = self._compile_on(route)
        return found

    def _compile_on(self, route: Route) -> OnRoute:
        checked = [(rule, compile_when(rule.when, self.plan, route)) for rule in self.rules]
        here = [(rule, checks) for rule, checks in checked if checks is not None]
        each, counted = {"requests": 1, "concurrent": 1}, TOKEN_UNITS | {"sessions"}
        priced = self.prices.reads_body and route.usage is not None
        if priced:
            counted |= {"ucredits"}
        else:
            each["ucredits"] = self.price_ucredits
        message = {"requests": 1, "ucredits": self.per_message_ucredits}
        return OnRoute(
            request=_ask(here, route, each, counted),
            message=_ask(here, route, message),
            reads_body=priced or any(rule.reads_body for rule, _ in here),
        )


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Every plan with its policy. One request sees one PolicySet from its start to its end."""

    plans: Mapping[str, CompiledPolicy]

    @classmethod
    def compile(cls, settings: Settings) -> Self:
        """The policies of all plans. Settings from the loader are complete: every plan's policy exists."""
        lease_ms = settings.credits.lease_ms
        shared = tuple(_rule(limit, lease_ms, shared=True) for limit in settings.shared_limits)
        own = {
            name: tuple(_rule(limit, lease_ms) for limit in policy.limits) for name, policy in settings.policies.items()
        }
        return cls(
            MappingProxyType(
                {
                    name: _policy(name, settings.policies[plan.policy], own[plan.policy] + shared)
                    for name, plan in settings.plans.items()
                }
            )
        )

    def plan(self, name: str) -> CompiledPolicy | None:
        """The policy of the plan `name`; None for a plan nobody configured, which is refused with `unknown_plan`."""
        return self.plans.get(name)


def compile_limit(limit: config.Limit, lease_ms: int, shared: bool = False) -> Limit:
    """`limit` as everybody behind the policies knows it. lease_ms: of a slot in flight, which is renewed with the hold.

    shared: it stands under `shared_limits`, and its counters belong to no org.
    """
    unit = "ucredits" if limit.count == "credits" else limit.count
    concurrent, calendar = limit.count == "concurrent", None
    if limit.period is not None:
        calendar = Calendar(limit.period, limit.zone, limit.anchor_minutes)
        window_ms = _PERIOD_MS_MAX[limit.period]
    else:
        window_ms = lease_ms if limit.window_ms is None else limit.window_ms
    return Limit(
        name=limit.name,
        kind="concurrent" if concurrent else limit.algorithm,
        unit=unit,
        scope="+".join(_dimensions(limit)) or ("everybody" if shared else "org"),
        limit=_in_unit(limit.limit, unit),
        window_ms=window_ms,
        burst=_in_unit(limit.burst or 0, unit),
        calendar=calendar,
        shadow=limit.shadow,
        warn_at=limit.warn_at,
        shared=shared,
    )


def claims_needed(settings: Settings) -> frozenset[str]:
    """The claims of a verified token that some limit is per."""
    return frozenset(_named("claim", settings))


def headers_needed(settings: Settings) -> frozenset[str]:
    """The header fields, in lower case, that some limit is per or asks for."""
    asked = (name for limit in _limits(settings) for name in limit.when.header or ())
    return frozenset((*_named("header", settings), *asked))


def _policy(plan: str, policy: Policy, rules: tuple[Rule, ...]) -> CompiledPolicy:
    return CompiledPolicy(
        name=policy.policy,
        plan=plan,
        rules=rules,
        prices=Prices.compile(policy.price),
        per_message_ucredits=policy.price.per_message * UCREDITS_PER_CREDIT,
        default_output_tokens=policy.tokens.default_output,
    )


def _rule(limit: config.Limit, lease_ms: int, *, shared: bool = False) -> Rule:
    return Rule(compile_limit(limit, lease_ms, shared), _dimensions(limit), limit.cardinality, limit.when)


def _ask(
    here: Iterable[tuple[Rule, tuple[Check, ...]]],
    route: Route,
    costs: Mapping[str, int],
    counted: frozenset[str] = frozenset(),
) -> Ask:
    """counted: further units, whose cost only the request itself can tell. What costs nothing asks for nothing."""
    costs = {unit: cost for unit, cost in costs.items() if cost}
    applied = []
    for rule, checks in here:
        limit = rule.limit
        if limit.unit not in costs and limit.unit not in counted:
            continue
        subject = compile_subject(limit.name, rule.dimensions, rule.cardinality, route)
        cost = costs.get(limit.unit)
        ready = Demand(limit, subject, cost) if isinstance(subject, str) and cost and not checks else None
        applied.append(Applied(rule, checks, subject, ready))
    ready_ones = tuple(one.ready for one in applied if one.ready is not None)
    all_ready = ready_ones if len(ready_ones) == len(applied) else None
    return Ask(tuple(applied), costs, all_ready, prices_differ="ucredits" in counted)


def _dimensions(limit: config.Limit) -> tuple[str, ...]:
    return tuple(dimension for dimension in limit.per if dimension != "org")


def _limits(settings: Settings) -> Iterator[config.Limit]:
    for policy in settings.policies.values():
        yield from policy.limits
    yield from settings.shared_limits


def _named(kind: str, settings: Settings) -> Iterator[str]:
    for limit in _limits(settings):
        for dimension in limit.per:
            word, _, name = dimension.partition(":")
            if word == kind:
                yield name


def _in_unit(amount: int, unit: str) -> int:
    """What a policy file counts, in `unit`. Whole credits beyond what scripts count exactly, as plain SQL may write
    them into an override, are no limit in any case."""
    return min(amount, CREDITS_MAX) * UCREDITS_PER_CREDIT if unit == "ucredits" else amount

"""What the configuration amounts to: for every route and plan, the limits, the price and the credits."""

from dataclasses import dataclass

from gateway.config.models import Plan, Route, Settings
from gateway.config.policies import Limit, Policy
from gateway.config.values import format_duration

REFUSED_PATHS_NOTE = (
    "Every other path is refused with 404 unknown_route, and a path above with another method with 405 "
    "method_not_allowed; nothing of them reaches an upstream."
)


@dataclass(frozen=True, slots=True)
class EffectiveLimit:
    """One limit as it bears on one route."""

    name: str
    count: str
    limit: int
    #: None for concurrent requests.
    window_ms: int | None
    per: str
    #: False for a token limit on a route whose tokens nobody reads.
    applies: bool

    def __str__(self) -> str:
        window = "" if self.window_ms is None else f" in {format_duration(self.window_ms)}"
        unused = "" if self.applies else " (not here: the route has no usage reader)"
        return f"{self.name}: {self.limit} {self.count}{window} per {self.per}{unused}"


@dataclass(frozen=True, slots=True)
class EffectiveRow:
    """What an org of `plan` meets on `route`."""

    route: str
    path: str
    #: Empty: every method.
    methods: tuple[str, ...]
    upstream: str
    dialect: str
    usage: str | None
    plan: str
    policy: str
    limits: tuple[EffectiveLimit, ...]
    #: Credits per request.
    price: int
    #: Credits of the plan.
    credits: int


def effective(settings: Settings) -> list[EffectiveRow]:
    """One row per route and plan, in the order of the configuration. Every path without a row is refused."""
    return [
        _row(route, name, plan, settings.policies[plan.policy])
        for route in settings.routes
        for name, plan in settings.plans.items()
    ]


def _row(route: Route, plan_name: str, plan: Plan, policy: Policy) -> EffectiveRow:
    return EffectiveRow(
        route=route.name,
        path=route.path,
        methods=route.method or (),
        upstream=route.upstream,
        dialect=route.dialect,
        usage=route.usage,
        plan=plan_name,
        policy=policy.policy,
        limits=tuple(_limit(limit, route) for limit in policy.limits),
        price=policy.price.per_request,
        credits=plan.credits,
    )


def _limit(limit: Limit, route: Route) -> EffectiveLimit:
    applies = limit.count != "tokens" or route.usage is not None
    return EffectiveLimit(limit.name, limit.count, limit.limit, limit.window_ms, limit.per, applies)

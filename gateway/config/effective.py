"""What the configuration amounts to: for every route and plan, the limits, the price and the credits."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config.limit_rules import TOKEN_COUNTS
from gateway.config.limit_values import format_anchor
from gateway.config.models import Plan, Route, Settings
from gateway.config.policies import Limit, Policy, Price, When
from gateway.config.routes import overlaps
from gateway.config.values import format_duration, format_rate

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
    #: `sliding`, `gcra` or `calendar`; None for concurrent requests.
    algorithm: str | None
    #: None for concurrent requests and calendar periods.
    window_ms: int | None
    #: None but for gcra.
    burst: int | None
    #: None but for calendar, as the two behind it.
    period: str | None
    zone: str | None
    anchor_minutes: int | None
    per: tuple[str, ...]
    #: Only what is given, under the keys of `when`.
    when: Mapping[str, object]
    shadow: bool
    warn_at: float | None
    #: It belongs to no org.
    shared: bool
    #: False where nothing on this route counts against it: the body, or the tokens, that it needs nobody reads.
    applies: bool

    def __str__(self) -> str:
        # "60 requests in 1m, 20 at once per user" would promise 20 to each user of everybody's 60.
        comma = "," if self.algorithm in ("gcra", "calendar") else ""
        noun = "new sessions" if self.count == "sessions" else self.count.replace("_", " ")
        whose = f"per {'+'.join(self.per)}" if self.per else "for everybody together"
        text = f"{self.name}: {self.limit} {noun}{self._window()}{comma} {whose}"
        if self.when:
            text += f", when {' and '.join(_spoken(key, value) for key, value in self.when.items())}"
        if self.warn_at is not None:
            text += f", warns from {self.warn_at * 100:g} %"
        notes = [
            *(["shared by all orgs"] if self.shared else []),
            *(["shadow: never refuses"] if self.shadow else []),
            *([] if self.applies else ["not here: the route has no usage reader"]),
        ]
        return f"{text} ({'; '.join(notes)})" if notes else text

    def _window(self) -> str:
        match self.algorithm:
            case "gcra":
                return f" per {format_duration(self.window_ms or 0)}, burst {self.burst}"
            case "calendar":
                return f" per {self.period} from {_begins(self.period or '', self.anchor_minutes or 0)} {self.zone}"
            case "sliding":
                return f" in {format_duration(self.window_ms or 0)}"
            case _:
                return ""


@dataclass(frozen=True, slots=True)
class EffectivePrice:
    """What requests for some models cost on one route. Credits; rates in micro-credits per million tokens."""

    #: Globs; empty: every other model.
    models: tuple[str, ...]
    per_request: int
    input_rate: int
    output_rate: int

    def __str__(self) -> str:
        parts = [str(self.per_request)] if self.per_request or not (self.input_rate or self.output_rate) else []
        for rate, noun in ((self.input_rate, "input"), (self.output_rate, "output")):
            if rate:
                parts.append(f"{format_rate(rate)} per 1M {noun} tokens")
        text = " + ".join(parts)
        return f"{' '.join(self.models)}: {text}" if self.models else text


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
    #: Those of the policy, then those of all orgs together; without the ones whose `when` can never hold here.
    limits: tuple[EffectiveLimit, ...]
    #: Credits per request, whatever its model and tokens: the flat part of the policy's own price.
    price: int
    #: The first that fits a model counts, the last is the policy's own. On a route whose tokens nobody reads there is
    #: but the flat part.
    prices: tuple[EffectivePrice, ...]
    #: For a model that none of `prices` but the last fits: `deny`, `flat` (the last) or `free`; None: they fit all.
    unknown_model: str | None
    #: The policy has prices by token or by model that do not count here: the route has no usage reader.
    flat_only: bool
    #: Credits of the plan.
    credits: int

    @property
    def spoken_prices(self) -> str:
        """A line for each of `prices`."""
        lines = [str(price) for price in self.prices]
        match self.unknown_model:
            case "deny":
                lines[-1] = "other models: refused"
            case "free":
                lines[-1] = "other models: free"
            case "flat":
                lines[-1] = f"other models: {lines[-1]}"
            case _ if self.flat_only:
                lines[-1] += " (flat: the route has no usage reader)"
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class EffectiveGrant:
    """What a plan brings its orgs, and when. Whole credits."""

    plan: str
    credits: int
    #: `none`, `set_initial`, `top_up`, `reset` or `add`.
    grant: str
    #: None but for the last three, as the two behind it.
    period: str | None
    zone: str | None
    #: None as well where periods begin with the org itself.
    anchor_minutes: int | None

    def __str__(self) -> str:
        created = self.anchor_minutes is None
        begins = "its creation," if created else _begins(self.period or "", self.anchor_minutes or 0)
        when = f"each {self.period} from {begins} {self.zone}"
        match self.grant:
            case "top_up":
                return f"what is missing to {self.credits}, {when}"
            case "reset":
                return f"{self.credits} in place of what is left, {when}"
            case "add":
                return f"{self.credits} on top, {when}"
            case "set_initial":
                return f"{self.credits} once, to a new org"
            case _:
                return "nothing"


def effective_grants(settings: Settings) -> list[EffectiveGrant]:
    """One for each plan, in the order of the configuration."""
    return [
        EffectiveGrant(
            plan=name,
            credits=plan.credits,
            grant=plan.grant,
            period=plan.period if plan.is_periodic else None,
            zone=plan.zone if plan.is_periodic else None,
            anchor_minutes=plan.anchor_minutes if plan.is_periodic else None,
        )
        for name, plan in settings.plans.items()
    ]


def effective(settings: Settings) -> list[EffectiveRow]:
    """One row per route and plan, in the order of the configuration. Every path without a row is refused."""
    return [
        _row(settings, route, name, plan, settings.policies[plan.policy])
        for route in settings.routes
        for name, plan in settings.plans.items()
    ]


def _row(settings: Settings, route: Route, plan_name: str, plan: Plan, policy: Policy) -> EffectiveRow:
    own = [_limit(limit, route, shared=False) for limit in policy.limits if _meets(limit.when, route, plan_name)]
    shared = [
        _limit(limit, route, shared=True) for limit in settings.shared_limits if _meets(limit.when, route, plan_name)
    ]
    return EffectiveRow(
        route=route.name,
        path=route.path,
        methods=route.method or (),
        upstream=route.upstream,
        dialect=route.dialect,
        usage=route.usage,
        plan=plan_name,
        policy=policy.policy,
        limits=(*own, *shared),
        price=policy.price.per_request,
        prices=_prices(policy.price, route),
        unknown_model=policy.price.unknown_model if policy.price.models and route.usage is not None else None,
        flat_only=route.usage is None and _prices(policy.price, None)[0] != _flat(policy.price),
        credits=plan.credits,
    )


def _prices(price: Price, route: Route | None) -> tuple[EffectivePrice, ...]:
    """route: None: one that reads everything."""
    if route is not None and route.usage is None:
        return (_flat(price),)
    models = [EffectivePrice(one.model, one.per_request, one.input_rate, one.output_rate) for one in price.models]
    return (*models, EffectivePrice((), price.per_request, price.input_rate, price.output_rate))


def _flat(price: Price) -> EffectivePrice:
    return EffectivePrice((), price.per_request, 0, 0)


def _meets(when: When, route: Route, plan_name: str) -> bool:
    """Some request of the plan on the route may fulfil `when`, as far as route, method and plan go."""
    if when.route is not None and not any(overlaps(pattern, route.path) for pattern in when.route):
        return False
    if when.method is not None and route.method is not None and not set(when.method) & set(route.method):
        return False
    return when.plan is None or plan_name in when.plan


def _limit(limit: Limit, route: Route, *, shared: bool) -> EffectiveLimit:
    some_model = limit.when.model is not None and "*" not in limit.when.model
    needs_body = limit.count in TOKEN_COUNTS or some_model or limit.when.stream is True
    is_calendar = limit.algorithm == "calendar"
    return EffectiveLimit(
        name=limit.name,
        count=limit.count,
        limit=limit.limit,
        algorithm=None if limit.count == "concurrent" else limit.algorithm,
        window_ms=limit.window_ms,
        burst=limit.burst,
        period=limit.period,
        zone=limit.zone if is_calendar else None,
        anchor_minutes=limit.anchor_minutes if is_calendar else None,
        per=limit.per,
        when=limit.when.model_dump(exclude_none=True),
        shadow=limit.shadow,
        warn_at=limit.warn_at,
        shared=shared,
        applies=not needs_body or route.usage is not None,
    )


def _begins(period: str, anchor_minutes: int) -> str:
    """`the 15th 06:00`, `mon`, `06:00`, `:15`"""
    anchor = format_anchor(period, anchor_minutes)
    if period != "month":
        return anchor
    day, _, clock = anchor.partition(" ")
    ending = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(int(day), "th")
    return f"the {day}{ending} {clock}".rstrip()


def _spoken(key: str, value: object) -> str:
    """One condition of `when`."""
    if key == "stream":
        return "streaming" if value else "not streaming"
    if not isinstance(value, tuple):
        return key
    return f"with {' and '.join(value)}" if key == "header" else f"{key} {' or '.join(value)}"

"""What one file under policies/ says, as frozen values. The keys are explained in policies/README.md."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from gateway.config import limit_rules, rules
from gateway.config.limit_values import (
    PER_MAX,
    Anchor,
    Glob,
    PerText,
    Share,
    SharedPerText,
    Zone,
    one_or_more_or_none,
    per_words,
    shared_per_words,
)
from gateway.config.sections import Section
from gateway.config.values import Flag, HeaderName, Method, Name, Rate, duration, matching, whole

_SOME = Field(min_length=1, max_length=64)
RoutePattern: TypeAlias = Annotated[str, matching(rules.ROUTE_PATH, rules.ROUTE_PATH_FORM)]


class When(Section):
    """Which requests a limit counts: those for which everything given here holds. None: no such condition."""

    #: In the form of a route's path. It means the routes at or below it, or a part of what a route with `/*` takes.
    route: Annotated[tuple[RoutePattern, ...] | None, _SOME, one_or_more_or_none] = None
    method: Annotated[tuple[Method, ...] | None, _SOME, one_or_more_or_none] = None
    #: Globs, case-sensitive: `gpt-4*`. Where nobody reads the body only `*` is true.
    model: Annotated[tuple[Glob, ...] | None, _SOME, one_or_more_or_none] = None
    plan: Annotated[tuple[Name, ...] | None, _SOME, one_or_more_or_none] = None
    stream: Flag | None = None
    #: Fields that must all be there, in lower case.
    header: Annotated[tuple[HeaderName, ...] | None, _SOME, one_or_more_or_none] = None


class Limit(Section):
    """At most `limit` of something, for everybody in the org together or for each of what it is `per`."""

    of_everybody: ClassVar[bool] = False
    name: Annotated[
        str, matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", "a limit name: letters, digits, '_' and '-', at most 32")
    ]
    count: Literal["requests", "tokens", "input_tokens", "output_tokens", "credits", "concurrent", "sessions"]
    #: In `count`; whole credits for `credits`.
    limit: Annotated[int, whole(1, rules.LIMIT_MAX)]
    #: Without meaning for `concurrent`.
    algorithm: Literal["sliding", "gcra", "calendar"] = "sliding"
    #: `sliding`: the interval that never sees more than `limit`. `gcra`: in which `limit` flows back. Else None.
    window_ms: Annotated[int, duration("1s", "31d")] | None = Field(default=None, alias="window")
    #: The most at once; given exactly for `gcra`.
    burst: Annotated[int, whole(1, rules.LIMIT_MAX)] | None = None
    #: Given exactly for `calendar`.
    period: Literal["hour", "day", "week", "month"] | None = None
    #: IANA name; the periods of a `calendar` begin in its local time.
    zone: Zone = "UTC"
    #: Minutes from the natural beginning of the period to where it begins here. In YAML `"06:00"`, `mon`, `"15 06:00"`.
    anchor_minutes: Anchor = Field(default=0, alias="anchor")
    #: As written, each once. Every limit of a policy is the org's own, whether `org` stands here or not.
    per: Annotated[tuple[PerText, ...], Field(min_length=1, max_length=PER_MAX), per_words] = ("org",)
    #: Slots that the values of the dimensions which nobody enumerates are hashed into.
    cardinality: Annotated[int, whole(1, 1_000_000)] = limit_rules.CARDINALITY_DEFAULT
    when: When = Field(default_factory=When)
    #: Judged and counted, never a reason to refuse.
    shadow: Flag = False
    #: The part of the limit from which on clients are warned.
    warn_at: Share | None = None

    def mistakes(self) -> list[rules.Mistake]:
        given = [name for name in self.model_fields_set if getattr(self, name) is not None]
        written = {type(self).model_fields[name].alias or name for name in given}
        values = {key: getattr(self, key) for key in ("count", "limit", "algorithm", "burst", "per")}
        return limit_rules.limit({**values, "window": self.window_ms}, written, shared=self.of_everybody)


class SharedLimit(Limit):
    """At most `limit` of something for all orgs together, or for each of what it is `per`, whoever asks."""

    of_everybody: ClassVar[bool] = True
    #: Empty: one share for everybody.
    per: Annotated[tuple[SharedPerText, ...], Field(max_length=PER_MAX), shared_per_words] = ()


class ModelPrice(Section):
    """What models of some names cost, in place of the policy's own figures."""

    #: Globs, case-sensitive. The first that fits counts.
    model: Annotated[tuple[Glob, ...], _SOME, one_or_more_or_none]
    per_request: Annotated[int, whole(0, rules.CREDITS_MAX)] = 0
    input_rate: Rate = Field(default=0, alias="per_million_input_tokens")
    output_rate: Rate = Field(default=0, alias="per_million_output_tokens")


class Price(Section):
    """What a request costs, in whole credits; by the token in credits per million of them."""

    per_request: Annotated[int, whole(0, rules.CREDITS_MAX)] = 0
    #: Micro-credits per million tokens; in YAML credits, with up to six decimals.
    input_rate: Rate = Field(default=0, alias="per_million_input_tokens")
    output_rate: Rate = Field(default=0, alias="per_million_output_tokens")
    models: tuple[ModelPrice, ...] = Field(default=(), max_length=256)
    #: For a model that none of `models` fits: refuse it, take the figures above, or charge nothing.
    unknown_model: Literal["deny", "flat", "free"] = "flat"
    #: Each message of the client on a WebSocket route with `count_messages`; the connection itself costs per_request.
    per_message: Annotated[int, whole(0, rules.CREDITS_MAX)] = 0


class Tokens(Section):
    """How tokens are reserved before the answer is known."""

    #: Output tokens reserved when a client names no maximum.
    default_output: Annotated[int, whole(1, 10_000_000)] = 1_024


class Policy(Section):
    """The limits and prices that a plan lives under. `policy` is its name."""

    policy: Name
    limits: tuple[Limit, ...] = Field(default=(), max_length=rules.LIMITS_MAX)
    price: Price = Field(default_factory=Price)
    tokens: Tokens = Field(default_factory=Tokens)

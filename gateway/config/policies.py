"""What one file under policies/ says, as frozen values. The keys are explained in policies/README.md."""

from typing import Annotated, Literal

from pydantic import Field

from gateway.config import rules
from gateway.config.sections import Section
from gateway.config.values import Name, duration, matching, whole


class Limit(Section):
    """At most `limit` of something, for everybody in the org together or for each of its users, keys or sessions."""

    name: Annotated[
        str, matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", "a limit name: letters, digits, '_' and '-', at most 32")
    ]
    count: Literal["requests", "tokens", "concurrent"]
    limit: Annotated[int, whole(1, rules.LIMIT_MAX)]
    #: The interval that never sees more than `limit`; None exactly for `concurrent`.
    window_ms: Annotated[int, duration("1s", "31d")] | None = Field(default=None, alias="window")
    per: Literal["org", "user", "key", "session"] = "org"

    def mistakes(self) -> list[rules.Mistake]:
        return rules.limit_window(self.count, self.window_ms is not None)


class Price(Section):
    """What a request costs, in whole credits."""

    per_request: Annotated[int, whole(0, rules.CREDITS_MAX)] = 0
    #: Each message of the client on a WebSocket route with `count_messages`; the connection itself costs per_request.
    per_message: Annotated[int, whole(0, rules.CREDITS_MAX)] = 0


class Tokens(Section):
    """How tokens are reserved before the answer is known."""

    #: Output tokens reserved when a client names no maximum.
    default_output: Annotated[int, whole(1, 10_000_000)] = 1_024


class Policy(Section):
    """The limits and prices that a plan lives under. `policy` is its name."""

    policy: Name
    limits: tuple[Limit, ...] = Field(default=(), max_length=16)
    price: Price = Field(default_factory=Price)
    tokens: Tokens = Field(default_factory=Tokens)

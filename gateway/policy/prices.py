"""What a request costs: the price of its model, what it may come to, and how much of that is to be held.

    hold          wanted                                     enough                     grows
    full          the estimate                               the estimate               no
    clamp         the estimate                               input and a little output  by steps
    incremental   input and a first step of output           input and a little output  by steps

The estimate is the input, taken from the body's size, and the output that the client allows, else the policy's
default. Plain answers arrive whole and can neither grow a hold in time nor be cut, so `incremental` is `clamp` for
them. A flat price is known beforehand, so it is held in full or the request is refused.
"""

import re
from dataclasses import dataclass
from fnmatch import translate
from typing import Literal, Self

from gateway import config
from gateway.charge import UCREDITS_MAX
from gateway.config import Route
from gateway.types import UCREDITS_PER_CREDIT, Peek, Price, Quote
from gateway.usage import tokens_of

#: Output tokens without which it is not worth beginning.
LEAST_OUTPUT_TOKENS = 16
#: Output tokens that `incremental` holds at first, and by which a hold grows.
FIRST_OUTPUT_TOKENS = 512
STEP_OUTPUT_TOKENS = 1024

Hold = Literal["full", "clamp", "incremental"]


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of a policy."""

    #: For every model, unless `models` has another.
    own: Price
    #: The first pattern that fits a model has its price.
    models: tuple[tuple[re.Pattern[str], Price], ...] = ()
    #: Where none fits; None: such a request is refused.
    unknown: Price | None = None

    @classmethod
    def compile(cls, price: config.Price) -> Self:
        own = _price(price)
        models = tuple((re.compile("|".join(map(translate, one.model))), _price(one)) for one in price.models)
        unknown = {"deny": None, "flat": own, "free": Price()}[price.unknown_model]
        return cls(own, models, unknown)

    @property
    def reads_body(self) -> bool:
        """What a request costs cannot be known from its head."""
        return self.own.by_token or bool(self.models)

    @property
    def flat(self) -> Price:
        """Where nobody reads bodies: the flat part, whatever the model and the tokens may be."""
        return Price(self.own.flat_ucredits)

    def of(self, route: Route, peek: Peek | None) -> Price | None:
        """The price of a request; None: its model has none. peek: None for a WebSocket and its messages."""
        if peek is None or route.usage is None:
            return self.flat
        if not self.models:
            return self.own
        model = peek.model or ""
        return next((price for pattern, price in self.models if pattern.match(model)), self.unknown)


def quote_of(price: Price, peek: Peek, default_output_tokens: int, hold: Hold) -> Quote:
    """The quote for a request of which everything is known."""
    if not price.by_token:
        return Quote.flat(price.flat_ucredits)
    input_tokens, output_tokens = _estimate(peek, default_output_tokens)
    estimate = _bounded(price.of(input_tokens, output_tokens))
    if hold == "full":
        return Quote(price, estimate, estimate, estimate)
    least = min(estimate, _bounded(price.of(input_tokens, LEAST_OUTPUT_TOKENS)))
    want = estimate
    if hold == "incremental" and peek.stream:
        want = min(estimate, _bounded(price.of(input_tokens, FIRST_OUTPUT_TOKENS)))
    step = _bounded(Price(0, 0, price.output_rate).of(0, STEP_OUTPUT_TOKENS))
    return Quote(price, want, least, estimate, step)


def credits_asked(price: Price, peek: Peek | None, default_output_tokens: int, room_ucredits: int | None) -> int:
    """What a limit on credits reserves: the estimate. For a client that named no maximum it is cut to `room_ucredits`,
    but never below one token of output: nobody is refused for a maximum that he never named."""
    if peek is None or not price.by_token:
        return price.flat_ucredits
    input_tokens, output_tokens = _estimate(peek, default_output_tokens)
    asked = price.of(input_tokens, output_tokens)
    if peek.max_output_tokens is None and room_ucredits is not None:
        asked = max(min(asked, room_ucredits), price.of(input_tokens, 1))
    return _bounded(asked)


def _estimate(peek: Peek, default_output_tokens: int) -> tuple[int, int]:
    allowed = peek.max_output_tokens
    return max(1, tokens_of(peek.body_bytes)), default_output_tokens if allowed is None else allowed


def _bounded(ucredits: int) -> int:
    return min(ucredits, UCREDITS_MAX)


def _price(written: config.Price | config.ModelPrice) -> Price:
    return Price(written.per_request * UCREDITS_PER_CREDIT, written.input_rate, written.output_rate)

"""How many tokens to reserve for a request before anybody has counted one."""

from collections.abc import Iterable, Mapping

from gateway.types import Limit, Peek
from gateway.usage import tokens_of

#: The units that `token_estimate` has a figure for.
TOKEN_UNITS = frozenset(("tokens", "input_tokens", "output_tokens"))


def token_estimate(peek: Peek, default_output_tokens: int, limits: Iterable[Limit]) -> Mapping[str, int]:
    """What to reserve of each of TOKEN_UNITS, at least 1: the body's bytes as tokens, and the output the client allows.

    limits: all that the request meets. When the client names no maximum, `default_output_tokens` is reserved, cut so
    that the request fits every limit that would refuse it, but never below 1: nobody is refused for a maximum that he
    never named. A shadow limit refuses nobody, so it cuts nothing.
    """
    input_tokens, output_tokens = tokens_of(peek.body_bytes), peek.max_output_tokens
    if output_tokens is None:
        room = [
            limit.capacity - (input_tokens if limit.unit == "tokens" else 0)
            for limit in limits
            if limit.unit in ("tokens", "output_tokens") and not limit.shadow
        ]
        output_tokens = max(1, min([default_output_tokens, *room]))
    return {
        "tokens": max(1, input_tokens + output_tokens),
        "input_tokens": max(1, input_tokens),
        "output_tokens": max(1, output_tokens),
    }

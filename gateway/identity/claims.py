"""What the claims of a verified token say: until when, and about whom. Pure.

Knows neither keys nor signatures: whoever calls this has checked them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from gateway.errors import Unauthenticated
from gateway.identity.source import checked_name, checked_user
from gateway.types import Principal

#: The end of the year 9999: a NumericDate beyond is a mistake (milliseconds, mostly), not a time.
_SECONDS_MAX = 253_402_300_799
_KEY_ID_CHARS_MAX = 128
_KEPT = re.compile(r"[\x21-\x7e]{1,256}")
#: Beyond, a number has more digits than `_KEPT` takes; and turning it into text costs the square of them.
_KEPT_NUMBER_MAX = 10**255


class ClaimNames(Protocol):
    """Which top-level claims name the org, the user and the plan."""

    @property
    def org(self) -> str: ...
    @property
    def user(self) -> str | None: ...
    @property
    def plan(self) -> str | None: ...
    @property
    def default_plan(self) -> str | None: ...


def valid_until_ms(claims: Mapping[str, object], now_ms: int, leeway_ms: int) -> int:
    """The end of the token's life, leeway included. Raises Unauthenticated when now is not within it."""
    exp_ms = _time_ms(claims, "exp")
    if exp_ms is None:
        raise Unauthenticated("The token has no claim `exp`.")
    if now_ms >= exp_ms + leeway_ms:
        raise Unauthenticated("The token has expired.")
    for claim in ("nbf", "iat"):
        start_ms = _time_ms(claims, claim)
        if start_ms is not None and now_ms + leeway_ms < start_ms:
            raise Unauthenticated(f"The token is not valid yet (`{claim}`).")
    return exp_ms + leeway_ms


def principal(claims: Mapping[str, object], names: ClaimNames, kept: Iterable[str] = ()) -> Principal:
    """Whom the claims name. Raises Unauthenticated, naming the claim that is missing or unusable.

    kept: names of claims that go along. One that is missing or unusable is left out: nobody is refused for it.
    """
    org = _text(claims, names.org)
    if org is None:
        raise Unauthenticated(f"The token has no claim `{names.org}` for the organization.")
    user = None if names.user is None else _text(claims, names.user)
    plan = None if names.plan is None else _text(claims, names.plan)
    if plan is None:
        plan = names.default_plan
    if plan is None:
        raise Unauthenticated(f"The token has no claim `{names.plan}` for the plan.")
    key_id = claims.get("jti")
    usable = isinstance(key_id, str) and 0 < len(key_id) <= _KEY_ID_CHARS_MAX and key_id.isprintable()
    return Principal(
        org_id=checked_name(org, f"The claim `{names.org}`"),
        plan=checked_name(plan, f"The claim `{names.plan}`"),
        user_id=None if user is None else checked_user(user, f"The claim `{names.user}`"),
        key_id=str(key_id) if usable else None,
        source="jwt",
        claims={name: text for name in kept if (text := _kept(claims.get(name))) is not None},
    )


def _time_ms(claims: Mapping[str, object], claim: str) -> int | None:
    """A NumericDate (RFC 7519 §2) in milliseconds; None when the claim is absent."""
    seconds = claims.get(claim)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= _SECONDS_MAX:
        raise Unauthenticated(f"The token's claim `{claim}` is not a time.")
    return math.floor(seconds * 1000)


def _text(claims: Mapping[str, object], claim: str) -> str | None:
    """A claim that names something: text, or a number that some issuers use for ids. None when it is absent."""
    found = claims.get(claim)
    if found is None:
        return None
    if isinstance(found, str):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    raise Unauthenticated(f"The token's claim `{claim}` is not text.")


def _kept(value: object) -> str | None:
    """A claim as text that requests can be told apart by: 1 to 256 visible ASCII characters; None for what is none.

    `true` and `false` are written as JSON does, and a number without a fraction alike however it was written.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value == int(value) else repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < _KEPT_NUMBER_MAX else None
    return value if isinstance(value, str) and _KEPT.fullmatch(value) else None

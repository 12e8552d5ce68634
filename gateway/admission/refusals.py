"""Why a request was not admitted, in words for its client. Pure: the script's answer goes in, a Refusal comes out."""

from collections.abc import Sequence

from gateway.types import UCREDITS_PER_CREDIT, Limit, LimitState, Quote, Refusal


def limit_refusal(states: Sequence[LimitState]) -> Refusal:
    """The 429 for limits of which some did not fit, named after the one that takes longest to fit."""
    denied = sorted(
        (state for state in states if state.retry_ms and not state.limit.shadow), key=lambda state: -state.retry_ms
    )
    longest = denied[0]
    limit = longest.limit
    return Refusal(
        status=429,
        code="rate_limit_exceeded",
        message=f"Limit '{limit.name}' of this {limit.scope} is reached: {_amount(limit, longest.used)} of "
        f"{_amount(limit, limit.capacity)} {_in_words(limit)} are used and this request needs "
        f"{_amount(limit, longest.cost)}.",
        retry_after_ms=longest.retry_ms,
        details={
            "limit": limit.name,
            "scope": limit.scope,
            "unit": "credits" if limit.unit == "ucredits" else limit.unit,
            "used": _number(limit, longest.used),
            "max": _number(limit, limit.capacity),
            "requested": _number(limit, longest.cost),
            "retry_after_ms": longest.retry_ms,
            "violated_policies": [state.limit.name for state in denied],
        },
        limits=tuple(states),
    )


def credit_refusal(status: str, quote: Quote, available_ucredits: int, owned_ucredits: int) -> Refusal:
    """402 when the money is gone or too little, 429 when it is only held by requests in flight."""
    details = {
        "required_credits": quote.least_ucredits / UCREDITS_PER_CREDIT,
        "available_credits": max(0, available_ucredits) / UCREDITS_PER_CREDIT,
        "held_credits": max(0, owned_ucredits - available_ucredits) / UCREDITS_PER_CREDIT,
    }
    if status == "INFLIGHT":
        message = "The remaining credits of this organization are held by requests in flight."
        return Refusal(429, "credits_in_flight", message, retry_after_ms=1000, details=details)
    if owned_ucredits > 0:
        message = "This request may cost more than all the credits of this organization."
        return Refusal(402, "request_exceeds_balance", message, should_retry=False, details=details)
    message = "This organization has no credits left for this request."
    return Refusal(402, "insufficient_credits", message, should_retry=False, details=details)


def _in_words(limit: Limit) -> str:
    """`requests per 60 s`"""
    noun = {"concurrent": "requests in flight", "ucredits": "credits", "sessions": "new sessions"}.get(
        limit.unit, limit.unit.replace("_", " ")
    )
    match limit.kind:
        case "concurrent":
            return noun
        case "calendar" if limit.calendar is not None:
            return f"{noun} per {limit.calendar.period}"
        case "gcra":
            return f"{noun} at once"
        case _:
            return f"{noun} per {limit.window_ms / 1000:g} s"


def _number(limit: Limit, amount: int) -> int | float:
    if limit.unit != "ucredits":
        return amount
    credits, fraction = divmod(amount, UCREDITS_PER_CREDIT)
    return amount / UCREDITS_PER_CREDIT if fraction else credits


def _amount(limit: Limit, amount: int) -> str:
    return str(_number(limit, amount))

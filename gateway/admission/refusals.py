"""Why a request was not admitted, in words for its client. Pure: the script's answer goes in, a Refusal comes out."""

from collections.abc import Sequence

from gateway.types import UCREDITS_PER_CREDIT, Demand, Refusal


def limit_refusal(demands: Sequence[Demand], used: Sequence[int], retry_ms: Sequence[int]) -> Refusal:
    """The 429 for demands that did not fit, named after the one that takes longest to fit."""
    longest = max(range(len(demands)), key=lambda index: retry_ms[index])
    demand = demands[longest]
    unit = "requests in flight" if demand.unit == "concurrent" else f"{demand.unit} per {demand.window_ms / 1000:g} s"
    return Refusal(
        status=429,
        code="rate_limit_exceeded",
        message=f"Limit '{demand.name}' of this {demand.scope} is reached: "
        f"{used[longest]} of {demand.limit} {unit} are used and this request needs {demand.cost}.",
        retry_after_ms=retry_ms[longest],
        details={
            "limit": demand.name,
            "scope": demand.scope,
            "unit": demand.unit,
            "used": used[longest],
            "max": demand.limit,
            "requested": demand.cost,
            "violated_policies": [d.name for d, wait in zip(demands, retry_ms, strict=True) if wait > 0],
        },
    )


def credit_refusal(status: str, price_ucredits: int, available_ucredits: int) -> Refusal:
    """402 when the money is gone, 429 when it is only held by requests in flight."""
    details = {
        "required_credits": price_ucredits / UCREDITS_PER_CREDIT,
        "available_credits": max(0, available_ucredits) / UCREDITS_PER_CREDIT,
    }
    if status == "INFLIGHT":
        message = "The remaining credits of this organization are held by requests in flight."
        return Refusal(429, "credits_in_flight", message, retry_after_ms=1000, details=details)
    message = "This organization has no credits left for this request."
    return Refusal(402, "insufficient_credits", message, should_retry=False, details=details)

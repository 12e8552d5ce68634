"""What a policy refuses by itself, without a look at any counter."""

from collections.abc import Iterable

from gateway.policy.estimate import TOKEN_UNITS
from gateway.types import UCREDITS_PER_CREDIT, Demand, Refusal


def never_fits(wanted: Iterable[Demand]) -> Demand | None:
    """The first demand that no waiting can satisfy, because it alone is larger than its limit ever lets through.

    A shadow limit refuses nobody, this way neither.
    """
    return next((one for one in wanted if one.cost > one.limit.capacity and not one.limit.shadow), None)


def request_exceeds_limit(demand: Demand) -> Refusal:
    """The answer for a demand that `never_fits`."""
    limit = demand.limit
    requested: float = demand.cost
    allowed: float = limit.capacity
    unit = limit.unit.replace("_", " ")
    if limit.unit == "ucredits":
        requested, allowed = requested / UCREDITS_PER_CREDIT, allowed / UCREDITS_PER_CREDIT
        unit = "credits"
    advice = "Send a shorter request or ask for fewer output tokens; " if limit.unit in TOKEN_UNITS else ""
    message = (
        f"This request needs about {requested:.15g} {unit}, more than the limit '{limit.name}' of {allowed:.15g} ever "
        f"allows at once. {advice}waiting does not help."
    )
    details = {"limit": limit.name, "scope": limit.scope, "requested": requested, "allowed": allowed}
    return Refusal(400, "request_exceeds_limit", message, should_retry=False, details=details)


def unknown_plan(plan: str) -> Refusal:
    """The answer for a principal whose plan has no policy here."""
    message = "The plan of this organization is not configured on this gateway."
    return Refusal(403, "unknown_plan", message, should_retry=False, details={"plan": plan})


def unknown_model_price(model: str | None) -> Refusal:
    """The answer for a model without a price under a policy that says `unknown_model: deny`."""
    named = "A request that names no model" if model is None else f"The model {model!r}"
    message = f"{named} has no price on this gateway, and the plan of this organization allows priced models only."
    return Refusal(403, "unknown_model_price", message, should_retry=False, details={"model": model, "param": "model"})

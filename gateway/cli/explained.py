"""How `gateway explain` shows what a request would meet."""

from typing import Any

from gateway.cli.output import console, format_credits, format_ms, say, table
from gateway.insight.applying import Bearing, amount, portion, worded
from gateway.insight.verdict import Prospect, tokens_in_words
from gateway.types import LimitState, Refusal


def print_prospect(
    prospect: Prospect, states: dict[str, LimitState], refusal: Refusal | None, available: int | None
) -> None:
    route, who, rules = prospect.route, prospect.principal, prospect.rules
    if route is not None:
        say(f"route     {route.name} → {route.upstream}")
    if who is not None:
        user = f", user {who.user_id}" if who.user_id else ""
        key = f", key {who.key_id}" if who.key_id else ""
        say(f"who       org {who.org_id}{user}{key}")
        say(f"plan      {who.plan}" + (f", policy {rules.name}" if rules is not None else ""))
    if (tokens := tokens_in_words(prospect)) is not None:
        say(f"tokens    {tokens}")
    if (quote := prospect.quote) is not None:
        have = "" if available is None else f", the org has {format_credits(available)} to spend"
        about = f" (estimated; {format_credits(quote.least_ucredits)} will do)" if quote.price.by_token else ""
        say(f"price     {format_credits(quote.estimate_ucredits)} credits{about}{have}")
    met = [bearing for bearing in prospect.bearings if bearing.demand is not None]
    if met:
        columns = ("limit", "what it says", "per", "used#", "needs#", "remaining#", "", "notes")
        cells = [_cells(bearing, prospect, states.get(bearing.limit.name)) for bearing in met]
        console().print("", table(columns, cells, title="Limits that it meets"))
    not_met = [(bearing.limit.name, bearing.because) for bearing in prospect.bearings if bearing.demand is None]
    if not_met:
        console().print("", table(("limit", "why not"), not_met, title="Limits that do not count it"))
    say("")
    for note in prospect.notes:
        say(f"note: {note}")
    say(_verdict(refusal))


def _cells(bearing: Bearing, prospect: Prospect, state: LimitState | None) -> tuple[str, ...]:
    limit, demand = bearing.limit, bearing.demand
    assert demand is not None and prospect.asking is not None  # only limits that are met have a line
    per = ", ".join(f"{name} {value or '-'}" for name, value in portion(bearing.rule, prospect.asking).items())
    notes = [
        *(["override"] if bearing.overridden else []),
        *(["shared by all orgs"] if limit.shared else []),
        *(["shadow"] if limit.shadow else []),
        *([f"portion {demand.subject}"] if demand.subject else []),
    ]
    whose = per or ("everybody" if limit.shared else "org")
    if state is None:
        return limit.name, worded(limit), whose, "-", amount(limit, demand.cost), "-", "", "; ".join(notes)
    verdict = "fits" if not state.retry_ms else f"fits in {format_ms(state.retry_ms)}"
    numbers = amount(limit, state.used), amount(limit, state.cost), amount(limit, state.remaining)
    return limit.name, worded(limit), whose, *numbers, verdict, "; ".join(notes)


def _verdict(refusal: Refusal | None) -> str:
    if refusal is None:
        return "admitted"
    again = ""
    if refusal.retry_after_ms is not None:
        again = f" It would fit in {format_ms(refusal.retry_after_ms)}, if nobody else takes it."
    allowed = refusal.details.get("allow")
    methods = f" Allowed: {', '.join(allowed)}." if allowed else ""
    return f"refused: {refusal.status} {refusal.code}: {refusal.message}{methods}{again}"


def prospect_json(
    prospect: Prospect, states: dict[str, LimitState], refusal: Refusal | None, available: int | None
) -> dict[str, Any]:
    who, rules, seen = prospect.principal, prospect.rules, prospect.peek
    return {
        "method": prospect.facts.method,
        "path": prospect.facts.path,
        "route": prospect.route and prospect.route.name,
        "upstream": prospect.route and prospect.route.upstream,
        "org": who and who.org_id,
        "user": who and who.user_id,
        "key": who and who.key_id,
        "plan": who and who.plan,
        "policy": rules and rules.name,
        "body": seen
        and {
            "bytes": seen.body_bytes,
            "model": seen.model,
            "stream": seen.stream,
            "max_output_tokens": seen.max_output_tokens,
        },
        "tokens": tokens_in_words(prospect),
        "limits": [_limit_json(bearing, prospect, states.get(bearing.limit.name)) for bearing in prospect.bearings],
        "price_ucredits": prospect.quote and prospect.quote.estimate_ucredits,
        "available_ucredits": available,
        "verdict": {
            "admitted": refusal is None,
            "status": refusal and refusal.status,
            "code": refusal and refusal.code,
            "message": refusal and refusal.message,
            "limit": refusal and refusal.details.get("limit"),
            "retry_after_ms": refusal and refusal.retry_after_ms,
        },
        "notes": prospect.notes,
    }


def _limit_json(bearing: Bearing, prospect: Prospect, state: LimitState | None) -> dict[str, Any]:
    limit, demand = bearing.limit, bearing.demand
    assert prospect.asking is not None  # else there were no bearings
    return {
        "name": limit.name,
        "unit": limit.unit,
        "kind": limit.kind,
        "limit": limit.capacity,
        "applies": demand is not None,
        "because": bearing.because or None,
        "overridden": bearing.overridden,
        "shadow": limit.shadow,
        "shared": limit.shared,
        "per": portion(bearing.rule, prospect.asking),
        "subject": demand and (demand.subject or None),
        "cost": state.cost if state else demand and demand.cost,
        "used": state and state.used,
        "remaining": state and state.remaining,
        "fits_in_ms": state and state.retry_ms,
        "resets_in_ms": state and state.reset_ms,
    }

"""What the access log says of a request's limits."""

from collections.abc import Iterator
from typing import Any

from gateway.admission import Hold, actual_of
from gateway.telemetry import Record
from gateway.types import Demand, LimitState


def note_limits(record: Record, hold: Hold) -> None:
    """The record has what was judged and when, by Redis's clock; what each limit was charged in the end is there once
    the hold was settled."""
    shared = hold.shared
    record.judged_at_us, record.settled_at_us = hold.judged_at_us or None, hold.settled_at_us or None
    record.session_known = hold.session_known
    record.judged_by = hold.judged_by
    record.limits = list(_each(hold))
    if shared is not None:
        record.shared_judged_at_us, record.shared_settled_at_us = (
            shared.judged_at_us or None,
            shared.settled_at_us or None,
        )
        record.limits += _each(shared)


def _each(hold: Hold) -> Iterator[dict[str, Any]]:
    """Of a refusal that this process remembered only the limits that it was for, and when each was judged."""
    if not hold.denied_at_us:
        for demand, state in zip(hold.demands, hold.states, strict=False):
            yield _noted(demand, state, hold)
        return
    demands = {demand.limit.name: demand for demand in hold.demands}
    for state, denied_at_us in zip(hold.states, hold.denied_at_us, strict=True):
        yield {**_noted(demands[state.limit.name], state, hold), "denied_at_us": denied_at_us}


def _noted(demand: Demand, state: LimitState, hold: Hold) -> dict[str, Any]:
    limit = state.limit
    noted: dict[str, Any] = {
        "name": limit.name,
        "cost": state.cost,
        "used": state.used,
        "limit": limit.capacity,
    }
    if demand.subject:
        noted["subject"] = demand.subject
    if limit.shadow:
        noted["shadow"] = True
    if limit.warn_at is not None and state.used + state.cost >= limit.warn_at * limit.capacity:
        noted["warned"] = True
    if state.retry_ms:
        noted["retry_ms"] = state.retry_ms
    elif hold.settled_at_us:
        noted["actual"] = actual_of(demand, hold.charge) if state.cost else 0
    return noted

"""Limits and demands as tests write them: in one line, everything that does not matter left out."""

from gateway.types import Calendar, Demand, Limit


def limit(
    name: str = "rpm",
    kind: str = "sliding",
    unit: str = "requests",
    scope: str = "org",
    most: int = 1,
    window_ms: int = 60_000,
    *,
    burst: int = 0,
    calendar: Calendar | None = None,
    shadow: bool = False,
    warn_at: float | None = None,
    shared: bool = False,
) -> Limit:
    """At most `most` of `unit`; of requests in each minute, when nothing else is said."""
    return Limit(name, kind, unit, scope, most, window_ms, burst, calendar, shadow, warn_at, shared)


def demand(
    name: str,
    kind: str,
    unit: str,
    scope: str,
    subject: str,
    most: int,
    window_ms: int,
    cost: int,
    *,
    member: str = "",
    burst: int = 0,
    calendar: Calendar | None = None,
    shadow: bool = False,
    warn_at: float | None = None,
    shared: bool = False,
) -> Demand:
    """`cost` of that limit for `subject`; of the org as a whole, whatever it is called, there is no subject."""
    own = limit(
        name,
        kind,
        unit,
        scope,
        most,
        window_ms,
        burst=burst,
        calendar=calendar,
        shadow=shadow,
        warn_at=warn_at,
        shared=shared,
    )
    return Demand(own, "" if scope == "org" else subject, cost, member)

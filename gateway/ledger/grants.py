"""What plans bring: the credits of a period, granted when somebody first asks in it.

When a period begins is worked out from the plan, its time zone and its anchor at the moment it is asked for. Nothing
runs at midnight, so nothing can be late: an org whose period is over gets the next one's credits with its next request,
and one that slept over several gets the current one's alone. A grant is a ledger entry named after plan and period,
which PostgreSQL takes once.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import structlog

from gateway.config import Plan
from gateway.ledger import books
from gateway.ledger.queries import query
from gateway.limits.calendar import work_out
from gateway.stores import Postgres
from gateway.types import UCREDITS_PER_CREDIT, Balance, Calendar

_DAY_MINUTES = 1440

#: Version, epoch and cap (micro-credits) of an account whose cap was lowered in Redis.
Lowered = tuple[int, int, int]
#: Plan, kind, amount in micro-credits, grant id, begin and end of the period in ms since 1970.
GrantTerms = tuple[str, str, int, str | None, int | None, int | None]

log = structlog.get_logger("gateway.ledger")


@dataclass(frozen=True, slots=True)
class Period:
    """In ms since 1970; `ends_ms` is the first moment after it."""

    starts_ms: int
    ends_ms: int


@dataclass(frozen=True, slots=True)
class Pockets:
    """What a balance is made of. The period's end is in ms since 1970; 0: there is none."""

    org_id: str
    #: Spent first; may end with the period.
    plan_ucredits: int
    #: Never expires; below zero when the org is in debt.
    purchased_ucredits: int
    #: The plan that the org was given something by last; None: none has.
    plan: str | None
    period_ends_ms: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What an org's periods depend on. Times are in ms since 1970."""

    present: bool
    plan: str | None
    #: The period that was noted last.
    period: Period | None
    #: None: nobody knows the org yet.
    created_ms: int | None
    #: Now, by the database's clock.
    clock_ms: int


async def look(postgres: Postgres, org_id: str) -> Facts:
    """What the org's periods depend on, as PostgreSQL has it now. Raises StoreUnavailable."""
    row = await postgres.row(query("grant_facts"), org_id)
    assert row is not None  # a row for every org asked for
    starts_ms, ends_ms = row["period_starts_ms"], row["period_ends_ms"]
    noted = None if starts_ms is None or ends_ms is None else Period(starts_ms, ends_ms)
    return Facts(row["present"], row["plan"], noted, row["created_ms"], row["clock_ms"])


def is_due(plan_name: str, plan: Plan, facts: Facts, *, provision: bool = False) -> bool:
    """The plan brings the org something that nobody has asked for yet: in a new period, under a plan that it did not
    have before and, with `provision`, to an org without a row."""
    if not facts.present:
        return provision and plan.grant != "none"
    if not plan.is_periodic:
        # Once it is noted that there are no periods, nobody asks again.
        return facts.period is not None
    return facts.plan != plan_name or facts.period is None or facts.period.ends_ms <= facts.clock_ms


async def turn(
    postgres: Postgres,
    org_id: str,
    plan_name: str,
    plan: Plan,
    facts: Facts,
    *,
    owed_ucredits: int = 0,
    lowered: Lowered | None = None,
    provision: bool = False,
) -> Balance | None:
    """The org has the grant of the period that `facts.clock_ms` lies in, once however many ask; returns its state.

    owed_ucredits: what Redis owes, as far as is known. lowered: what Redis may owe was lowered to this in the account
    as of this version and epoch. PostgreSQL does the same if the account is still as it was; None when it is not, and
    nothing was granted. What Redis may owe does not expire. For an org without a row nothing is changed without
    `provision`. Raises StoreUnavailable."""
    current = period(plan, facts)
    # What a plan begins with is for orgs that had nothing: who has a row has had its beginning.
    nothing_new = (current is None and facts.present) or _is_covered(plan_name, facts, current)
    terms = grant_terms(plan_name, plan, None if nothing_new else grant_id(plan_name, plan, current), current)
    row = await postgres.row(query("turn"), org_id, *terms, provision, owed_ucredits, lowered)
    assert row is not None  # the function returns the state of any org
    if row["again"]:
        return None
    if row["granted"] is not None:
        log.info(
            "credits granted", org=org_id, grant=terms[3], ucredits=row["granted"], expired_ucredits=row["expired"]
        )
    return books.balance_of(row)


def opening_terms(plan_name: str, plan: Plan, facts: Facts) -> GrantTerms:
    """What `turn` would bring to an org that an operator adds now, whether or not it has a row."""
    current = period(plan, facts)
    covered = _is_covered(plan_name, facts, current)
    return grant_terms(plan_name, plan, None if covered else grant_id(plan_name, plan, current), current)


async def read_pockets(postgres: Postgres, org_id: str) -> Pockets | None:
    """What the org's posted balance is made of; None when it has no row. Raises StoreUnavailable."""
    row = await postgres.row(query("pockets"), org_id)
    if row is None:
        return None
    plan_ucredits = row["plan_micro"]
    return Pockets(org_id, plan_ucredits, row["balance"] - plan_ucredits, row["plan"], row["period_ends_ms"])


def period(plan: Plan, facts: Facts) -> Period | None:
    """The period of `plan` that `facts.clock_ms` lies in; None for a plan without periods."""
    if not plan.is_periodic:
        return None
    # An org that was created by a clock that goes ahead of ours was created now.
    created_ms = facts.clock_ms if facts.created_ms is None else facts.created_ms
    now_ms = max(facts.clock_ms, created_ms)
    anchor = _anchor_of(plan, created_ms) if plan.anchor_minutes is None else plan.anchor_minutes
    _, starts_ms, ends_ms, _ = work_out(Calendar(plan.period, plan.zone, anchor), now_ms)
    return Period(starts_ms, ends_ms)


def grant_id(plan_name: str, plan: Plan, current: Period | None) -> str | None:
    """The name that the grant has in the ledger; None for a plan that grants nothing."""
    if plan.grant == "none":
        return None
    return f"grant:{plan_name}:initial" if current is None else f"grant:{plan_name}:{_iso(current.starts_ms)}"


def _anchor_of(plan: Plan, created_ms: int) -> int:
    """Minutes from the natural beginning of the period to the minute the org was created in, as clocks in the zone show
    it."""
    local = datetime.fromtimestamp(created_ms / 1000, UTC).astimezone(ZoneInfo(plan.zone))
    minutes = local.hour * 60 + local.minute
    match plan.period:
        case "hour":
            return local.minute
        case "day":
            return minutes
        case "week":
            return local.weekday() * _DAY_MINUTES + minutes
        case "month":
            return (local.day - 1) * _DAY_MINUTES + minutes


def _is_covered(plan_name: str, facts: Facts, current: Period | None) -> bool:
    """Most of this period was paid for by the one before: zone or anchor were changed meanwhile. An hour's difference
    must not bring a month's credits twice."""
    if current is None or facts.period is None or facts.plan != plan_name:
        return False
    overlap_ms = min(current.ends_ms, facts.period.ends_ms) - max(current.starts_ms, facts.period.starts_ms)
    return overlap_ms * 2 > current.ends_ms - current.starts_ms


def grant_terms(plan_name: str, plan: Plan, name: str | None, current: Period | None) -> GrantTerms:
    """What gateway.turn wants to know of a plan, between the org and the rest. `name`: None grants nothing."""
    bounds_ms = (None, None) if current is None else (current.starts_ms, current.ends_ms)
    return (plan_name, plan.grant, plan.credits * UCREDITS_PER_CREDIT, name, *bounds_ms)


def _iso(at_ms: int) -> str:
    """2026-05-01T00:00:00Z"""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

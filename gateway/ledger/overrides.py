"""Overrides of limits, one org's own value in place of its policy's: what an operator does to them.

Owns the rules (the limit must exist, the value must be one that its policy could write). How running gateways learn of
a change is the table's own doing (migration 0002), so plain SQL takes effect as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from gateway.config import Limit, Settings
from gateway.config.problems import quoted, suggest, unknown
from gateway.config.rules import LIMIT_MAX
from gateway.ledger.orgs import BadInput, LedgerRefusal, check_label, check_org
from gateway.ledger.queries import query
from gateway.stores import Postgres, Row

#: More than the database lets one org have.
_OF_ONE_ORG_MAX = 100


class UnknownOverride(LedgerRefusal):
    """The org has no such override."""

    code = "unknown_override"
    status = 404


@dataclass(frozen=True, slots=True)
class OverrideRow:
    """An org's own value of a limit, in the unit of the policy file."""

    org_id: str
    limit_name: str
    value: int
    note: str
    set_at: datetime
    #: None when there is no such org here: it may exist in tokens.
    plan: str | None


async def set_override(
    postgres: Postgres, settings: Settings, org_id: str, limit_name: str, value: int, note: str = ""
) -> tuple[OverrideRow, int | None]:
    """The org has `value` of the limit, whatever its policy writes; also returns the override it had before.

    The org need not exist here. Raises BadInput for a limit that no policy has or a value that it cannot have,
    StoreUnavailable."""
    check_org(org_id)
    check_label("note", note)
    _check_name(settings, limit_name)
    org = await postgres.row(query("orgs"), org_id, 1)
    _check_value(settings, None if org is None else org["plan"], limit_name, value)
    row = await postgres.row(query("set_override"), org_id, limit_name, value, note)
    assert row is not None  # an upsert returns what it wrote
    return _override(row), row["was"]


async def unset_override(postgres: Postgres, org_id: str, limit_name: str) -> OverrideRow:
    """The org has its policy's limit again; returns what was removed.

    Raises BadInput, UnknownOverride, StoreUnavailable."""
    check_org(org_id)
    check_label("limit", limit_name)
    row = await postgres.row(query("unset_override"), org_id, limit_name)
    if row is None:
        names = [found.limit_name for found in await list_overrides(postgres, org_id, _OF_ONE_ORG_MAX)]
        raise UnknownOverride(
            f"org {quoted(org_id)} has no override of {quoted(limit_name)}{suggest(limit_name, names)}"
        )
    return _override(row)


async def list_overrides(postgres: Postgres, org_id: str | None, limit: int) -> list[OverrideRow]:
    """The first `limit` overrides in order of org and name, of one org or of all. Raises BadInput, StoreUnavailable."""
    if org_id is not None:
        check_org(org_id)
    return [_override(row) for row in await postgres.rows(query("overrides"), org_id, limit)]


def policy_limit(settings: Settings, plan: str, limit_name: str) -> Limit | None:
    """The limit as the plan's policy writes it; None when it has none of that name, or the plan is not configured."""
    terms = settings.plans.get(plan)
    policy = None if terms is None else settings.policies.get(terms.policy)
    found = () if policy is None else policy.limits
    return next((limit for limit in found if limit.name == limit_name), None)


def _check_name(settings: Settings, limit_name: str) -> None:
    names = {limit.name for limit in _every_limit(settings)}
    if limit_name in names:
        return
    if limit_name in {limit.name for limit in settings.shared_limits}:
        raise BadInput(f"{quoted(limit_name)} is a limit that all orgs share: it belongs to none of them")
    raise BadInput(unknown("limit", limit_name, sorted(names)))


def _check_value(settings: Settings, plan: str | None, limit_name: str, value: int) -> None:
    """The policy could write this value: the org's own where that is known, else any that has the limit."""
    if not 0 < value <= LIMIT_MAX:
        raise BadInput(f"the value must be between 1 and {LIMIT_MAX}, got {value}")
    own = None if plan is None else policy_limit(settings, plan, limit_name)
    meant = [own] if own is not None else [limit for limit in _every_limit(settings) if limit.name == limit_name]
    mistakes = [limit.model_copy(update={"limit": value}).mistakes() for limit in meant]
    if all(mistakes):
        raise BadInput(f"{quoted(limit_name)} cannot be {value}: {mistakes[0][0].text}")


def _every_limit(settings: Settings) -> Iterator[Limit]:
    return (limit for policy in settings.policies.values() for limit in policy.limits)


def _override(row: Row) -> OverrideRow:
    return OverrideRow(row["org_id"], row["limit_name"], row["value"], row["note"], row["set_at"], row["plan"])

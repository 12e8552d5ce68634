"""Plans, and gateways whose orgs have them. Time is moved by telling the database of another period."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.config import Plan
from gateway.ledger import grants
from gateway.ledger.grants import Facts, Period
from gateway.stores import Postgres
from gateway.types import Balance, Charge, Principal, Quote, Refusal
from tests.ledger.conftest import ORG, House
from tests.ledger.running import gateway

CREDIT = 1_000_000
HOUR_MS = 3_600_000

PLANS = """{
  trial: { credits: 100, policy: trial },
  pro: { credits: 10, policy: trial, grant: reset, period: hour },
  team: { credits: 20, policy: trial, grant: add, period: hour },
  tank: { credits: 5, policy: trial, grant: top_up, period: hour } }"""


def plan(grant: str = "reset", credits: int = 10, period: str = "hour", **more: object) -> Plan:
    written = {"credits": credits, "policy": "trial", "grant": grant, **more}
    if grant not in ("none", "set_initial"):
        written["period"] = period
    return Plan.model_validate(written)


@asynccontextmanager
async def planned(redis_url: str, database_url: str, *, works: bool = False, **credits: object) -> AsyncIterator[House]:
    """A gateway that knows of PLANS. works: its background work runs."""
    async with gateway(redis_url, database_url, works=works, listens=works, plans=PLANS, **credits) as house:
        yield house


async def insert(postgres: Postgres, credits: int = 0, org_id: str = ORG) -> None:
    """The application has a row for the org."""
    await postgres.rows("INSERT INTO ai_credits (organization_id, credits) VALUES ($1, $2)", org_id, credits)


async def give(postgres: Postgres, plan_name: str, plan: Plan, at_ms: int = 0, org_id: str = ORG) -> Balance:
    """The org asks when the clock shows `at_ms` (0: now)."""
    facts = await at(postgres, at_ms, org_id)
    balance = await grants.turn(postgres, org_id, plan_name, plan, facts)
    assert balance is not None  # nothing was lowered
    return balance


async def at(postgres: Postgres, at_ms: int = 0, org_id: str = ORG) -> Facts:
    """What is known of the org, when the database's clock shows `at_ms` (0: now)."""
    facts = await grants.look(postgres, org_id)
    return Facts(facts.present, facts.plan, facts.period, facts.created_ms, at_ms or facts.clock_ms)


async def begin_the_hour_before(postgres: Postgres, plan_name: str, plan: Plan, org_id: str = ORG) -> None:
    """The org got what its plan brings in the last hour, which for those who look is not over yet."""
    for table in ("account", "org"):
        await postgres.rows(f"UPDATE gateway.{table} SET created_at = created_at - interval '1 day'")
    now_ms = (await at(postgres, 0, org_id)).clock_ms
    await give(postgres, plan_name, plan, now_ms - HOUR_MS, org_id)
    await _note(postgres, _hour_before(now_ms).starts_ms, now_ms + HOUR_MS, org_id)


async def end_the_hour_before(postgres: Postgres, org_id: str = ORG) -> None:
    """It is over, and who listens hears that something has changed."""
    last = _hour_before((await at(postgres, 0, org_id)).clock_ms)
    await _note(postgres, last.starts_ms, last.ends_ms, org_id)
    await postgres.rows("SELECT pg_notify('gateway_credits', $1)", org_id)


async def let_an_hour_pass(house: House, org_id: str = ORG) -> None:
    """The hour before is over, and Redis knows."""
    await end_the_hour_before(house.postgres, org_id)
    await house.accounts.refresh(org_id)


def _hour_before(at_ms: int) -> Period:
    starts_ms = at_ms // HOUR_MS * HOUR_MS
    return Period(starts_ms - HOUR_MS, starts_ms)


async def _note(postgres: Postgres, starts_ms: int, ends_ms: int, org_id: str) -> None:
    """The org's last grant was for this period."""
    await postgres.rows(
        "UPDATE gateway.account SET version = version + 1, period_starts = to_timestamp($2 / 1000.0), "
        "period_ends = to_timestamp($3 / 1000.0) WHERE org_id = $1",
        org_id,
        starts_ms,
        ends_ms,
    )


async def pay(house: House, hold_id: str, plan_name: str, ucredits: int = CREDIT, org_id: str = ORG) -> str:
    """One request of a member of the plan: `paid`, or why not."""
    async with house.admission.hold(hold_id, member(plan_name, org_id), (), Quote.flat(ucredits)) as verdict:
        if isinstance(verdict, Refusal):
            return verdict.code
        verdict.charge = Charge(ucredits, None, keep_requests=True, basis="exact")
        return "paid"


def member(plan_name: str, org_id: str = ORG) -> Principal:
    return Principal(org_id, plan_name, None, None, "jwt")


async def pockets(postgres: Postgres, org_id: str = ORG) -> tuple[int, int]:
    """Of the plan and purchased, in micro-credits."""
    found = await grants.read_pockets(postgres, org_id)
    assert found is not None
    return found.plan_ucredits, found.purchased_ucredits

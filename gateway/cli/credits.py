"""`gateway credits`: what an organization has, what it was given, and where it went."""

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from gateway import keys
from gateway.cli.audit import audit
from gateway.cli.invocation import Invocation, JsonOption, OrgArgument, invocation, open_ledger
from gateway.cli.output import console, emit_json, format_credits, format_time, remark, say, table
from gateway.cli.reconcile import reconcile
from gateway.config import Stores
from gateway.errors import StoreUnavailable
from gateway.ledger.orgs import EntryRow, Granted, get_pockets, give_credits, list_entries
from gateway.stores import Redis

REDIS_TIMEOUT_MS = 1_000

app = typer.Typer(no_args_is_help=True, help="Credits: grant, balance, ledger; audit, reconcile.")
app.command()(audit)
app.command()(reconcile)


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """What Redis holds of an org: charges on their way to PostgreSQL, and holds of requests in flight."""

    held_ucredits: int
    unposted_ucredits: int
    #: Held in PostgreSQL, or left alone because a lost state of Redis may have owed it.
    set_aside_ucredits: int
    #: What the next request may spend.
    available_ucredits: int


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """The posted balance is the sum of two pockets. `in_redis` is None when Redis could not be asked; `trouble` says
    why."""

    org_id: str
    posted_ucredits: int
    #: Spent first; with a plan that has periods, those of the current one.
    plan_ucredits: int
    #: Never expires.
    purchased_ucredits: int
    #: The plan that granted last.
    plan: str | None
    #: When a request brings the plan's next credits; None: the plan has no periods.
    period_ends: datetime | None
    in_redis: WorkingSet | None
    trouble: str | None


@app.command()
def grant(
    ctx: typer.Context,
    org: OrgArgument,
    amount: Annotated[int, typer.Argument(metavar="AMOUNT", min=1, help="Whole credits.", show_default=False)],
    note: Annotated[str, typer.Option(help="Why; kept in the ledger.")] = "",
    grant_id: Annotated[
        str | None,
        typer.Option("--id", help="A name for this grant: repeating it grants nothing more.", show_default=False),
    ] = None,
    create: Annotated[
        bool, typer.Option("--create", help="Also for an org never seen here, whose identity comes from tokens.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give an organization credits that never expire; running gateways know at once."""
    name = f"grant:cli:{uuid.uuid4()}" if grant_id is None else grant_id
    given = asyncio.run(_grant(invocation(ctx), org, amount, name, note, create))
    if as_json:
        emit_json({"org_id": org, **{field: getattr(given, field) for field in Granted.__slots__}})
    elif given.new:
        say(f"granted {amount} credits to {org}: posted balance {format_credits(given.balance_ucredits)}")
    else:
        say(f"{name} was granted before, nothing changed: posted balance {format_credits(given.balance_ucredits)}")


async def _grant(invoked: Invocation, org: str, amount: int, grant_id: str, note: str, create: bool) -> Granted:
    async with open_ledger(invoked) as ledger:
        return await give_credits(ledger.postgres, org, amount, grant_id=grant_id, note=note, create=create)


@app.command()
def balance(ctx: typer.Context, org: OrgArgument, as_json: JsonOption = False) -> None:
    """Show the posted balance, what of it is plan credit, and, when Redis answers, what is held and available."""
    report = asyncio.run(_balance(invocation(ctx), org))
    if as_json:
        emit_json(report)
        return
    rows = [
        ("posted", format_credits(report.posted_ucredits)),
        ("  of the plan", format_credits(report.plan_ucredits)),
        ("  purchased", format_credits(report.purchased_ucredits)),
    ]
    if report.in_redis is not None:
        rows += [
            ("unposted charges", format_credits(report.in_redis.unposted_ucredits)),
            ("held in flight", format_credits(report.in_redis.held_ucredits)),
            ("set aside", format_credits(report.in_redis.set_aside_ucredits)),
            ("available", format_credits(report.in_redis.available_ucredits)),
        ]
    console().print(table((report.org_id, "credits#"), rows))
    if report.period_ends is not None:
        over = report.period_ends <= datetime.now(UTC)
        ending = "is over since" if over else "ends"
        next_request = ": the next request brings the credits of the current one" if over else ""
        say(f"the period of plan {report.plan} {ending} {format_time(report.period_ends)}{next_request}")
    if report.trouble is not None:
        remark(f"held, unposted and available are not known: {report.trouble}")


async def _balance(invoked: Invocation, org: str) -> BalanceReport:
    async with open_ledger(invoked) as ledger:
        found = await get_pockets(ledger.postgres, org)
        posted = found.plan_ucredits + found.purchased_ucredits
        try:
            in_redis, trouble = await working_set(ledger.settings.stores, org, posted), None
        except StoreUnavailable as exc:
            in_redis, trouble = None, exc.detail or str(exc)
        ends = datetime.fromtimestamp(found.period_ends_ms / 1000, UTC) if found.period_ends_ms else None
        return BalanceReport(
            org, posted, found.plan_ucredits, found.purchased_ucredits, found.plan, ends, in_redis, trouble
        )


async def working_set(stores: Stores, org_id: str, posted_ucredits: int) -> WorkingSet:
    """What Redis holds of the org, as its scripts would count it. Raises StoreUnavailable."""
    if stores.redis == "embedded":
        raise StoreUnavailable(detail="Redis is the embedded one, and `gateway run` is not running here")
    redis = Redis(stores.redis, timeout_ms=REDIS_TIMEOUT_MS, connect_timeout_ms=REDIS_TIMEOUT_MS)
    redis.start()
    try:
        found = await redis.call("HMGET", keys.account(org_id), "p", "u", "h", "s")
    finally:
        await redis.close()
    known, unposted, held, set_aside = (None if value is None else int(value) for value in found)
    # Redis's own view of the posted balance, when it has one: together with `unposted` it counts no charge twice.
    spendable = posted_ucredits if known is None else known
    spendable -= (set_aside or 0) + (unposted or 0) + (held or 0)
    return WorkingSet(held or 0, unposted or 0, set_aside or 0, spendable)


@app.command()
def ledger(
    ctx: typer.Context,
    org: OrgArgument,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=100_000, help="At most so many.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List an organization's newest ledger entries."""
    entries = asyncio.run(_ledger(invocation(ctx), org, limit))
    if as_json:
        emit_json(entries)
    else:
        console().print(entry_table(entries))


async def _ledger(invoked: Invocation, org: str, limit: int) -> list[EntryRow]:
    async with open_ledger(invoked) as opened:
        return await list_entries(opened.postgres, org, limit)


def entry_table(entries: Iterable[EntryRow]) -> Table:
    """Ledger entries as a table."""
    cells = [
        (format_time(entry.at), entry.kind, format_credits(entry.amount_ucredits), entry.request_id, _noted(entry.meta))
        for entry in entries
    ]
    return table(("at", "kind", "credits#", "request or grant", "noted"), cells)


def _noted(meta: Mapping[str, Any]) -> str:
    """`basis=exact model=small`"""
    return " ".join(
        f"{name}={value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
        for name, value in meta.items()
    )

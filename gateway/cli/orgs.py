"""`gateway orgs`: the organizations that API keys belong to."""

import asyncio
from typing import Annotated

import typer

from gateway.cli.credits import entry_table
from gateway.cli.invocation import Invocation, JsonOption, OrgArgument, invocation, open_ledger
from gateway.cli.keys import key_table
from gateway.cli.output import console, emit_json, format_credits, format_time, remark, say, table
from gateway.ledger.orgs import EntryRow, KeyRow, OrgRow, add_org, get_org, list_entries, list_keys, list_orgs

ENTRIES_SHOWN = 10
KEYS_SHOWN = 100

app = typer.Typer(no_args_is_help=True, help="Organizations: add, list, show.")


@app.command()
def add(
    ctx: typer.Context,
    org: OrgArgument,
    plan: Annotated[str, typer.Option("--plan", "-p", help="A plan of gateway.yaml.", show_default=False)],
    name: Annotated[str, typer.Option(help="What people call it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Add an organization and grant it the credits of its plan, once."""
    row = asyncio.run(_add(invocation(ctx), org, plan, name))
    if as_json:
        emit_json(row)
    else:
        say(f"added {row.org_id}: plan {row.plan}, {format_credits(row.balance_ucredits)} credits")
        remark(f"next: gateway keys add {row.org_id}")


async def _add(invoked: Invocation, org: str, plan: str, name: str) -> OrgRow:
    async with open_ledger(invoked) as ledger:
        return await add_org(ledger.postgres, ledger.settings, org, plan, name)


@app.command("list")
def list_(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 1_000,
    as_json: JsonOption = False,
) -> None:
    """List organizations in order of their id."""
    rows = asyncio.run(_list(invocation(ctx), limit))
    if as_json:
        emit_json(rows)
        return
    cells = [
        (
            row.org_id,
            row.plan,
            format_credits(row.balance_ucredits),
            str(row.keys),
            row.name,
            format_time(row.created_at),
        )
        for row in rows
    ]
    console().print(table(("org", "plan", "credits#", "keys#", "name", "added"), cells))
    if not rows:
        remark("no organization yet: gateway orgs add ORG --plan PLAN")
    elif len(rows) == limit:
        remark(f"there may be more than these {limit}: see --limit")


async def _list(invoked: Invocation, limit: int) -> list[OrgRow]:
    async with open_ledger(invoked) as ledger:
        return await list_orgs(ledger.postgres, limit)


@app.command()
def show(ctx: typer.Context, org: OrgArgument, as_json: JsonOption = False) -> None:
    """Show one organization: plan, posted balance, keys, its last ledger entries."""
    row, keys, entries, plan_known = asyncio.run(_show(invocation(ctx), org))
    if as_json:
        emit_json({"org": row, "plan_configured": plan_known, "keys": keys, "entries": entries})
        return
    say(f"{row.org_id}  {row.name}".rstrip())
    balance = format_credits(row.balance_ucredits)
    say(f"plan {row.plan}, posted balance {balance} credits, added {format_time(row.created_at)}")
    if not plan_known:
        remark(f"warning: plan {row.plan!r} is not in the configuration, so every request of this org is refused")
    console().print("", key_table(keys), "", entry_table(entries), sep="\n")


async def _show(invoked: Invocation, org: str) -> tuple[OrgRow, list[KeyRow], list[EntryRow], bool]:
    async with open_ledger(invoked) as ledger:
        row = await get_org(ledger.postgres, org)
        keys = await list_keys(ledger.postgres, org, KEYS_SHOWN)
        entries = await list_entries(ledger.postgres, org, ENTRIES_SHOWN)
        return row, keys, entries, row.plan in ledger.settings.plans

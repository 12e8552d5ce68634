"""`gateway limits`: an organization's own values in place of its policy's."""

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer

from gateway.cli.invocation import Invocation, JsonOption, Ledger, OrgArgument, invocation, open_ledger
from gateway.cli.limits_show import show
from gateway.cli.output import console, emit_json, format_time, remark, say, table
from gateway.config.problems import suggest
from gateway.ledger.orgs import list_orgs
from gateway.ledger.overrides import OverrideRow, list_overrides, policy_limit, set_override, unset_override

#: How many orgs are looked through for the one that was meant.
SUGGEST_FROM_MAX = 1_000

LimitArgument = Annotated[
    str, typer.Argument(metavar="LIMIT", help="A limit's name in the policies.", show_default=False)
]

app = typer.Typer(
    no_args_is_help=True, help="Limits of one organization: show what is used; overrides: set, unset, list."
)
app.command()(show)


@app.command("set")
def set_(
    ctx: typer.Context,
    org: OrgArgument,
    limit: LimitArgument,
    value: Annotated[
        int, typer.Argument(metavar="VALUE", min=1, help="In the limit's unit; whole credits.", show_default=False)
    ],
    note: Annotated[str, typer.Option(help="Why; shown in the list.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Give an organization its own value of a limit; every running gateway applies it within a second."""
    row, was, doubt = asyncio.run(_set(invocation(ctx), org, limit, value, note))
    if as_json:
        emit_json({**asdict(row), "was": was})
    else:
        say(f"{row.org_id} has {row.limit_name} = {row.value}" + (f", before {was}" if was is not None else ""))
    if doubt is not None:
        remark(f"warning: {doubt}")


async def _set(
    invoked: Invocation, org: str, limit: str, value: int, note: str
) -> tuple[OverrideRow, int | None, str | None]:
    async with open_ledger(invoked) as ledger:
        row, was = await set_override(ledger.postgres, ledger.settings, org, limit, value, note)
        return row, was, await _doubt(ledger, row)


async def _doubt(ledger: Ledger, row: OverrideRow) -> str | None:
    """Why the override may not do what was meant."""
    if row.plan is None:
        hint = suggest(row.org_id, [org.org_id for org in await list_orgs(ledger.postgres, SUGGEST_FROM_MAX)])
        return f"there is no org {row.org_id} here{hint}; this applies if tokens or headers name it"
    if row.plan not in ledger.settings.plans:
        return f"plan {row.plan} of {row.org_id} is not in the configuration, so every request of this org is refused"
    if policy_limit(ledger.settings, row.plan, row.limit_name) is None:
        policy = ledger.settings.plans[row.plan].policy
        return f"policy {policy} of plan {row.plan} has no limit {row.limit_name}: nothing changes for {row.org_id} yet"
    return None


@app.command()
def unset(ctx: typer.Context, org: OrgArgument, limit: LimitArgument, as_json: JsonOption = False) -> None:
    """Take an override away: the organization has its policy's limit again, within a second."""
    row, policys = asyncio.run(_unset(invocation(ctx), org, limit))
    if as_json:
        emit_json({**asdict(row), "policy_value": policys})
    else:
        now = "" if policys is None else f": the policy's {policys} again"
        say(f"{row.org_id} no longer has {row.limit_name} = {row.value}{now}")


async def _unset(invoked: Invocation, org: str, limit: str) -> tuple[OverrideRow, int | None]:
    async with open_ledger(invoked) as ledger:
        row = await unset_override(ledger.postgres, org, limit)
        return row, _policy_value(ledger, row)


@app.command("list")
def list_(
    ctx: typer.Context,
    org: Annotated[str | None, typer.Argument(metavar="[ORG]", help="Only its.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many.")] = 1_000,
    as_json: JsonOption = False,
) -> None:
    """List overrides in order of organization and limit, beside what the policy writes."""
    rows = asyncio.run(_list(invocation(ctx), org, limit))
    if as_json:
        emit_json([{**asdict(row), "policy_value": policys} for row, policys in rows])
        return
    cells = [
        (
            row.org_id,
            row.limit_name,
            str(row.value),
            "-" if policys is None else str(policys),
            row.note,
            format_time(row.set_at),
        )
        for row, policys in rows
    ]
    console().print(table(("org", "limit", "value#", "policy's#", "note", "set"), cells))
    if not rows:
        remark("no override" + ("" if org is None else f" for {org}") + ": limits are those of the policies")
    elif len(rows) == limit:
        remark(f"there may be more than these {limit}: see --limit")


async def _list(invoked: Invocation, org: str | None, limit: int) -> list[tuple[OverrideRow, int | None]]:
    async with open_ledger(invoked) as ledger:
        return [(row, _policy_value(ledger, row)) for row in await list_overrides(ledger.postgres, org, limit)]


def _policy_value(ledger: Ledger, row: OverrideRow) -> int | None:
    """What the org's policy writes; None where the org is not known here, or its policy has no such limit."""
    found = None if row.plan is None else policy_limit(ledger.settings, row.plan, row.limit_name)
    return None if found is None else found.limit

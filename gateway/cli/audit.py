"""`gateway credits audit`: whether every credit is accounted for."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.invocation import Invocation, JsonOption, NothingRuns, invocation, open_ledger, open_redis
from gateway.cli.output import complain, console, emit_json, format_credits, remark, say, table
from gateway.ledger.audit import Auditor, Finding, OrgBooks, Report
from gateway.ledger.orgs import get_balance

FAILED = 1
#: Rows of a table; JSON has all.
ROWS_MAX = 50


def audit(
    ctx: typer.Context,
    org: Annotated[str | None, typer.Argument(metavar="[ORG]", help="Only its books.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that ledger, balances, outbox and holds agree, while gateways work; the exit code is 1 where they do not.

    Of every organization: the balance is the sum of the ledger; the application's table has what the ledger accounts
    for; what is held is the sum of the holds, in both stores; what waits is the sum of the outbox; no hold is without a
    lease or has ended; and where Redis has PostgreSQL's version of an account, it has what PostgreSQL has.
    """
    report = asyncio.run(_audit(invocation(ctx), org))
    if as_json:
        emit_json(
            {
                "ok": not report.wrong and report.trouble is None,
                "wrong": report.wrong,
                "remarks": report.remarks,
                "trouble": report.trouble,
                "orgs": report.orgs,
            }
        )
    else:
        _print(report)
    if report.wrong or report.trouble is not None:
        raise typer.Exit(FAILED)


async def _audit(invoked: Invocation, org: str | None) -> Report:
    async with open_ledger(invoked) as ledger:
        if org is not None:
            await get_balance(ledger.postgres, org)  # raises for one that is not there
        try:
            async with open_redis(ledger.settings) as redis:
                return await Auditor(ledger.postgres, redis).audit(org)
        except NothingRuns:
            return await Auditor(ledger.postgres, None).audit(org)


def _print(report: Report) -> None:
    screen = console()
    if len(report.orgs) == 1:
        screen.print(_figures(report.orgs[0]))
    else:
        say(_sums(report.orgs))
    for title, found in (("Worth a look", report.remarks), ("Not accounted for", report.wrong)):
        if found:
            screen.print("", _findings(title, found))
        if len(found) > ROWS_MAX:
            remark(f"and {len(found) - ROWS_MAX} more: see --json")
    if report.trouble is not None:
        complain(f"Redis was not asked, so nobody knows what is held and unposted there: {report.trouble}")
    elif not report.wrong:
        say("every credit is accounted for")


def _figures(books: OrgBooks) -> Table:
    rows = [
        (f"ledger, {books.entries} entries", format_credits(books.ledger_ucredits)),
        ("balance", format_credits(books.balance_ucredits)),
        ("unposted charges", format_credits(books.unposted_ucredits)),
        ("held in flight", format_credits(books.held_ucredits)),
        ("set aside", format_credits(books.set_aside_ucredits)),
    ]
    return table((books.org_id, "credits#"), rows)


def _sums(orgs: Sequence[OrgBooks]) -> str:
    ledger = format_credits(sum(books.ledger_ucredits for books in orgs))
    balances = format_credits(sum(books.balance_ucredits for books in orgs))
    unposted = format_credits(sum(books.unposted_ucredits or 0 for books in orgs))
    held = format_credits(sum(books.held_ucredits or 0 for books in orgs))
    entries = sum(books.entries for books in orgs)
    return (
        f"{len(orgs)} orgs: {entries} ledger entries come to {ledger} credits, the balances to {balances}; "
        f"{unposted} wait to be posted, {held} are held in flight"
    )


def _findings(title: str, found: Sequence[Finding]) -> Table:
    rows = [(one.org_id, one.code, one.text) for one in found[:ROWS_MAX]]
    return table(("org", "what", "in words"), rows, title=title)

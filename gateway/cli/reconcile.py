"""`gateway credits reconcile`: requests cost what the upstream's own log says."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from gateway.cli.invocation import Invocation, JsonOption, invocation, open_ledger
from gateway.cli.output import complain, console, emit_json, format_credits, remark, say, table
from gateway.ledger.corrections import Correction
from gateway.ledger.corrections import reconcile as correct
from gateway.ledger.upstream_log import Said, read_log

FAILED, MISUSED = 1, 2
#: Lines of a table, or that are named as wrong; JSON has all.
ROWS_MAX = 50
#: What is left for a person to look at.
_OPEN = ("unknown", "ambiguous", "without")


LogOption = Annotated[
    str, typer.Option("--from", metavar="FILE", help="JSON lines, or .csv; - is standard input.", show_default=False)
]
ApplyOption = Annotated[bool, typer.Option("--apply", help="Post the corrections; else they are only shown.")]
UnknownOption = Annotated[
    bool, typer.Option("--unknown", help="Charge also what the ledger does not know, where its org is named.")
]


def reconcile(
    ctx: typer.Context,
    log: LogOption,
    apply: ApplyOption = False,
    unknown: UnknownOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare what requests were charged with the upstream's own log, and correct it with --apply.

    Each line says what a request cost in all, by the X-Request-Id that the upstream got:
    {"request_id": "...", "credits": 1.25, "org": "acme"}. With a line that says nothing of the kind, nothing is posted.
    The same file again changes nothing. The exit code is 1 when a request is left for a person to look at.
    """
    said, problems = read_log(log)
    if problems:
        for problem in problems[:ROWS_MAX]:
            remark(problem)
        complain(f"nothing was compared: {len(problems)} lines of {log} are wrong")
        raise typer.Exit(MISUSED)
    found = asyncio.run(_reconcile(invocation(ctx), said, apply, unknown))
    if as_json:
        emit_json(
            {"applied": apply, "counts": _counts(found), "requests": [one for one in found if one.verdict != "right"]}
        )
    else:
        _print(found, apply)
    if any(one.verdict in _OPEN for one in found):
        raise typer.Exit(FAILED)


async def _reconcile(invoked: Invocation, said: Sequence[Said], apply: bool, unknown: bool) -> list[Correction]:
    async with open_ledger(invoked) as ledger:
        return await correct(ledger.postgres, said, unknown_too=unknown, dry=not apply)


def _counts(found: Sequence[Correction]) -> dict[str, int]:
    return dict(sorted(Counter(one.verdict for one in found).items()))


def _print(found: Sequence[Correction], apply: bool) -> None:
    rows = [one for one in found if one.verdict != "right"]
    if rows:
        cells = [
            (
                one.org_id or "-",
                one.request_id,
                format_credits(one.was_ucredits),
                format_credits(one.ucredits),
                one.verdict,
                one.place,
            )
            for one in rows[:ROWS_MAX]
        ]
        console().print(table(("org", "request", "charged#", "log says#", "", "line"), cells))
    if len(rows) > ROWS_MAX:
        remark(f"and {len(rows) - ROWS_MAX} more: see --json")
    counts = ", ".join(f"{count} {verdict}" for verdict, count in _counts(found).items())
    changed = [one.ucredits - (one.was_ucredits or 0) for one in found if one.verdict in ("corrected", "posted")]
    more = format_credits(sum(change for change in changed if change > 0))
    back = format_credits(-sum(change for change in changed if change < 0))
    say(f"{len(found)} requests: {counts or 'none'}; {more} credits charged, {back} given back")
    if changed and not apply:
        remark("nothing was posted: --apply does that")

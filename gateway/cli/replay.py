"""`gateway replay`: an access log against other policies."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.cli.invocation import JsonOption, invocation
from gateway.cli.output import console, emit_json, format_credits, format_time, remark, say, table
from gateway.config import load
from gateway.errors import GatewayError
from gateway.insight.logline import Reading, read
from gateway.insight.order import in_order
from gateway.insight.rerun import Rerun
from gateway.insight.tally import ADMITTED, OfLimit, Tally

#: Rows of a table; JSON has all.
ROWS_MAX = 30


class UnreadableLog(GatewayError):
    """A log cannot be read."""


def replay(
    ctx: typer.Context,
    logs: Annotated[
        list[str],
        typer.Argument(metavar="LOG...", help="Access logs, also of several gateways, also .gz; - is standard input."),
    ],
    policies: Annotated[
        Path | None,
        typer.Option("--policies", "-p", help="A directory of policies in place of the configured one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run access logs against other policies: who would have been refused, by what, and what it would have cost.

    Every request is judged again at the time at which Redis judged it, and settled when it was settled. Under the
    policies that the log was written with, every decision comes out as it was.

    Logs are sorted in temporary files; kept in memory are the requests in flight and the counters that are not empty.
    Routes, plans and shared limits are those of the configuration (--config before the command).
    """
    settings = load(invocation(ctx).config, policies=policies)
    rerun, reading = Rerun(settings), Reading()
    try:
        rerun.run(in_order(read(logs, reading)))
    except OSError as exc:
        raise UnreadableLog(f"{exc.filename or 'the logs'}: {exc.strerror or exc}") from exc
    if as_json:
        emit_json(_json(rerun.tally, reading))
    else:
        _print(rerun.tally, reading)


def _json(tally: Tally, reading: Reading) -> dict[str, Any]:
    decisions = [
        {"then": then, "now": now, "count": count} for (then, now), count in sorted(tally.decisions.items()) if count
    ]
    return {
        "lines": {
            "requests": reading.requests,
            "other_events": reading.others,
            "bad": reading.bad,
            "bad_named": reading.named,
        },
        "from": _time(tally.first_us),
        "to": _time(tally.last_us),
        "decisions": decisions,
        "decided_alike": tally.alike,
        "decided_otherwise": tally.changed,
        "changes": tally.changes,
        "used": {"alike": tally.used_alike, "differs": tally.used_differs, "examples": tally.used_examples},
        "refusals": [_limit_json(one) for one in _by_count(tally)],
        "orgs": [
            {
                "org": name,
                "requests": org.requests,
                "admitted_then": org.admitted_then,
                "admitted_now": org.admitted_now,
                "refused_then": org.refused_then,
                "refused_now": org.refused_now,
                "charged_ucredits_then": org.ucredits_then,
                "charged_ucredits_now": org.ucredits_now,
            }
            for name, org in sorted(tally.orgs.items())
        ],
        "notes": list(tally.notes()),
    }


def _limit_json(one: OfLimit) -> dict[str, Any]:
    return {
        "org": one.org,
        "limit": one.limit,
        "unit": one.unit,
        "scope": one.scope,
        "shadow": one.shadow,
        "shared": one.shared,
        "count": one.count,
        "admitted_then": one.newly,
        "first": _time(one.first_us),
        "last": _time(one.last_us),
        "examples": one.examples,
    }


def _print(tally: Tally, reading: Reading) -> None:
    screen = console()
    say(_headline(tally, reading))
    refusing = [one for one in _by_count(tally) if not one.shadow]
    shadows = [one for one in _by_count(tally) if one.shadow]
    for title, rows in (("Would be refused", refusing), ("Would be refused if these were no shadows", shadows)):
        if rows:
            cells = [
                (
                    one.org,
                    one.limit + (" (shared)" if one.shared else ""),
                    one.scope,
                    str(one.count),
                    str(one.newly),
                    format_time(_moment(one.first_us)),
                    format_time(_moment(one.last_us)),
                    " ".join(one.examples),
                )
                for one in rows[:ROWS_MAX]
            ]
            columns = ("org", "limit", "per", "refused#", "admitted then#", "first", "last", "such as")
            screen.print("", table(columns, cells, title=title))
            _remark_rest(len(rows))
    orgs = sorted(tally.orgs.items(), key=lambda item: (-abs(item[1].ucredits_now - item[1].ucredits_then), item[0]))
    spent = [
        (
            name,
            str(org.requests),
            str(org.admitted_then),
            str(org.admitted_now),
            format_credits(org.ucredits_then),
            format_credits(org.ucredits_now),
        )
        for name, org in orgs[:ROWS_MAX]
    ]
    heads = ("org", "requests#", "admitted then#", "now#", "credits then#", "now#")
    screen.print("", table(heads, spent, title="What it would have cost"), "")
    _remark_rest(len(orgs))
    for note in tally.notes():
        say(f"- {note}")
    for named in reading.named:
        remark(f"not a line of an access log: {named}")
    if reading.bad > len(reading.named):
        remark(f"and {reading.bad - len(reading.named)} more")


def _headline(tally: Tally, reading: Reading) -> str:
    decisions = tally.decisions
    lost = sum(count for (then, now), count in decisions.items() if then == ADMITTED != now)
    won = sum(count for (then, now), count in decisions.items() if now == ADMITTED != then)
    span = (
        f", {format_time(_moment(tally.first_us))} to {format_time(_moment(tally.last_us))}" if tally.first_us else ""
    )
    return (
        f"{reading.requests} requests{span}: {tally.alike} decided as they were, {lost} that were admitted would be "
        f"refused, {won} that were refused would be admitted"
    )


def _remark_rest(count: int) -> None:
    if count > ROWS_MAX:
        remark(f"and {count - ROWS_MAX} more: see --json")


def _by_count(tally: Tally) -> list[OfLimit]:
    return sorted(tally.refusals.values(), key=lambda one: (-one.count, one.org, one.limit))


def _moment(at_us: int) -> datetime | None:
    return datetime.fromtimestamp(at_us / 1_000_000, UTC) if at_us else None


def _time(at_us: int) -> str | None:
    moment = _moment(at_us)
    return None if moment is None else moment.isoformat()

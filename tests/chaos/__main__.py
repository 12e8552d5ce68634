"""`python -m tests.chaos`: runs for a given time and seed, and a table of what was found."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import FAULTS
from tests.chaos.run import JOURNAL, Plan, Report, run
from tests.chaos.stores import KINDS

WIDTH = 200
TOLD_MAX = 40
#: So many faults are called by their names.
NAMED_MAX = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of each run; healing comes on top")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="each with the next seed")
    parser.add_argument("--redis", choices=sorted(KINDS), action="append", help="default: aof")
    parser.add_argument("--fault", choices=sorted(FAULTS), action="append", help="only these; default: all of them")
    parser.add_argument("--each", action="store_true", help="a run for every fault by itself")
    parser.add_argument("--at-once", type=int, default=1, help="faults at the same time, of different subjects")
    parser.add_argument(
        "--credits", action="append", help=f"more of the section credits, each in turn: 'write: through', '{JOURNAL}'"
    )
    parser.add_argument("--markdown", action="store_true", help="the table as docs/guarantees.md has it")
    parser.add_argument("--keep", type=Path, help="a directory for what the gateways of a run with violations logged")
    asked = parser.parse_args(argv)
    names = tuple(asked.fault or FAULTS)
    plan = Plan(asked.seconds, asked.seed, at_once=asked.at_once)
    plans = [
        replace(plan, seed=asked.seed + number, redis=kind, faults=faults, credits=credits)
        for faults in ([(name,) for name in names] if asked.each else [names])
        for credits in asked.credits or [""]
        for kind in asked.redis or ["aof"]
        for number in range(asked.runs)
    ]
    # What furnishing a database logs is nobody's business here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    reports = []
    for plan in plans:
        report = asyncio.run(_run(plan, asked.keep))
        reports.append(report)
        Console(stderr=True, width=WIDTH).print(_told(report), markup=False)
    if asked.markdown:
        sys.stdout.write(markdown(reports) + "\n")
    else:
        Console(width=WIDTH).print(_table(reports))
    return 1 if any(report.verdict.violations for report in reports) else 0


async def _run(plan: Plan, keep: Path | None) -> Report:
    """Whoever ends us ends what we started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(plan, keep)


def _told(report: Report) -> str:
    plan = report.plan
    lines = [
        f"seed {plan.seed}, {plan.redis} {plan.credits}, faults {dict(report.faults)}",
        f"  answers {dict(report.statuses)}, {report.snapshots} snapshots",
        *(f"  {line}" for line in report.verdict.violations[:TOLD_MAX]),
    ]
    return "\n".join(lines)


def _sum(name: str) -> Callable[[Sequence[Report]], str]:
    return lambda group: f"{sum(getattr(report.verdict, name) for report in group):,}"


def _most(name: str) -> Callable[[Sequence[Report]], str]:
    return lambda group: f"{max(getattr(report.verdict, name) for report in group):.1f}"


def _top_up_s(group: Sequence[Report]) -> str:
    seen = sorted(seconds for report in group for seconds in report.seen_after_s)
    return f"{seen[len(seen) // 2]:.2f} / {seen[-1]:.2f}" if seen else "-"


#: What is told of runs that had the same faults and the same Redis.
COLUMNS: dict[str, Callable[[Sequence[Report]], str]] = {
    "fault": lambda group: _name(group[0]),
    "Redis": lambda group: group[0].plan.redis,
    "credits": lambda group: group[0].plan.credits or "defaults",
    "runs": lambda group: str(len(group)),
    "deliveries": _sum("deliveries"),
    "overspent": _sum("overspent_ucredits"),
    "debt": _sum("debt_ucredits"),
    "lost": _sum("lost_settles"),
    "forgiven": _sum("forgiven"),
    "double": _sum("double_charges"),
    "stuck": _sum("stuck_holds"),
    "holds end": _most("holds_ended_s"),
    "at rest": _most("rest_s"),
    "top-up p50 / max": _top_up_s,
    "violations": lambda group: str(sum(len(report.verdict.violations) for report in group)),
}


def _name(report: Report) -> str:
    faults = report.plan.faults
    return " + ".join(faults) if len(faults) <= NAMED_MAX else f"all {len(faults)}"


def _rows(reports: Sequence[Report]) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[Report]] = {}
    for report in reports:
        groups.setdefault((_name(report), report.plan.redis, report.plan.credits), []).append(report)
    return [[figure(group) for figure in COLUMNS.values()] for group in groups.values()]


def _table(reports: Sequence[Report]) -> Table:
    """A line for each set of faults and kind of Redis."""
    found = Table(*COLUMNS)
    for row in _rows(reports):
        found.add_row(*row)
    return found


def markdown(reports: Sequence[Report]) -> str:
    """The same, as a page of text has it."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *_rows(reports)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())

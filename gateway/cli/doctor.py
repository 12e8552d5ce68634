"""`gateway doctor`: everything that is configured is asked, and what is wrong is said with what to do about it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import typer
from rich.text import Text

from gateway.cli.diagnosis import (
    Finding,
    Status,
    collect,
    examine_configuration,
    examine_jwks,
    examine_postgres,
    examine_redis,
    examine_targets,
)
from gateway.cli.invocation import JsonOption, Running, filled_in, invocation, quiet_logging
from gateway.cli.output import console, emit_json, remark, safe, say, table
from gateway.config import Settings
from gateway.errors import ConfigError

PROBLEM_FOUND, CONFIG_WRONG = 1, 2
_COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}


def doctor(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Connect to everything configured and say in plain words what is wrong; exits with 1 when there is a problem."""
    quiet_logging()
    invoked = invocation(ctx)
    try:
        settings = invoked.settings()
    except ConfigError as exc:
        _report(
            [Finding("config.valid", Status.PROBLEM, text, "correct it, then ask again") for text in exc.problems],
            as_json,
        )
        raise typer.Exit(CONFIG_WRONG) from exc
    findings = asyncio.run(examine(settings, invoked.running()))
    _report(findings, as_json)
    if any(finding.status is Status.PROBLEM for finding in findings):
        raise typer.Exit(PROBLEM_FOUND)


async def examine(settings: Settings, running: Running | None) -> list[Finding]:
    """Everything is asked at the same time; the findings stand in the order of the configuration."""
    real = filled_in(settings, running)
    stores = real.stores
    redis = (
        _nothing_runs("redis", "REDIS_URL")
        if stores.redis == "embedded"
        else examine_redis(stores.redis, stores, real.credits.flush_ms)
    )
    postgres = (
        _nothing_runs("postgres", "DATABASE_URL")
        if stores.postgres == "embedded"
        else examine_postgres(stores.postgres, real)
    )
    found = await asyncio.gather(
        collect("config", examine_configuration(settings)),
        collect("redis", redis),
        collect("postgres", postgres),
        collect("upstream", examine_targets(real.upstreams)),
        collect("identity.jwks", examine_jwks(real.identity)),
    )
    return [finding for findings in found for finding in findings]


async def _nothing_runs(name: str, variable: str) -> AsyncIterator[Finding]:
    says = "is the embedded one, and `gateway run` is not running here"
    yield Finding(f"{name}.reachable", Status.PROBLEM, says, f"set {variable}, or start `gateway run`")


def _report(findings: Sequence[Finding], as_json: bool) -> None:
    counts = Counter(finding.status for finding in findings)
    if as_json:
        totals = {status.value: counts[status] for status in Status}
        emit_json({"ok": counts[Status.PROBLEM] == 0, "counts": totals, "findings": findings})
        return
    rows = [
        (Text(finding.status.value, _COLOURS[finding.status]), finding.name, _words(finding)) for finding in findings
    ]
    console().print(table(("", "what", "found"), rows))
    say("")
    if counts[Status.PROBLEM] or counts[Status.WARNING]:
        say(f"{_count(counts[Status.PROBLEM], 'problem')}, {_count(counts[Status.WARNING], 'warning')}")
    else:
        say("nothing is wrong")
    if counts[Status.PROBLEM]:
        remark("problems keep the gateway from working as it should; warnings are for you to weigh")


def _words(finding: Finding) -> Text:
    words = Text(safe(finding.says))
    if finding.hint:
        words.append(f"\n→ {safe(finding.hint)}", "dim")
    return words


def _count(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"

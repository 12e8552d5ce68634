"""`gateway limits show`: what an organization's limits are at now."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from gateway import keys
from gateway.cli.invocation import (
    Invocation,
    JsonOption,
    Ledger,
    OrgArgument,
    invocation,
    open_ledger,
    open_redis,
)
from gateway.cli.output import console, emit_json, format_ms, remark, say, table
from gateway.config import Route, Settings
from gateway.config.problems import unknown
from gateway.insight.applying import amount, conditions, portion, unmet, worded
from gateway.insight.peeking import Live, live_counters, peek
from gateway.ledger.orgs import BadInput, check_org
from gateway.ledger.overrides import list_overrides
from gateway.policy import Asking, CompiledPolicy, PolicySet
from gateway.policy.compile import Rule
from gateway.policy.subjects import compile_subject
from gateway.stores import Redis
from gateway.types import Demand, Facts, Limit, LimitState, Peek, Principal

OVERRIDES_MAX = 100
FULLEST_MAX = 5

#: The dimension of a limit, and the option that gives its value.
_OPTIONS = {
    "user": "--user",
    "key": "--key",
    "model": "--model",
    "session": "--session",
    "route": "--route",
    "upstream": "--route",
    "client_ip": "--client-ip",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One limit of the org's policy, or one that all share."""

    rule: Rule
    limit: Limit
    #: What it is per, and the values that were given.
    per: Mapping[str, str | None]
    #: Why its state is not shown: it does not count such requests, or options are missing.
    without: str
    subject: str
    state: LimitState | None = None
    live: Live | None = None


def show(
    ctx: typer.Context,
    org: OrgArgument,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Its plan; else the one it was added with.", show_default=False)
    ] = None,
    user: Annotated[str | None, typer.Option(help="For limits per user.", show_default=False)] = None,
    key: Annotated[str | None, typer.Option(help="Id of an API key, for limits per key.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="For limits per or on a model.", show_default=False)] = None,
    session: Annotated[str | None, typer.Option(help="For limits per session.", show_default=False)] = None,
    route: Annotated[
        str | None, typer.Option(help="A route's name or path, for limits per or on a route.", show_default=False)
    ] = None,
    client_ip: Annotated[str | None, typer.Option(help="For limits per client_ip.", show_default=False)] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also how many counters of each limit are live, and the fullest of them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an organization has used of its limits now: nothing is taken, and nobody is slowed down.

    Limits that are per something else need to be told of what: per user with --user, and so on. Without it --all
    counts their live counters, for which it looks through the keys of the server.
    """
    given = {"user": user, "key": key, "model": model, "session": session, "route": route, "client_ip": client_ip}
    asked = {name: value for name, value in given.items() if value is not None}
    plan, policy, at_us, rows, complete = asyncio.run(_show(invocation(ctx), org, plan, asked, everything))
    if as_json:
        emit_json(
            {
                "org": org,
                "plan": plan,
                "policy": policy,
                "at_us": at_us,
                "limits": [_json(row) for row in rows],
                "all_keys_seen": complete if everything else None,
            }
        )
        return
    say(f"{org}: plan {plan}, policy {policy}")
    columns = ("limit", "what it says", "per", "used#", "remaining#", "fits again", "all there again", "notes")
    console().print(table(columns, [_cells(row) for row in rows]))
    if everything:
        _print_live(rows)
        if not complete:
            remark("the server has more keys than were looked at: there may be more counters")


async def _show(
    invoked: Invocation, org: str, plan: str | None, asked: Mapping[str, str], everything: bool
) -> tuple[str, str, int, list[Row], bool]:
    check_org(org)
    async with open_ledger(invoked) as ledger, open_redis(ledger.settings) as redis:
        settings = ledger.settings
        plan = plan or await plan_of(ledger, org)
        rules = PolicySet.compile(settings).plan(plan)
        if rules is None:
            raise BadInput(unknown("plan", plan, sorted(settings.plans)))
        rows = _rows(settings, rules, org, asked, await overrides_of(ledger, org))
        at_us, rows = await _with_states(redis, org, rows, rules)
        complete = True
        if everything:
            rows, complete = await _with_live(redis, org, rows)
        return plan, rules.name, at_us, rows, complete


async def plan_of(ledger: Ledger, org: str) -> str:
    """The plan that the org was added with. Raises BadInput for one that is not known here."""
    row = await ledger.postgres.row("SELECT plan FROM gateway.org WHERE org_id = $1", org)
    if row is None:
        raise BadInput(f"there is no org {org} here; if tokens or headers name it, say its plan with --plan")
    return str(row["plan"])


async def overrides_of(ledger: Ledger, org: str) -> dict[str, int]:
    """What the org has in place of its policy's limits."""
    return {row.limit_name: row.value for row in await list_overrides(ledger.postgres, org, OVERRIDES_MAX)}


def _rows(
    settings: Settings, rules: CompiledPolicy, org: str, asked: Mapping[str, str], overrides: Mapping[str, int]
) -> list[Row]:
    route = _route(settings, asked.get("route"))
    asking = _asking(org, rules.plan, route, asked, overrides)
    known = {"plan", *(("route", "method") if "route" in asked else ()), *({"model"} & asked.keys())}
    rows = []
    for rule in rules.rules:
        missing = [name for name in rule.dimensions if not _is_given(name, asked)]
        failing = list(unmet(rule.when, rules.plan, asking, known))
        without = "; ".join(failing)
        if missing and not failing:
            without = "per " + "+".join(rule.dimensions) + ": " + ", ".join(_how_to_give(name) for name in missing)
        subject = "" if without else _subject(rule, route, asking)
        per = {name: value if _is_given(name, asked) else None for name, value in portion(rule, asking).items()}
        rows.append(Row(rule, rule.bound_by(overrides), per, without, subject))
    return rows


def _is_given(dimension: str, asked: Mapping[str, str]) -> bool:
    return ("route" if dimension == "upstream" else dimension) in asked


def _how_to_give(dimension: str) -> str:
    return f"say {_OPTIONS[dimension]}" if dimension in _OPTIONS else f"{dimension} cannot be given here, see --all"


def _route(settings: Settings, named: str | None) -> Route:
    """The route of this name or path; any, when none was named: nothing is asked of it then."""
    if named is None:
        return settings.routes[0]
    for route in settings.routes:
        if named in (route.name, route.path):
            return route
    raise BadInput(unknown("route", named, [route.name for route in settings.routes]))


def _asking(org: str, plan: str, route: Route, asked: Mapping[str, str], overrides: Mapping[str, int]) -> Asking:
    facts = Facts(
        request_id="",
        method=route.method[0] if route.method else "GET",
        path=route.path,
        target=route.path.encode(),
        headers=(),
        client_ip=asked.get("client_ip", ""),
        peer_ip="",
    )
    session = asked.get("session")
    return Asking(
        Principal(org, plan, asked.get("user"), asked.get("key"), source=""),
        facts,
        route,
        Peek(0, asked.get("model")),
        None if session is None else keys.digest(session),
        overrides,
    )


def _subject(rule: Rule, route: Route, asking: Asking) -> str:
    found = compile_subject(rule.limit.name, rule.dimensions, rule.cardinality, route)
    return found if isinstance(found, str) else found.of(asking, {})


async def _with_states(redis: Redis, org: str, rows: list[Row], rules: CompiledPolicy) -> tuple[int, list[Row]]:
    """The rows with what one unit of each would find now, and when that was."""
    states: dict[str, LimitState] = {}
    at_us = 0
    for owner, shared in ((org, False), (keys.SHARED, True)):
        demands = [_one(row, rules) for row in rows if not row.without and row.limit.shared is shared]
        if demands:
            hold = await peek(redis, owner, demands)
            at_us = hold.judged_at_us
            states |= {state.limit.name: state for state in hold.states}
    return at_us, [replace(row, state=states.get(row.limit.name)) for row in rows]


def _one(row: Row, rules: CompiledPolicy) -> Demand:
    limit = row.limit
    cost = max(1, rules.price_ucredits) if limit.unit == "ucredits" else 1
    return Demand(limit, row.subject, cost, keys.digest("") if limit.unit == "sessions" else "")


async def _with_live(redis: Redis, org: str, rows: list[Row]) -> tuple[list[Row], bool]:
    live: dict[str, Live] = {}
    complete = True
    for owner, shared in ((org, False), (keys.SHARED, True)):
        wanted = [row.limit for row in rows if row.limit.shared is shared]
        if wanted:
            found, whole = await live_counters(redis, owner, wanted, FULLEST_MAX)
            live |= found
            complete &= whole
    return [replace(row, live=live.get(row.limit.name)) for row in rows], complete


def _cells(row: Row) -> tuple[str, ...]:
    limit, state = row.limit, row.state
    per = ", ".join(f"{name} {value}" if value is not None else name for name, value in row.per.items())
    whose = per or ("everybody" if limit.shared else "org")
    if state is None:
        return limit.name, worded(limit), whose, "-", "-", "-", "-", _notes(row, row.without)
    return (
        limit.name,
        worded(limit),
        whose,
        amount(limit, state.used),
        amount(limit, state.remaining),
        "now" if not state.retry_ms else f"in {format_ms(state.retry_ms)}",
        "-" if state.reset_ms is None else "now" if not state.reset_ms else f"in {format_ms(state.reset_ms)}",
        _notes(row, conditions(row.rule.when)),
    )


def _notes(row: Row, more: str) -> str:
    own = row.rule.limit
    return "; ".join(
        filter(
            None,
            (
                f"override, the policy says {amount(own, own.limit)}" if row.limit is not own else "",
                "shared by all orgs" if row.limit.shared else "",
                "shadow" if row.limit.shadow else "",
                more,
            ),
        )
    )


def _print_live(rows: Iterable[Row]) -> None:
    cells = [
        (
            row.limit.name,
            str(row.live.count),
            ", ".join(
                f"{subject or 'org'}: {amount(row.limit, used)} of {amount(row.limit, row.limit.capacity)}"
                for subject, used in row.live.fullest
            ),
        )
        for row in rows
        if row.live is not None
    ]
    console().print("", table(("limit", "live counters#", "the fullest"), cells))


def _json(row: Row) -> dict[str, Any]:
    limit, state = row.limit, row.state
    live = row.live and {
        "counters": row.live.count,
        "fullest": [{"subject": subject, "used": used} for subject, used in row.live.fullest],
    }
    return {
        "name": limit.name,
        "unit": limit.unit,
        "kind": limit.kind,
        "scope": limit.scope,
        "limit": limit.capacity,
        "overridden": limit is not row.rule.limit,
        "shadow": limit.shadow,
        "shared": limit.shared,
        "when": conditions(row.rule.when) or None,
        "per": row.per,
        "subject": row.subject or None,
        "not_shown": row.without or None,
        "used": state and state.used,
        "remaining": state and state.remaining,
        "fits_in_ms": state and state.retry_ms,
        "resets_in_ms": state and state.reset_ms,
        "live": live,
    }

"""`gateway check`: what the configuration amounts to, or everything that is wrong with it."""

from itertools import groupby
from typing import Annotated, Any

import typer

from gateway.cli.counters import Bounds, Counters, bounds
from gateway.cli.invocation import JsonOption, invocation
from gateway.cli.output import console, emit_json, remark, say, table
from gateway.config import REFUSED_PATHS_NOTE, EffectiveGrant, EffectiveRow, effective, effective_grants, json_schema
from gateway.errors import ConfigError


def check(
    ctx: typer.Context,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of gateway.yaml instead.")] = False,
    policy_schema: Annotated[
        bool, typer.Option("--policy-schema", help="Print the JSON Schema of a policy file instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate the configuration and print what every plan meets on every route."""
    if schema and policy_schema:
        raise typer.BadParameter("--schema and --policy-schema are two documents: ask for one")
    if schema or policy_schema:
        emit_json(json_schema("policy" if policy_schema else "gateway"))
        return
    invoked = invocation(ctx)
    try:
        settings = invoked.settings()
    except ConfigError as exc:
        if as_json:
            emit_json({"ok": False, "problems": exc.problems})
        raise
    rows, grants, memory = effective(settings), effective_grants(settings), bounds(settings)
    if as_json:
        emit_json(
            {"ok": True, "rows": rows, "plans": grants, "memory": _memory_json(memory), "note": REFUSED_PATHS_NOTE}
        )
        return
    _print_rows(rows)
    _print_grants(grants)
    _print_memory(memory)
    say(REFUSED_PATHS_NOTE)
    remark(f"{invoked.config} is valid")


def _print_rows(rows: list[EffectiveRow]) -> None:
    """One table per route, one line per plan."""
    screen = console()
    for _, of_one_route in groupby(rows, key=lambda row: (row.route, row.upstream, row.dialect, row.usage)):
        plans = list(of_one_route)
        route = plans[0]
        title = f"{route.route} → {route.upstream}  (errors: {route.dialect}, tokens: {route.usage or 'not read'})"
        cells = [
            (row.plan, row.policy, str(row.credits), row.spoken_prices, "\n".join(map(str, row.limits)) or "none")
            for row in plans
        ]
        screen.print(table(("plan", "policy", "credits#", "price#", "limits"), cells, title=title), "")


def _print_grants(grants: list[EffectiveGrant]) -> None:
    cells = [(grant.plan, str(grant)) for grant in grants]
    console().print(table(("plan", "credits"), cells, title="What plans bring"), "")


def _print_memory(memory: Bounds) -> None:
    """The most that the counters of limits can take, and which limit takes most of it."""
    cells = [(name, "each org", *_memory_cells(of_policy)) for name, of_policy in memory.policies.items()]
    if memory.shared:
        cells.append(("shared_limits", "all orgs", *_memory_cells(memory.shared)))
    title = "Memory of the counters in Redis, at most"
    console().print(table(("policy", "for", "counters#", "memory#", "most of it"), cells, title=title), "")


def _memory_cells(counted: list[Counters]) -> tuple[str, str, str]:
    if not counted:
        return "0", _size(0), "none"
    most = max(counted, key=lambda one: one.bytes_max)
    detail = f"{most.limit}: {most.counters_max} of {_size(most.counter_bytes_max)}"
    return str(sum(one.counters_max for one in counted)), _size(sum(one.bytes_max for one in counted)), detail


def _memory_json(memory: Bounds) -> dict[str, Any]:
    return {
        "policies": {name: _sum_json(of_policy) for name, of_policy in memory.policies.items()},
        "shared_limits": _sum_json(memory.shared),
    }


def _sum_json(counted: list[Counters]) -> dict[str, Any]:
    return {"bytes_max": sum(one.bytes_max for one in counted), "limits": counted}


def _size(size_bytes: int) -> str:
    """To a tenth of the largest unit that it fills: `13.2 MiB`."""
    for unit, bytes_each in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= bytes_each:
            return f"{size_bytes / bytes_each:.1f} {unit}"
    return f"{size_bytes} B"

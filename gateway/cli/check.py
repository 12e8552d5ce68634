"""`gateway check`: what the configuration amounts to, or everything that is wrong with it."""

from itertools import groupby
from typing import Annotated

import typer

from gateway.cli.invocation import JsonOption, invocation
from gateway.cli.output import console, emit_json, remark, say, table
from gateway.config import REFUSED_PATHS_NOTE, EffectiveRow, effective, json_schema
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
        rows = effective(invoked.settings())
    except ConfigError as exc:
        if as_json:
            emit_json({"ok": False, "problems": exc.problems})
        raise
    if as_json:
        emit_json({"ok": True, "rows": rows, "note": REFUSED_PATHS_NOTE})
        return
    _print_rows(rows)
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
            (row.plan, row.policy, str(row.credits), str(row.price), "\n".join(map(str, row.limits)) or "none")
            for row in plans
        ]
        screen.print(table(("plan", "policy", "credits#", "price#", "limits"), cells, title=title), "")

"""`gateway migrate`: the database is at this release's schema. A gateway also does this when it starts."""

import asyncio

import typer

from gateway.cli.invocation import Invocation, JsonOption, invocation, open_ledger
from gateway.cli.output import emit_json, say
from gateway.ledger import Binding
from gateway.ledger import migrate as bring_up_to_date


def migrate(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Bring the database to this release's schema and to the table that gateway.yaml names; doing it again changes
    nothing."""
    applied = asyncio.run(_migrate(invocation(ctx)))
    if as_json:
        emit_json({"applied": applied})
    elif applied:
        say(f"applied {applied} migration{'s' if applied > 1 else ''}; the database is at this release's schema")
    else:
        say("nothing to do: the database is at this release's schema")


async def _migrate(invoked: Invocation) -> int:
    async with open_ledger(invoked, migrated=False) as ledger:
        return await bring_up_to_date(ledger.postgres, Binding.of(ledger.settings.credits))

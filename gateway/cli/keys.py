"""`gateway keys`: what opens the gateway for an organization. A key's secret is shown once and kept nowhere."""

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table

from gateway.cli.invocation import Invocation, JsonOption, OrgArgument, invocation, open_ledger
from gateway.cli.output import console, emit_json, format_time, remark, say, table
from gateway.config import format_duration, parse_duration
from gateway.identity.api_key import PREFIX, new_key
from gateway.ledger.orgs import BadInput, KeyRow, NewKey, add_key, list_keys, revoke_key

EXPIRES_MS_MIN = 1_000
EXPIRES_MS_MAX = 3_650 * 86_400_000

app = typer.Typer(no_args_is_help=True, help="API keys: add, list, revoke.")


@app.command()
def add(
    ctx: typer.Context,
    org: OrgArgument,
    user: Annotated[str | None, typer.Option(help="Its requests are this user's.", show_default=False)] = None,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[str | None, typer.Option(help="Ends after this time: 12h, 30d.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key and print its secret, this once: the secret alone on standard output."""
    expires_at = None if expires is None else _moment_after(expires)
    key = new_key()
    new = NewKey(key.key_id, key.sha256, user, name, expires_at)
    row = asyncio.run(_add(invocation(ctx), org, new))
    if as_json:
        emit_json({"secret": key.secret, **_fields(row)})
    else:
        typer.echo(key.secret)
        until = f"until {format_time(row.expires_at)}" if row.expires_at else "until it is revoked"
        remark(f"{row.key_id} opens the gateway for {row.org_id} {until}")
    remark("keep the secret now: it is not stored and cannot be shown again")


async def _add(invoked: Invocation, org: str, key: NewKey) -> KeyRow:
    async with open_ledger(invoked) as ledger:
        return await add_key(ledger.postgres, org, key)


@app.command("list")
def list_(
    ctx: typer.Context,
    org: OrgArgument,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest.")] = 1_000,
    as_json: JsonOption = False,
) -> None:
    """List an organization's keys, newest first, revoked and expired ones too; never a secret."""
    rows = asyncio.run(_list(invocation(ctx), org, limit))
    if as_json:
        emit_json([_fields(row) for row in rows])
        return
    console().print(key_table(rows))
    if not rows:
        remark(f"no key yet: gateway keys add {org}")
    elif len(rows) == limit:
        remark(f"there may be more than these {limit}: see --limit")


async def _list(invoked: Invocation, org: str, limit: int) -> list[KeyRow]:
    async with open_ledger(invoked) as ledger:
        return await list_keys(ledger.postgres, org, limit)


@app.command()
def revoke(
    ctx: typer.Context,
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As `keys list` shows it.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Revoke a key: every running gateway refuses it at once."""
    if key_id.startswith(PREFIX):
        raise BadInput("that is a key itself, not its id (key_...): `gateway keys list ORG` shows the ids")
    row, changed = asyncio.run(_revoke(invocation(ctx), key_id))
    if as_json:
        emit_json({**_fields(row), "changed": changed})
    elif changed:
        say(f"revoked {row.key_id} of {row.org_id}")
    else:
        say(f"{row.key_id} of {row.org_id} was revoked already, at {format_time(row.revoked_at)}")


async def _revoke(invoked: Invocation, key_id: str) -> tuple[KeyRow, bool]:
    async with open_ledger(invoked) as ledger:
        return await revoke_key(ledger.postgres, key_id)


def key_table(rows: Iterable[KeyRow]) -> Table:
    """The keys as a table."""
    cells = [
        (
            row.key_id,
            _state(row),
            row.user_id or "-",
            row.name,
            format_time(row.created_at),
            format_time(row.expires_at),
        )
        for row in rows
    ]
    return table(("key", "state", "user", "name", "made", "expires"), cells)


def _fields(row: KeyRow) -> dict[str, str | datetime | None]:
    return {
        "key_id": row.key_id,
        "org_id": row.org_id,
        "state": _state(row),
        "user_id": row.user_id,
        "name": row.name,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }


def _state(row: KeyRow) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "expired" if row.expires_at is not None and row.expires_at <= datetime.now(UTC) else "live"


def _moment_after(duration: str) -> datetime:
    try:
        duration_ms = parse_duration(duration)
    except ValueError as exc:
        raise BadInput(f"--expires: {exc}") from exc
    if not EXPIRES_MS_MIN <= duration_ms <= EXPIRES_MS_MAX:
        low, high = format_duration(EXPIRES_MS_MIN), format_duration(EXPIRES_MS_MAX)
        raise BadInput(f"--expires: a key lives between {low} and {high}, got {duration}")
    return datetime.now(UTC) + timedelta(milliseconds=duration_ms)

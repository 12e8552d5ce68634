"""PostgreSQL: is it there, at our schema, writable, and does it tell us of changes?"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

from gateway.cli.diagnosis.finding import (
    ASK_TIMEOUT_MS,
    Finding,
    clock_finding,
    latency_finding,
    ok,
    problem,
    reason,
    warning,
)
from gateway.config import Credits, Settings
from gateway.errors import ConfigError, StoreUnavailable
from gateway.ledger import Binding, pending, query
from gateway.stores import Postgres, Row

VERSION_MIN = 13
CONNECTIONS_SHARE_WARNING, CONNECTIONS_SHARE_PROBLEM = 0.8, 0.95
DEAD_LETTERS_COUNTED_MAX = 1_000
#: The types that our SQL works with, the one to be advised first.
ORG_TYPES, CREDITS_TYPES = ("text", "character varying"), ("bigint", "integer")


async def examine_postgres(url: str, settings: Settings) -> AsyncIterator[Finding]:
    """Raises StoreUnavailable when it goes away meanwhile."""
    postgres = Postgres(url, timeout_ms=ASK_TIMEOUT_MS, pool_max=2)
    await postgres.open()
    try:
        try:
            await postgres.row("SELECT 1")
        except StoreUnavailable as exc:
            yield problem("postgres.reachable", reason(exc), _why_unreachable(reason(exc)))
            return
        yield ok("postgres.reachable", f"answers at {_place(url)}")
        started = time.perf_counter()
        await postgres.row("SELECT 1")
        latency_ms = (time.perf_counter() - started) * 1000
        deadline_ms = settings.stores.postgres_timeout_ms
        yield latency_finding("postgres.latency", latency_ms, deadline_ms, "stores.postgres_timeout")
        before_ns = time.time_ns()
        server = await postgres.row(query("server"))
        assert server is not None  # a SELECT without FROM
        middle_ms = (before_ns + time.time_ns()) // 2_000_000
        for finding in _server(server, settings):
            yield finding
        yield clock_finding("postgres.clock", "PostgreSQL's", middle_ms - server["clock_ms"])
        schema = await _schema(postgres)
        yield schema
        async for finding in _table(postgres, settings.credits):
            yield finding
        if schema.name == "postgres.schema" and schema.status == "ok":
            async for finding in _ledger(postgres, settings):
                yield finding
        yield await _notifications(postgres)
    finally:
        await postgres.close()


def _place(url: str) -> str:
    """host:port/database of the URL, without user and password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 5432}{parts.path}"


def _why_unreachable(trouble: str) -> str:
    if "InvalidPassword" in trouble or "InvalidAuthorization" in trouble:
        return "the user or password in the URL is not accepted: postgresql://user:password@host:5432/database"
    if "InvalidCatalogName" in trouble:
        return "the database in the URL does not exist: create it (createdb NAME), or correct DATABASE_URL"
    if "TooManyConnections" in trouble:
        return "every connection is taken: raise max_connections, or lower stores.postgres_pool_max"
    if "ClientConfiguration" in trouble or "FileNotFound" in trouble:
        return (
            "an option in the URL is wrong, or names a file that is not there: correct stores.postgres, or DATABASE_URL"
        )
    if "SSL" in trouble or "certificate" in trouble:
        return "TLS fails: see sslmode in the URL (?sslmode=require, verify-full)"
    if "gaierror" in trouble:
        return "the host name in the URL is not known here: correct stores.postgres, or DATABASE_URL"
    return "start the server, or correct stores.postgres (DATABASE_URL); meanwhile only orgs in the caches are served"


def _server(row: Row, settings: Settings) -> Iterator[Finding]:
    version = f"PostgreSQL {row['version']}"
    if row["version_num"] >= VERSION_MIN * 10_000:
        yield ok("postgres.version", version)
    else:
        yield problem("postgres.version", version, f"PostgreSQL {VERSION_MIN} or later is needed")
    if row["standby"] or row["read_only"]:
        what = "this is a standby" if row["standby"] else "transactions are read-only here"
        yield problem("postgres.role", f"{what}: nothing can be posted", "name the primary in stores.postgres")
    if not row["fsync"]:
        yield warning("postgres.durability", "fsync is off: a crash may destroy the ledger", "set fsync = on")
    elif not row["synchronous"]:
        hint = "ALTER ROLE ... SET synchronous_commit = on for the gateway's user"
        yield warning("postgres.durability", "synchronous_commit is off: a crash forgets posted charges", hint)
    else:
        yield ok("postgres.durability", "what is committed is on disk")
    yield _connections(row["connections"], row["connections_max"], settings)


def _connections(used: int, connections_max: int, settings: Settings) -> Finding:
    per_gateway = settings.listen.workers * (settings.stores.postgres_pool_max + 1)
    says = f"{used} of {connections_max} connections in use; one gateway takes up to {per_gateway}"
    share = used / max(1, connections_max)
    hint = "raise max_connections, lower stores.postgres_pool_max, or put a pooler in front"
    if share >= CONNECTIONS_SHARE_PROBLEM:
        return problem("postgres.connections", says, hint)
    if share >= CONNECTIONS_SHARE_WARNING or per_gateway > connections_max:
        return warning("postgres.connections", says, hint)
    return ok("postgres.connections", says)


async def _schema(postgres: Postgres) -> Finding:
    try:
        todo = await pending(postgres)
    except ConfigError as exc:
        return problem("postgres.schema", str(exc), "run the release that migrated it, or a newer one")
    except StoreUnavailable as exc:
        hint = "the gateway's user needs the schema `gateway`: let it migrate, or make it the owner"
        return problem("postgres.schema", reason(exc), hint)
    if todo:
        names = ", ".join(f"{migration.version:04} {migration.name}" for migration in todo)
        return problem("postgres.schema", f"pending: {names}", "start the gateway once, or run `gateway migrate`")
    return ok("postgres.schema", "at this release's migrations")


async def _table(postgres: Postgres, credits: Credits) -> AsyncIterator[Finding]:
    """The application's own table, which may be older than the gateway."""
    table, org, amount = credits.table, credits.org_column, credits.credits_column
    columns = {row["name"]: row for row in await postgres.rows(query("credits_table"), table)}
    if not columns and credits.schema_ == "managed":
        yield warning("postgres.ai_credits", f"there is no table {table} yet", "the first migration makes it")
        return
    if not columns:
        hint = "create it, or correct credits.table"
        yield problem("postgres.ai_credits", f"there is no table {table}", hint)
        return
    wrong = [
        f"{name} is {columns[name]['type']}, not {types[0]}" if name in columns else f"{name} is missing"
        for name, types in ((org, ORG_TYPES), (amount, CREDITS_TYPES))
        if name not in columns or columns[name]["type"] not in types
    ]
    if not wrong and not columns[org]["is_unique"]:
        wrong.append(f"{org} is not unique")
    if wrong:
        hint = f"{table} needs {org} text PRIMARY KEY and {amount} bigint NOT NULL"
        yield problem("postgres.ai_credits", f"{table}: {', '.join(wrong)}", hint)
    else:
        yield ok("postgres.ai_credits", f"{table} has the columns that are needed")


async def _binding(postgres: Postgres, credits: Credits) -> AsyncIterator[Finding]:
    """Does the ledger work on that table, and hear of what others change in it?"""
    found = await postgres.row(query("binding"))
    migrate = "run `gateway migrate`, or start the gateway again"
    if found is None or not found["view"]:
        yield problem("postgres.binding", f"the ledger has lost its view of {credits.table}", migrate)
        return
    bound = Binding(found["table_name"], found["org_column"], found["credits_column"], found["mode"])
    if bound != Binding.of(credits):
        says = f"the ledger works on {bound.table} ({bound.org_column}, {bound.credits_column}; {bound.mode})"
        yield problem("postgres.binding", f"{says}: gateway.yaml says otherwise", migrate)
    if bound.mode != "readonly" and found["enabled"] < found["needed"]:
        state = "off" if found["triggers"] == found["needed"] else "gone"
        says = f"a trigger on {bound.table} is {state}: changes by others are not noticed"
        yield problem("postgres.trigger", says, f"{migrate}; what was missed becomes entries then")


async def _ledger(postgres: Postgres, settings: Settings) -> AsyncIterator[Finding]:
    """What can only be asked of a migrated database."""
    async for finding in _binding(postgres, settings.credits):
        yield finding
    table = settings.credits.table
    try:
        await postgres.rows(query("write_probe"))
    except StoreUnavailable as exc:
        hint = f"the gateway's user must be able to write to the schema `gateway` and to {table}"
        yield problem("postgres.write", f"cannot write: {reason(exc)}", hint)
        return
    yield ok("postgres.write", "the ledger can be written to")
    lost = await postgres.row(query("dead_letters"), DEAD_LETTERS_COUNTED_MAX)
    if lost is not None and lost["entries"]:
        count = f"{lost['entries']}{' or more' if lost['entries'] == DEAD_LETTERS_COUNTED_MAX else ''}"
        says = f"{count} charges belong to orgs without a row in {table}"
        yield warning(
            "postgres.dead_letters", says, "see gateway.dead_letter: were those orgs deleted while they worked?"
        )
    rows = await postgres.rows(query("plans"))
    for row in rows:
        if row["plan"] not in settings.plans:
            says = f"plan '{row['plan']}' is not configured, so its orgs ({row['orgs']}) are refused"
            yield problem("postgres.plans", says, "add it under plans in gateway.yaml, or give the orgs another plan")
    if all(row["plan"] in settings.plans for row in rows):
        yield ok("postgres.plans", f"the plans of all orgs are configured ({sum(row['orgs'] for row in rows)} orgs)")


async def _notifications(postgres: Postgres) -> Finding:
    """A word on a channel of our own comes back: what revoking a key at once depends on."""
    channel, word = f"gateway_doctor_{uuid.uuid4().hex}", uuid.uuid4().hex
    listening, heard = asyncio.Event(), asyncio.Event()
    postgres.listen({channel: lambda payload: heard.set() if payload == word else None}, listening.set)
    try:
        async with asyncio.timeout(ASK_TIMEOUT_MS / 1000):
            await listening.wait()
            await postgres.row(query("announce"), channel, word)
            await heard.wait()
    except TimeoutError:
        what = "a notification did not arrive" if listening.is_set() else "no connection to listen on"
        hint = "LISTEN needs a session of its own: connect directly, or through a pooler in session mode"
        return problem("postgres.notify", f"{what}: revoked keys and grants would be noticed late", hint)
    return ok("postgres.notify", "LISTEN and NOTIFY work: revoked keys and grants are known at once")

"""Bringing the schema `gateway` to this release's version: numbered SQL files, each applied once, in order.

Any number of gateways may start at once: an advisory lock lets one migrate and the others find it done.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

import structlog

from gateway.config import Credits
from gateway.errors import ConfigError, StoreUnavailable
from gateway.ledger.queries import query
from gateway.stores import Postgres

#: Any constant will do, as long as nobody else in the database locks it: "gateway" read as a number.
_LOCK = 0x67617465776179

#: What gateway.bind raises when the application's table is not as the binding says.
_WRONG_BINDING = "GW001"

#: Files that have changed since databases were made with them, and how they were: what 0001 once made, 0003 replaces.
_BEFORE = {1: {"519a28abb77b5c6af18c1178a9db6a176f4eae5769f9d660f6becea0e7fd420d"}}

_PREPARE = """
CREATE SCHEMA IF NOT EXISTS gateway;
CREATE TABLE IF NOT EXISTS gateway.migration (
    version integer PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now()
);
"""

log = structlog.get_logger("gateway.migrate")


@dataclass(frozen=True, slots=True)
class Binding:
    """Where the application keeps the credits of its orgs, and what the gateway may do there."""

    table: str = "ai_credits"
    org_column: str = "organization_id"
    credits_column: str = "credits"
    mode: str = "managed"

    @classmethod
    def of(cls, credits: Credits) -> "Binding":
        """As the section `credits` says."""
        return cls(credits.table, credits.org_column, credits.credits_column, credits.schema_)


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return sha256(self.sql.encode()).hexdigest()


@cache
def migrations() -> tuple[Migration, ...]:
    """This release's migrations in order; file names are `NNNN_name.sql`."""
    found = sorted(
        (entry for entry in (files("gateway.ledger") / "migrations").iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    return tuple(Migration(int(entry.name[:4]), entry.name[5:-4], entry.read_text()) for entry in found)


async def pending(postgres: Postgres) -> tuple[Migration, ...]:
    """The migrations that this database still lacks. Raises StoreUnavailable, and ConfigError when the database
    was migrated by a newer release or an applied file has changed since."""
    exists = await postgres.row("SELECT to_regclass('gateway.migration') IS NOT NULL AS exists")
    if exists is None or not exists["exists"]:
        return migrations()
    applied = {row["version"]: row for row in await postgres.rows("SELECT version, sha256 FROM gateway.migration")}
    known = {migration.version: migration for migration in migrations()}
    if unknown := sorted(set(applied) - set(known)):
        raise ConfigError([f"the database is at migration {unknown[-1]}, newer than this release ({max(known)})"])
    for version, row in applied.items():
        if row["sha256"] not in {known[version].sha256, *_BEFORE.get(version, ())}:
            raise ConfigError([f"migration {version:04} ({known[version].name}) has changed since it was applied"])
    return tuple(migration for migration in migrations() if migration.version not in applied)


async def migrate(postgres: Postgres, binding: Binding | None = None, *, timeout_ms: int = 60_000) -> int:
    """The schema is at this release's version and works on the application's table; returns how many migrations were
    applied. Each is one transaction. Raises StoreUnavailable, and ConfigError when the table is not as `binding` says
    or the database is not one for this release."""
    binding = binding or Binding()
    count = 0
    while todo := await pending(postgres):
        migration = todo[0]
        try:
            await _apply(postgres, migration, binding, timeout_ms)
        except StoreUnavailable as exc:
            _blame_binding(exc)
            # A gateway that migrated while we waited for the lock makes our insert, and so all of it, fail.
            if await pending(postgres) == todo:
                raise
            continue
        log.info("migration applied", version=migration.version, name=migration.name)
        count += 1
    await _bind(postgres, binding, timeout_ms)
    return count


async def is_bound(postgres: Postgres, binding: Binding) -> bool:
    """The ledger works on the table that `binding` names, and hears of what others change there, as far as it says.
    Raises StoreUnavailable, also when there is no ledger."""
    row = await postgres.row(query("binding"))
    if row is None or not row["view"] or row["enabled"] < row["needed"]:
        return False
    return Binding(row["table_name"], row["org_column"], row["credits_column"], row["mode"]) == binding


async def _bind(postgres: Postgres, binding: Binding, timeout_ms: int) -> None:
    if await is_bound(postgres, binding):
        return
    lock = ("SELECT pg_advisory_xact_lock($1)", (_LOCK,))
    try:
        await postgres.transaction([lock, (query("bind"), _names(binding))], timeout_ms=timeout_ms)
    except StoreUnavailable as exc:
        _blame_binding(exc)
        raise
    log.info("credits bound", table=binding.table, mode=binding.mode)


def _names(binding: Binding) -> tuple[str, str, str, str]:
    return binding.table, binding.org_column, binding.credits_column, binding.mode


def _blame_binding(exc: StoreUnavailable) -> None:
    """Raises ConfigError when it is the binding that is at fault."""
    if getattr(exc.__cause__, "sqlstate", None) == _WRONG_BINDING:
        raise ConfigError([str(exc.__cause__)]) from exc


async def _apply(postgres: Postgres, migration: Migration, binding: Binding, timeout_ms: int) -> None:
    names = ("credits_table", "org_column", "credits_column", "credits_mode")
    await postgres.transaction(
        [
            ("SELECT pg_advisory_xact_lock($1)", (_LOCK,)),
            # Whoever else uses a table waits as long as we do.
            ("SELECT set_config('lock_timeout', '5s', true)", ()),
            *[
                ("SELECT set_config($1, $2, true)", (f"gateway.{name}", value))
                for name, value in zip(names, _names(binding), strict=True)
            ],
            (_PREPARE, ()),
            (
                "INSERT INTO gateway.migration (version, name, sha256) VALUES ($1, $2, $3)",
                (migration.version, migration.name, migration.sha256),
            ),
            (migration.sql, ()),
        ],
        timeout_ms=timeout_ms,
    )

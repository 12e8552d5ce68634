"""Bringing the schema `gateway` to this release's version: numbered SQL files, each applied once, in order.

Any number of gateways may start at once: an advisory lock lets one migrate and the others find it done.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

import structlog

from gateway.errors import ConfigError, StoreUnavailable
from gateway.stores import Postgres

#: Any constant will do, as long as nobody else in the database locks it: "gateway" read as a number.
_LOCK = 0x67617465776179

_PREPARE = """
CREATE SCHEMA IF NOT EXISTS gateway;
CREATE TABLE IF NOT EXISTS gateway.migration (
    version integer PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now()
);
"""

log = structlog.get_logger("gateway.migrate")


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
        if row["sha256"] != known[version].sha256:
            raise ConfigError([f"migration {version:04} ({known[version].name}) has changed since it was applied"])
    return tuple(migration for migration in migrations() if migration.version not in applied)


async def migrate(postgres: Postgres, *, timeout_ms: int = 60_000) -> int:
    """The schema is at this release's version; returns how many migrations were applied. Each is one transaction."""
    count = 0
    while todo := await pending(postgres):
        migration = todo[0]
        try:
            await _apply(postgres, migration, timeout_ms)
        except StoreUnavailable:
            # A gateway that migrated while we waited for the lock makes our insert, and so all of it, fail.
            if await pending(postgres) == todo:
                raise
            continue
        log.info("migration applied", version=migration.version, name=migration.name)
        count += 1
    return count


async def _apply(postgres: Postgres, migration: Migration, timeout_ms: int) -> None:
    await postgres.transaction(
        [
            ("SELECT pg_advisory_xact_lock($1)", (_LOCK,)),
            (_PREPARE, ()),
            (
                "INSERT INTO gateway.migration (version, name, sha256) VALUES ($1, $2, $3)",
                (migration.version, migration.name, migration.sha256),
            ),
            (migration.sql, ()),
        ],
        timeout_ms=timeout_ms,
    )

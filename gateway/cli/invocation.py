"""What every command begins with: which configuration, which servers, and a ledger to ask.

Owns how commands find the servers that a running `gateway run` started. Does not write that file (run.py does).
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from gateway.config import Settings, Stores, Upstream, load
from gateway.errors import ConfigError, GatewayError
from gateway.ledger import pending
from gateway.stores import Postgres, Redis
from gateway.telemetry import configure_logging

#: Beside the configuration; written by `gateway run` while it runs.
RUN_FILE = Path(".gateway") / "run.json"
_RUN_FILE_BYTES_MAX = 64 * 1024
#: A person waits longer than a request may.
LEDGER_TIMEOUT_MS = 5_000
REDIS_TIMEOUT_MS = 1_000

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
OrgArgument = Annotated[str, typer.Argument(metavar="ORG", help="Id of the organization.", show_default=False)]


class NothingRuns(GatewayError):
    """nothing is configured and `gateway run` is not running here; set DATABASE_URL or start it"""


class LedgerNotReady(GatewayError):
    """The database lacks the gateway's schema."""


class Running(msgspec.Struct, frozen=True):
    """What a running `gateway run` has written down of itself."""

    pid: int
    redis: str
    postgres: str
    ai_router: str | None = None
    address: str | None = None

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the options before the command said."""

    config: Path

    def settings(self) -> Settings:
        """The configuration as it is written. Raises ConfigError with every mistake in it."""
        return load(self.config)

    def running(self) -> Running | None:
        """The `gateway run` of this configuration; None when it does not run, or cannot be read by this user."""
        try:
            with (self.config.parent / RUN_FILE).open("rb") as file:
                running = msgspec.json.decode(file.read(_RUN_FILE_BYTES_MAX), type=Running)
        except (OSError, msgspec.DecodeError):
            return None
        return running if running.pid > 0 and running.alive else None


def invocation(ctx: typer.Context) -> Invocation:
    """The options that stood before the command."""
    found = ctx.obj
    assert isinstance(found, Invocation)  # the application's callback has run before any command
    return found


def filled_in(settings: Settings, running: Running | None) -> Settings:
    """`settings` with the servers of `running` wherever they say `embedded` or `demo`."""
    if running is None:
        return settings

    def real(upstream: Upstream) -> Upstream:
        targets = tuple(running.ai_router or target if target == "demo" else target for target in upstream.targets)
        return upstream.model_copy(update={"targets": targets})

    stores: Stores = settings.stores.model_copy(
        update={
            "redis": running.redis if settings.stores.redis == "embedded" else settings.stores.redis,
            "postgres": running.postgres if settings.stores.postgres == "embedded" else settings.stores.postgres,
        }
    )
    upstreams = {name: real(upstream) for name, upstream in settings.upstreams.items()}
    return settings.model_copy(update={"stores": stores, "upstreams": upstreams})


def quiet_logging() -> None:
    """What the stores log while they reconnect is for a server's log: a command says itself what went wrong."""
    configure_logging("pretty", "critical", sys.stderr)


@dataclass(frozen=True, slots=True)
class Ledger:
    """An open database, and the settings with real addresses in them."""

    postgres: Postgres
    settings: Settings


@asynccontextmanager
async def open_ledger(invoked: Invocation, *, migrated: bool = True) -> AsyncIterator[Ledger]:
    """The configured database is open inside the block, at this release's schema unless `migrated` is False.

    Raises ConfigError, NothingRuns when the database is the embedded one and does not run, LedgerNotReady,
    StoreUnavailable."""
    quiet_logging()
    settings = filled_in(invoked.settings(), invoked.running())
    if settings.stores.postgres == "embedded":
        raise NothingRuns
    postgres = Postgres(settings.stores.postgres, timeout_ms=LEDGER_TIMEOUT_MS, pool_max=2)
    await postgres.open()
    try:
        if migrated:
            await _require_schema(postgres)
        yield Ledger(postgres, settings)
    finally:
        await postgres.close()


@asynccontextmanager
async def open_redis(settings: Settings) -> AsyncIterator[Redis]:
    """The configured Redis is being connected to. Raises NothingRuns when it is the embedded one and does not run."""
    if settings.stores.redis == "embedded":
        raise NothingRuns
    redis = Redis(settings.stores.redis, timeout_ms=REDIS_TIMEOUT_MS, connect_timeout_ms=REDIS_TIMEOUT_MS)
    redis.start()
    try:
        yield redis
    finally:
        await redis.close()


async def _require_schema(postgres: Postgres) -> None:
    try:
        todo = await pending(postgres)
    except ConfigError as exc:
        raise LedgerNotReady(f"this gateway cannot use the database: {exc}") from exc
    if todo:
        names = ", ".join(f"{migration.version:04} {migration.name}" for migration in todo)
        raise LedgerNotReady(f"the database lacks {names}: start the gateway once, or run `gateway migrate`")

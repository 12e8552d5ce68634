"""`gateway run`: the whole walk on one machine. What is not configured is started: Valkey, PostgreSQL, an AI router.

Everything it keeps is under `.gateway/` beside the configuration: the servers' data, the demo keys, and `run.json`,
where the other commands find what runs here.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from gateway import server
from gateway.cli.demo import DemoKey, ensure_demo_orgs, paste_these
from gateway.cli.invocation import RUN_FILE, Running, filled_in
from gateway.config import Settings
from gateway.embedded import EmbeddedDemoRouter, embedded
from gateway.ledger import migrate
from gateway.stores import Postgres

MIGRATE_TIMEOUT_MS = 60_000

console = Console(stderr=False, highlight=False, soft_wrap=True)


async def run(settings: Settings, directory: Path, *, demo: bool) -> None:
    """The gateway has run, with everything it needs, until a signal ended it; then nothing of it is left running.

    directory: where gateway.yaml lies. Raises ConfigError or EmbeddedError when something cannot start."""
    run_file = directory / RUN_FILE
    state_dir = run_file.parent
    state_dir.mkdir(mode=0o700, exist_ok=True)
    listener = server.bind(settings.listen.host, settings.listen.port)
    address = server.address(listener)
    async with _surroundings(settings, state_dir, address) as running:
        settings = filled_in(settings, running)
        console.print("  preparing the ledger")
        keys = await _prepare_ledger(settings, state_dir, demo=demo)
        with _announced(run_file, running):
            await server.serve_on(listener, settings, lambda: console.print(paste_these(address, keys)))
    console.print("  stopped")


async def _prepare_ledger(settings: Settings, state_dir: Path, *, demo: bool) -> list[DemoKey]:
    postgres = Postgres(settings.stores.postgres, timeout_ms=MIGRATE_TIMEOUT_MS, pool_max=2)
    await postgres.open()
    try:
        await migrate(postgres)
        return await ensure_demo_orgs(postgres, settings, state_dir) if demo else []
    finally:
        await postgres.close()


@contextlib.asynccontextmanager
async def _surroundings(settings: Settings, state_dir: Path, address: str) -> AsyncIterator[Running]:
    """Every server the settings leave to us runs inside the block."""
    stores = settings.stores
    wants_router = any("demo" in upstream.targets for upstream in settings.upstreams.values())
    async with contextlib.AsyncExitStack() as stack:
        urls = await stack.enter_async_context(
            embedded(
                state_dir,
                valkey=stores.redis == "embedded",
                postgres=stores.postgres == "embedded",
                progress=lambda doing: console.print(f"  {doing}"),
            )
        )
        router = None
        if wants_router:
            console.print("  starting the demo AI router")
            router = await stack.enter_async_context(EmbeddedDemoRouter(state_dir))
        yield Running(os.getpid(), urls.redis or stores.redis, urls.postgres or stores.postgres, router, address)


@contextlib.contextmanager
def _announced(run_file: Path, running: Running) -> Iterator[None]:
    """`run.json` tells the other commands where everything is, as long as it is there."""
    run_file.unlink(missing_ok=True)
    with open(os.open(run_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(running))
    try:
        yield
    finally:
        run_file.unlink(missing_ok=True)

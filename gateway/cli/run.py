"""`gateway run`: the whole walk on one machine. What is not configured is started: Valkey, PostgreSQL, an AI router.

Everything it keeps is under `.gateway/` beside the configuration: the servers' data, the demo keys, and `run.json`,
where the other commands find what runs here.
"""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gateway import server
from gateway.cli.demo import DemoKey, ensure_demo_orgs, paste_these
from gateway.config import Settings, Stores, Upstream
from gateway.embedded import EmbeddedDemoRouter, embedded
from gateway.ledger import migrate
from gateway.stores import Postgres

STATE_DIR = ".gateway"
MIGRATE_TIMEOUT_MS = 60_000

console = Console(stderr=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Running:
    """What `run` has started or was given; other commands read it from `run.json`."""

    redis: str
    postgres: str
    ai_router: str | None


async def run(settings: Settings, directory: Path, *, demo: bool) -> None:
    """The gateway has run, with everything it needs, until a signal ended it; then nothing of it is left running.

    directory: where gateway.yaml lies. Raises ConfigError or EmbeddedError when something cannot start."""
    state_dir = directory / STATE_DIR
    state_dir.mkdir(mode=0o700, exist_ok=True)
    async with _surroundings(settings, state_dir) as running:
        settings = _filled_in(settings, running)
        keys: list[DemoKey] = []
        console.print("  preparing the ledger")
        postgres = Postgres(running.postgres, timeout_ms=MIGRATE_TIMEOUT_MS, pool_max=2)
        await postgres.open()
        try:
            await migrate(postgres)
            if demo:
                keys = await ensure_demo_orgs(postgres, settings, state_dir)
        finally:
            await postgres.close()
        listener = server.bind(settings.listen.host, settings.listen.port)
        address = server.address(listener)
        with _announced(state_dir, running, address):
            await server.serve_on(listener, settings, lambda: console.print(paste_these(address, keys)))
    console.print("  stopped")


@contextlib.asynccontextmanager
async def _surroundings(settings: Settings, state_dir: Path) -> AsyncIterator[Running]:
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
        yield Running(urls.redis or stores.redis, urls.postgres or stores.postgres, router)


def _filled_in(settings: Settings, running: Running) -> Settings:
    """The settings with real addresses in place of `embedded` and `demo`."""

    def real(upstream: Upstream) -> Upstream:
        targets = tuple(running.ai_router or target if target == "demo" else target for target in upstream.targets)
        return upstream.model_copy(update={"targets": targets})

    stores: Stores = settings.stores.model_copy(update={"redis": running.redis, "postgres": running.postgres})
    upstreams = {name: real(upstream) for name, upstream in settings.upstreams.items()}
    return settings.model_copy(update={"stores": stores, "upstreams": upstreams})


@contextlib.contextmanager
def _announced(state_dir: Path, running: Running, address: str) -> Iterator[None]:
    """`run.json` tells the other commands where everything is, as long as it is there."""
    path = state_dir / "run.json"
    path.unlink(missing_ok=True)
    document = {
        "redis": running.redis,
        "postgres": running.postgres,
        "ai_router": running.ai_router,
        "address": address,
        "pid": os.getpid(),
    }
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(document, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)

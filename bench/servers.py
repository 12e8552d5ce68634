"""The servers of a run, each on a free port and ended with its block: stores, upstream, gateway; `proxies.py` has those
that the gateway is compared with.

Children are started like the gateway's embedded servers, so they end with this process even when it is killed.
"""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from bench.exchange import PATH
from gateway.embedded import EmbeddedPostgres, EmbeddedValkey
from gateway.embedded.process import Command, ServerProcess, free_port, make_directory
from gateway.identity.api_key import new_key
from gateway.ledger import grant, migrate, query
from gateway.stores import Postgres

HOST = "127.0.0.1"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.02
#: More than any run can spend or reach: every limit is counted, none ever denies.
CREDITS = 1_000_000_000
LIMIT = 1_000_000_000

_GATEWAY = """\
listen: {{ host: {host}, port: {port} }}
stores: {{ redis: "{redis}", postgres: "{postgres}", redis_timeout: 2s }}
upstreams: {{ router: {{ targets: ["http://{host}:{upstream}"], connections_max: 1024 }} }}
identity: [ api_key: {{}} ]
plans: {{ full: {{ credits: 0, policy: full }}, bare: {{ credits: 0, policy: bare }} }}
routes: [ {{ path: {path}, method: POST, upstream: router, dialect: openai, usage: openai_chat }} ]
sessions: {{ mint: true }}
log: {{ format: json, level: info }}
policies: policies/
"""

_POLICIES = {
    "full": f"""\
policy: full
limits:
  - {{ name: rpm, count: requests, limit: {LIMIT}, window: 1m, per: org }}
  - {{ name: tpm, count: tokens, limit: {LIMIT}, window: 1m, per: org }}
  - {{ name: parallel, count: concurrent, limit: 10000, per: org }}
price: {{ per_request: 1 }}
""",
    "bare": "policy: bare\nlimits: []\nprice: { per_request: 0 }\n",
}


@dataclass(frozen=True, slots=True)
class Listening:
    """A server that answers. Its CPU time is that of the process `pid` and all its children."""

    pid: int
    port: int


@dataclass(frozen=True, slots=True)
class Stores:
    redis_url: str
    postgres_url: str
    redis_pid: int
    postgres_pid: int


@asynccontextmanager
async def stores(folder: Path) -> AsyncIterator[Stores]:
    """An embedded Valkey and PostgreSQL with data of their own, as durable as for `gateway run`."""
    valkey, postgres = EmbeddedValkey(folder), EmbeddedPostgres(folder)
    async with valkey as redis_url, postgres as postgres_url:
        assert valkey.pid is not None and postgres.pid is not None
        yield Stores(redis_url, postgres_url, valkey.pid, postgres.pid)


async def keys_for_plans(found: Stores) -> dict[str, str]:
    """The schema is there, and for each plan an org that can pay; returns an API key by plan."""
    postgres = Postgres(found.postgres_url, timeout_ms=10_000, pool_max=1)
    await postgres.open()
    try:
        await migrate(postgres)
        secrets = {}
        for plan in _POLICIES:
            key = new_key()
            await postgres.row("INSERT INTO gateway.org (org_id, name, plan) VALUES ($1, $1, $1)", plan)
            await postgres.row(query("add_key"), key.key_id, key.sha256, plan, "ann", "bench", None)
            await grant(postgres, plan, CREDITS, grant_id=f"bench:{plan}")
            secrets[plan] = key.secret
        return secrets
    finally:
        await postgres.close()


@asynccontextmanager
async def upstream(folder: Path, core: int | None) -> AsyncIterator[Listening]:
    port = free_port()
    argv = (sys.executable, "-m", "bench.upstream", str(port))
    async with running(folder / "upstream", argv, port, core) as listening:
        yield listening


@asynccontextmanager
async def gateway(folder: Path, core: int | None, found: Stores, upstream_port: int) -> AsyncIterator[Listening]:
    """One worker, started as operators start it, its access log written to a file."""
    port, own = free_port(), folder / "gateway"
    make_directory(own)
    (own / "policies").mkdir()
    for name, text in _POLICIES.items():
        (own / "policies" / f"{name}.yaml").write_text(text)
    config = own / "gateway.yaml"
    config.write_text(
        _GATEWAY.format(
            host=HOST,
            port=port,
            redis=found.redis_url,
            postgres=found.postgres_url,
            upstream=upstream_port,
            path=PATH,
        )
    )
    argv = (sys.executable, "-m", "gateway", "--config", str(config), "serve")
    async with running(own, argv, port, core) as listening:
        yield listening


@asynccontextmanager
async def running(folder: Path, argv: tuple[str, ...], port: int, core: int | None) -> AsyncIterator[Listening]:
    """The program runs on `core` and accepts connections on `port`. Raises RuntimeError with its last words."""
    make_directory(folder)
    process = ServerProcess(folder)
    try:
        with machine.on_core(core):
            process.start(Command(argv, Path(__file__).parents[1], signal.SIGTERM))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not await _accepts(port):
            if process.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(argv)} does not start:\n{process.log_tail()}")
            await asyncio.sleep(POLL_S)
        assert process.pid is not None
        yield Listening(process.pid, port)
    finally:
        await process.stop(STOP_TIMEOUT_S)


async def _accepts(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True

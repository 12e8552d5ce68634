"""A whole gateway for a test: configuration, ledger, orgs and keys, in this process or in one of its own."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio as redis_client
import uvicorn

from gateway import keys, server
from gateway.app import App, Gateway, create_app
from gateway.config import load
from gateway.identity.api_key import new_key
from gateway.ledger import grant, query
from gateway.ledger.audit import Auditor
from gateway.stores import Postgres, Redis
from tests.waiting import until

CREDIT = 1_000_000

CONFIG = """
listen:
  {{ port: 0, workers: {workers}, grace: {grace}, drain_timeout: {drain_timeout},
     client_idle: {client_idle}, trusted_proxies: {trusted} }}
stores:
  redis: "{redis}"
  postgres: "{postgres}"
  redis_timeout: {redis_timeout}
  redis_connect_timeout: {redis_connect_timeout}
  postgres_timeout: {postgres_timeout}
upstreams:
  ai_router:
    targets: ["{upstream}"]
    connections_max: {connections_max}
    keepalive: {keepalive}
    queue_timeout: {queue_timeout}
    timeouts: {{ connect: {connect}, first_byte: {first_byte}, idle: {idle}, write: {write} }}
identity: {identity}
plans: {{ pro: {plan} }}
routes: {routes}
credits: {{ lease: {lease}, heartbeat: {heartbeat}, sweep: 200ms, flush: 50ms{credits} }}
sessions: {{ signing_key: "{signing_key}" }}
unauthenticated: {unauthenticated}
shared_limits: {shared_limits}
limits: {limit_rules}
log: {{ format: json, level: warning }}
policies: policies/
"""

ROUTES = """
  - path: /v1/chat/completions
    method: POST
    upstream: ai_router
    dialect: openai
    usage: openai_chat
    body_bytes_max: 64KiB
  - { path: /open, upstream: ai_router, forward_credential: true }
  - { path: /*, upstream: ai_router }
"""

#: How long the stores may take when nothing is configured. Most tests allow more: they are not about time.
DEFAULT_TIMEOUTS = {"redis_timeout": "100ms", "redis_connect_timeout": "200ms", "postgres_timeout": "200ms"}

#: Settings with which nothing takes the place of Redis while it is away.
REFUSE = {"credits": ", without_redis: refuse", "limit_rules": "{ without_redis: refuse }"}

#: An org that nothing is granted to: tests say what it has.
ADD_ORG = "INSERT INTO gateway.org (org_id, name, plan) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"

POLICY = """
policy: pro
limits: {limits}
price: {{ per_request: {price}, per_message: {per_message}{prices} }}
"""


@dataclass
class House:
    """One org with a key, over a migrated database; gateways are started on top of it."""

    directory: Path
    redis_url: str
    database_url: str
    postgres: Postgres
    redis: redis_client.Redis
    upstream_url: str = "http://127.0.0.1:1"
    org_id: str = "acme"
    secret: str = ""
    limits: list[dict[str, Any]] = field(default_factory=list)
    price: int = 1
    per_message: int = 0
    #: More of `price`, as YAML; begins with a comma.
    prices: str = ""
    settings: dict[str, str] = field(default_factory=dict)

    def write_config(self) -> Path:
        values = {
            "grace": "0s",
            "drain_timeout": "2s",
            "client_idle": "60s",
            "redis_timeout": "1s",
            "redis_connect_timeout": "1s",
            "postgres_timeout": "2s",
            "identity": "[ api_key: {} ]",
            "routes": ROUTES,
            "workers": "1",
            "connect": "2s",
            "first_byte": "20s",
            "idle": "20s",
            "write": "20s",
            "connections_max": "1024",
            "keepalive": "4s",
            "queue_timeout": "2s",
            "lease": "30s",
            "heartbeat": "10s",
            "signing_key": "",
            "plan": "{ credits: 1000, policy: pro }",
            "credits": "",
            # Many tests are about nothing but requests that are refused.
            "unauthenticated": "{ failures: 0 }",
            "shared_limits": "[]",
            "limit_rules": "{}",
            "trusted": "[]",
            "redis": self.redis_url,
            "postgres": self.database_url,
            "upstream": self.upstream_url,
            **self.settings,
        }
        path = self.directory / "gateway.yaml"
        path.write_text(CONFIG.format(**values))
        (self.directory / "policies").mkdir(exist_ok=True)
        policy = POLICY.format(
            limits=json.dumps(self.limits), price=self.price, per_message=self.per_message, prices=self.prices
        )
        (self.directory / "policies" / "pro.yaml").write_text(policy)
        return path

    async def add_key(self, org_id: str, user_id: str | None = None) -> str:
        key = new_key()
        await self.postgres.row(ADD_ORG, org_id, org_id, "pro")
        await self.postgres.row(query("add_key"), key.key_id, key.sha256, org_id, user_id, "test", None)
        return key.secret

    async def revoke(self, secret: str) -> None:
        row = await self.postgres.row(
            "SELECT key_id FROM gateway.api_key WHERE sha256 = $1", sha256(secret.encode()).digest()
        )
        assert row is not None
        await self.postgres.row(query("revoke_key"), row["key_id"])

    async def credits(self, amount: int, grant_id: str = "grant:test") -> None:
        await grant(self.postgres, self.org_id, amount, grant_id=grant_id)

    async def charges(self) -> list[tuple[str, int]]:
        """(kind, micro-credits charged) of every charge in the ledger."""
        rows = await self.postgres.rows(
            "SELECT kind, -amount AS charged FROM gateway.ledger WHERE kind IN ('settle', 'orphan') ORDER BY seq"
        )
        return [(row["kind"], row["charged"]) for row in rows]

    async def balance(self) -> int:
        row = await self.postgres.row(query("balance"), self.org_id)
        return 0 if row is None else int(row["balance"])

    async def account(self) -> dict[str, int]:
        """The fields of the account in Redis that are numbers."""
        stored = await self.redis.hgetall(keys.account(self.org_id))
        fields = {name.decode() if isinstance(name, bytes) else name: value for name, value in stored.items()}
        return {name: int(value) for name, value in fields.items() if name not in ("r", "b")}

    async def at_rest(self) -> bool:
        """No hold is open and everything charged is posted."""
        account = await self.account()
        return (
            account.get("h", 0) == 0
            and account.get("u", 0) == 0
            and not await self.redis.exists(keys.holds(self.org_id), keys.outbox(self.org_id))
        )

    async def settled(self, timeout_s: float = 10.0) -> None:
        """Wait until everything is at rest; then Redis and PostgreSQL must agree."""
        await until(self.at_rest, timeout_s)
        assert (await self.account()).get("p", 0) in (0, await self.balance())

    async def assert_accounted_for(self) -> None:
        """Every credit is: in the ledger, in balances, in outbox and holds."""
        redis = Redis(self.redis_url, timeout_ms=5_000, connect_timeout_ms=5_000)
        redis.start()
        report = await Auditor(self.postgres, redis).audit()
        await redis.close()
        assert (report.wrong, report.trouble) == ((), None)

    def client(self, address: str, secret: str | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=address,
            headers={"authorization": f"Bearer {secret or self.secret}"},
            timeout=30,
            limits=httpx.Limits(max_connections=1000),
        )


@dataclass
class Running:
    """A gateway in this process, open to inspection."""

    address: str
    app: App

    @property
    def gateway(self) -> Gateway:
        assert self.app._gateway is not None
        return self.app._gateway


@asynccontextmanager
async def in_process(house: House, *, redis_is_up: bool = True) -> AsyncIterator[Running]:
    settings = load(house.write_config(), {})
    listener = server.bind("127.0.0.1", 0)
    app = create_app(settings)
    started = asyncio.Event()
    httpd = server.Server(app, settings, started.set)
    # `serve` would take over the test run's signals.
    serving = asyncio.create_task(uvicorn.Server._serve(httpd, [listener]))
    try:
        await started.wait()
        running = Running(server.address(listener), app)
        if redis_is_up:
            await until(lambda: running.gateway.redis.usable)
        yield running
    finally:
        httpd.should_exit = True
        await serving
        listener.close()


class Process:
    """A gateway in a process of its own: `python -m gateway serve`, as operators start it."""

    def __init__(self, house: House) -> None:
        self._house = house
        self.process: asyncio.subprocess.Process | None = None
        self.address = ""
        self.output: list[Mapping[str, Any]] = []
        self._reading: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Process":
        path = self._house.write_config()
        text = path.read_text().replace("level: warning", "level: info")
        path.write_text(text)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            "--config",
            str(path),
            "serve",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            start_new_session=True,
        )
        self._reading.append(asyncio.create_task(self._read()))
        try:
            await until(lambda: self.address or self._ended(), 30)
            assert self.address, self.output
        except BaseException:
            self.process.kill()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            await self.end(signal.SIGTERM)
        await asyncio.gather(*self._reading)

    async def end(self, number: int) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.wait_for(self.process.wait(), 30)

    async def drains(self) -> bool:
        """It was told to end, and knows."""
        try:
            async with httpx.AsyncClient() as client:
                return (await client.get(f"{self.address}/-/ready")).status_code == 503
        except httpx.TransportError:
            return True

    def events(self, name: str) -> list[Mapping[str, Any]]:
        return [line for line in self.output if line.get("event") == name]

    def _ended(self) -> bool:
        return self.process is not None and self.process.returncode is not None

    async def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "text", "text": line.decode()}
            self.output.append(event)
            if event.get("event") == "listening":
                self.address = event["address"]


def chat_body(words: str = "hello", **more: object) -> dict[str, object]:
    return {"model": "demo-small", "messages": [{"role": "user", "content": words}], **more}


__all__ = ["CREDIT", "House", "Process", "Running", "chat_body", "in_process"]

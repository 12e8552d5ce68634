"""A run's gateways and orgs: real processes over real stores, each with a name that says which process it is."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.config import load
from gateway.identity.api_key import new_key
from gateway.ledger import grant, migrate, query
from gateway.stores import Postgres
from tests.chaos.stores import Stores
from tests.chaos.upstream import Router
from tests.walk.house import ADD_ORG, CREDIT, Process

REPOSITORY = Path(__file__).resolve().parents[2]
LEASE_S = 3.0
HEARTBEAT_S = 1.0
SWEEP_S = 0.3
LOSS_GRACE_S = 8.0
#: Micro-credits per million output tokens: 2 credits per 1000.
RATE = 2_000 * CREDIT

_CONFIG = """
listen: {{ port: 0, via: "{name}", drain_timeout: 2s, client_idle: 20s }}
stores:
  redis: "{redis}"
  postgres: "{postgres}"
  redis_timeout: 250ms
  redis_connect_timeout: 500ms
  postgres_timeout: 1s
upstreams:
  ai_router: {{ targets: ["{upstream}"], timeouts: {{ connect: 2s, first_byte: 20s, idle: 20s, write: 20s }} }}
identity: [ api_key: {{ cache_ttl: 5m, cache_stale: 10m }} ]
plans: {{ flat: {{ credits: 1, policy: flat }}, metered: {{ credits: 1, policy: metered }} }}
routes:
  - path: /v1/chat/completions
    upstream: ai_router
    dialect: openai
    usage: openai_chat
  - path: /once
    upstream: ai_router
    dialect: openai
    usage: openai_chat
    idempotency: true
credits: {{ lease: 3s, heartbeat: 1s, sweep: 300ms, flush: 100ms, loss_grace: 8s, cap_floor: 5{credits} }}
unauthenticated: {{ failures: 0 }}
log: {{ format: json, level: warning }}
policies: policies/
"""
_LIMITS = '[{ "name": "parallel", "count": "concurrent", "limit": 100, "per": "org" }]'
_POLICIES = {
    "flat": f"policy: flat\nlimits: {_LIMITS}\nprice: {{ per_request: 1 }}\n",
    "metered": f"policy: metered\nlimits: {_LIMITS}\ntokens: {{ default_output: 512 }}\n"
    f"price: {{ per_million_output_tokens: {RATE // CREDIT} }}\n",
}


@dataclass
class Org:
    org_id: str
    #: `flat` or `metered`.
    plan: str
    #: Somebody adds to it by plain SQL now and then; else it runs dry.
    topped: bool
    secret: str = ""
    #: It has a key and nobody uses it.
    idle: bool = False


class Seat:
    """One gateway: its configuration, and the process of the moment. It is what `Process` takes for a house."""

    def __init__(self, directory: Path, number: int, stores: Stores, router: Router, credits: str) -> None:
        directory.mkdir()
        self.number = number
        self._directory = directory
        self._stores = stores
        self._router = router
        self._credits = credits
        self._lives = 0
        self.process: Process | None = None
        #: All of its processes by name, and when those that were killed were (monotonic time).
        self.lives: dict[str, Process] = {}
        self.died_at_s: dict[str, float] = {}
        self.stopped = False

    @property
    def name(self) -> str:
        return f"g{self.number}-{self._lives}"

    @property
    def address(self) -> str | None:
        """None while there is nobody to ask."""
        return None if self.process is None or self.stopped else self.process.address

    def write_config(self) -> Path:
        path = self._directory / "gateway.yaml"
        values = {
            "name": self.name,
            "redis": self._stores.redis_relays[self.number].url,
            "postgres": self._stores.postgres_relays[self.number].url,
            "upstream": self._router.url,
            "credits": self._credits,
        }
        path.write_text(_CONFIG.format(**values))
        (self._directory / "policies").mkdir(exist_ok=True)
        for name, text in _POLICIES.items():
            (self._directory / "policies" / f"{name}.yaml").write_text(text)
        load(path, {})
        return path

    async def start(self) -> None:
        self._lives += 1
        process = Process(self)  # type: ignore[arg-type]  # all it asks a house for is its configuration
        await process.__aenter__()
        self.process = self.lives[self.name] = process

    async def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            self.died_at_s[self.name] = time.monotonic()
            await process.end(signal.SIGKILL)
            await process.__aexit__()

    async def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            await process.__aexit__()

    async def audited(self) -> str:
        """What `gateway credits audit` finds wrong, as an operator would ask it; empty: nothing."""
        path = str(self._directory / "gateway.yaml")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "--config", path, "credits", "audit"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=REPOSITORY,
        )
        told, _ = await process.communicate()
        return told.decode() if process.returncode else ""

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.process is not None:
            self.stopped = number is signal.SIGSTOP
            self.process.process.send_signal(number)


@dataclass(frozen=True)
class Happening:
    """A fault, from its beginning until all was well again (monotonic time)."""

    fault: str
    began_s: float
    ended_s: float


@dataclass
class World:
    stores: Stores
    router: Router
    seats: list[Seat] = field(default_factory=list)
    orgs: list[Org] = field(default_factory=list)
    #: What was done to them, in this order.
    happened: list[Happening] = field(default_factory=list)

    async def furnish(self, seconds: float) -> None:
        """Orgs with credits for a part of the run, and keys."""
        postgres = Postgres(self.stores.postgres_url, timeout_ms=20_000, pool_max=2)
        await postgres.open()
        try:
            await migrate(postgres)
            kinds = [("flat", False)] * 8 + [("flat", True)] * 4 + [("metered", False)] * 5 + [("metered", True)] * 2
            for number, (plan, topped) in enumerate([*kinds, ("flat", False)]):
                org = Org(f"{plan}-{'topped' if topped else 'dry'}-{number}", plan, topped, idle=number == len(kinds))
                key = new_key()
                org.secret = key.secret
                await postgres.row(ADD_ORG, org.org_id, "", plan)
                await postgres.row(query("add_key"), key.key_id, key.sha256, org.org_id, None, "chaos", None)
                amount = max(5, int(seconds * 0.8))
                await grant(postgres, org.org_id, amount, grant_id="grant:chaos")
                self.orgs.append(org)
        finally:
            await postgres.close()

    async def open(self) -> None:
        await asyncio.gather(*(seat.start() for seat in self.seats))

    async def close(self) -> None:
        for seat in self.seats:
            if seat.stopped:
                seat.signal(signal.SIGCONT)
        await asyncio.gather(*(seat.stop() for seat in self.seats), return_exceptions=True)

    @property
    def died_at_s(self) -> dict[str, float]:
        """Of all processes that were killed, by name."""
        return {name: at_s for seat in self.seats for name, at_s in seat.died_at_s.items()}

    def lines(self, event: str) -> Iterator[Mapping[str, Any]]:
        """What all gateways logged of it, those that were killed included."""
        for seat in self.seats:
            for process in seat.lives.values():
                yield from process.events(event)

    def fallen(self) -> Iterator[str]:
        """Gateways that ended although nobody wanted it."""
        for seat in self.seats:
            if seat.process is not None and seat.process.process is not None:
                code = seat.process.process.returncode
                if code is not None:
                    yield f"{seat.name} ended by itself, with {code}"


def body(words: int, stream: bool) -> bytes:
    asked = {"model": "m", "messages": [{"role": "user", "content": "say"}], "words": words, "stream": stream}
    return json.dumps(asked).encode()

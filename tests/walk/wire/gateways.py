"""The gateways that the dialogues are played through, and the ways through them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis.asyncio as redis_client

from gateway.ledger import grant, migrate
from gateway.stores import Postgres
from tests.walk.house import House, in_process
from tests.walk.wire import stage
from tests.walk.wire.case import BUFFERED, CAPPED, CONFIGURED, METERED, PLAIN, Case
from tests.walk.wire.ear import STALL_S
from tests.walk.wire.exchange import Setting
from tests.walk.wire.messages import HEAD_END
from tests.walk.wire.stage import Transcript, Upstream

SIGNING_KEY = "a-signing-key-of-32-characters-or-more"
ROUTES = """
  - { path: /metered/*, upstream: ai_router, dialect: openai, usage: openai_chat }
  - { path: /capped/*, upstream: ai_router, usage: openai_chat, enforce_max_tokens: inject }
  - { path: /*, upstream: ai_router }
"""
ROUTES_CONFIGURED = """
  - { path: /metered/*, upstream: ai_router, usage: openai_chat }
  - { path: /*, upstream: ai_router, forward_credential: true }
"""
PLANS = "plans: { pro: { credits: 1000, policy: pro } }"
PLANS_TOO = (
    "plans: { pro: { credits: 1000, policy: pro }, counted: { credits: 1000, policy: counted }, "
    "capped: { credits: 1000, policy: capped } }"
)
#: Of what is taken all is back within a millisecond, and each request has a session of its own, so that none meets the
#: traces of another one. What is in shadow would tell of the ones before.
LIMITS: list[dict[str, Any]] = [
    {"name": "tried-out", "count": "requests", "limit": 1, "window": "1h", "shadow": True, "warn_at": 0.01},
    {
        "name": "rate",
        "count": "requests",
        "algorithm": "gcra",
        "limit": 1_000_000,
        "burst": 4,
        "window": "1s",
        "warn_at": 0.25,
        "per": "session",
    },
    {
        "name": "credits",
        "count": "credits",
        "algorithm": "gcra",
        "limit": 1_000_000,
        "burst": 100,
        "window": "1s",
        "per": "session",
    },
]
#: Tokens are limited here, so the body is read before it is forwarded.
COUNTED = """
policy: counted
limits:
  - { name: tokens, count: tokens, algorithm: gcra, limit: 1000000000, burst: 1000000000, window: 1s, per: session }
"""
#: Output costs something, and 1024 tokens of it are held for a client that names no maximum.
CAPPED_POLICY = "policy: capped\nprice: { per_million_output_tokens: 1 }\n"


@dataclass
class WireHouse(House):
    """A house with a second plan, under which tokens are limited, a third, under which they cost something, and with
    more lines of configuration."""

    more: dict[str, str] = field(default_factory=dict)

    def write_config(self) -> Path:
        path = super().write_config()
        text = path.read_text()
        for line, instead in {PLANS: PLANS_TOO, **self.more}.items():
            assert line in text, line
            text = text.replace(line, instead)
        path.write_text(text)
        (self.directory / "policies" / "counted.yaml").write_text(COUNTED)
        (self.directory / "policies" / "capped.yaml").write_text(CAPPED_POLICY)
        return path


@dataclass(frozen=True, slots=True)
class Way:
    """One way through a gateway."""

    port: int
    #: Path prefix of the route.
    at: bytes
    key: bytes
    setting: Setting


class Gateways:
    """An upstream, and all the ways to it."""

    def __init__(self, upstream: Upstream, ways: dict[str, Way]) -> None:
        self.upstream = upstream
        self.ways = ways

    async def directly(self, case: Case, way: str) -> Transcript:
        connection = "closed" if case.closed_directly else "open"
        return await stage.play(case.dialogue, self.upstream, self.upstream.port, self._words(way), connection)

    async def through(self, case: Case, way: str, connection: str) -> Transcript:
        """What was asked directly, asked again through the gateway."""
        words = self._words(way)
        return await stage.play(case.dialogue, self.upstream, self.ways[way].port, words, connection)

    async def refused(self, request: bytes) -> tuple[bytes, bytes]:
        """What the upstream and the client got of a request that is not to be forwarded."""
        self.upstream.begin()
        way = self.ways[PLAIN]
        for word, value in self._words(PLAIN).items():
            request = request.replace(word, value)
        reader, writer = await asyncio.open_connection("127.0.0.1", way.port)
        try:
            writer.write(request)
            async with asyncio.timeout(STALL_S):
                head = await reader.readuntil(HEAD_END)
            return bytes(self.upstream.ear.heard), head
        finally:
            writer.transport.abort()

    def _words(self, way: str) -> dict[bytes, bytes]:
        return {b"{at}": self.ways[way].at, b"{key}": self.ways[way].key, b"{way}": way.encode()}


@asynccontextmanager
async def gateways(directory: Path, redis_url: str, database_url: str) -> AsyncIterator[Gateways]:
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(stage.upstream())
        postgres = Postgres(database_url, timeout_ms=10_000, pool_max=4)
        await postgres.open()
        stack.push_async_callback(postgres.close)
        await migrate(postgres)
        redis = redis_client.Redis.from_url(redis_url)
        stack.push_async_callback(redis.aclose)
        (directory / "configured").mkdir()
        settings = {"routes": ROUTES, "signing_key": SIGNING_KEY, "lease": "30s"}
        house = WireHouse(
            directory,
            redis_url,
            database_url,
            postgres,
            redis,
            f"http://{upstream.authority}",
            limits=LIMITS,
            settings=settings,
        )
        configured = WireHouse(
            directory / "configured",
            redis_url,
            database_url,
            postgres,
            redis,
            f"http://{upstream.authority}",
            limits=LIMITS,
            settings={
                "routes": ROUTES_CONFIGURED,
                "trusted": "[127.0.0.1/32]",
                "limit_rules": "{ headers: false }",
            },
            more={
                "listen:\n  {": "listen:\n  { via: edge,",
                "    targets:": "    host: client\n    targets:",
                'sessions: { signing_key: "" }': "sessions: { mint: false }",
            },
        )
        acme = (await house.add_key("acme", "ann")).encode()
        counted = (await house.add_key("counted")).encode()
        capped = (await house.add_key("capped")).encode()
        await postgres.row("UPDATE gateway.org SET plan = org_id WHERE org_id IN ('counted', 'capped')")
        for org in ("acme", "counted", "capped"):
            await grant(postgres, org, 1_000_000_000_000, grant_id=f"grant:{org}")
        port = _port((await stack.enter_async_context(in_process(house))).address)
        other_port = _port((await stack.enter_async_context(in_process(configured))).address)
        authority = upstream.authority.encode()
        ann = Setting(authority, b"acme", b"pro", b"ann", SIGNING_KEY.encode(), key=acme)
        yield Gateways(
            upstream,
            {
                PLAIN: Way(port, b"", acme, ann),
                METERED: Way(port, b"/metered", acme, replace(ann, dialect="openai")),
                BUFFERED: Way(
                    port,
                    b"/metered",
                    counted,
                    Setting(
                        authority,
                        b"counted",
                        b"counted",
                        None,
                        SIGNING_KEY.encode(),
                        key=counted,
                        buffered=True,
                        dialect="openai",
                    ),
                ),
                CAPPED: Way(
                    port,
                    b"/capped",
                    capped,
                    Setting(
                        authority,
                        b"capped",
                        b"capped",
                        None,
                        SIGNING_KEY.encode(),
                        key=capped,
                        buffered=True,
                        most_tokens=1024,
                        limit_fields=False,
                    ),
                ),
                CONFIGURED: Way(
                    other_port,
                    b"",
                    acme,
                    Setting(
                        authority,
                        b"acme",
                        b"pro",
                        b"ann",
                        mint=False,
                        forward_credential=True,
                        host_is_clients=True,
                        via=b"edge",
                        trusted=True,
                        limit_fields=False,
                    ),
                ),
            },
        )


def _port(address: str) -> int:
    port = urlsplit(address).port
    assert port is not None
    return port

"""Requests of every fate from many hands, against limits of every kind: what the access log must be able to tell."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import jwt

from gateway.ledger import grant
from gateway.ledger.overrides import set_override
from tests.identity.signing import SECRET
from tests.walk import raw
from tests.walk.house import House, Running
from tests.walk.raw import Visit

CHAT = "/v1/chat/completions"
ORGS = ("acme", "globex", "initech")
MODELS = ("demo-small", "demo-large", "gpt-4o", None)
IN_FLIGHT = 24
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\nhalf"

ROUTES = f"""
  - {{ path: {CHAT}, method: POST, upstream: ai_router, dialect: openai, usage: openai_chat, body_bytes_max: 64KiB }}
  - {{ path: /v1/*, upstream: ai_router }}
  - {{ path: /files/*, upstream: ai_router }}
"""

LIMITS: list[dict[str, Any]] = [
    {"name": "user-rpm", "count": "requests", "limit": 40, "window": "3s", "per": "user", "warn_at": 0.8},
    {"name": "org-rpm", "count": "requests", "limit": 130, "window": "4s", "per": "route"},
    {"name": "rps", "count": "requests", "algorithm": "gcra", "limit": 30, "window": "1s", "burst": 20, "per": "key"},
    {"name": "tpm", "count": "tokens", "limit": 9000, "window": "3s", "per": ["org", "model"], "warn_at": 0.5},
    {"name": "in", "count": "input_tokens", "algorithm": "gcra", "limit": 1800, "window": "1s", "burst": 2500},
    {"name": "out", "count": "output_tokens", "limit": 7000, "window": "2s", "per": "user"},
    {"name": "daily", "count": "tokens", "algorithm": "calendar", "limit": 30000, "period": "day", "per": "model",
     "anchor": "06:00", "zone": "Europe/Berlin"},
    {"name": "parallel", "count": "concurrent", "limit": 4, "per": "user"},
    {"name": "streams", "count": "concurrent", "limit": 1, "per": "session", "when": {"stream": True}},
    {"name": "talks", "count": "sessions", "limit": 14, "window": "2s", "per": "user"},
    {"name": "spend", "count": "credits", "limit": 90, "window": "3s", "per": "key"},
    {"name": "tenant", "count": "requests", "limit": 4, "window": "1s", "per": "header:X-Tenant",
     "when": {"header": ["x-tenant"]}},
    {"name": "team", "count": "requests", "limit": 70, "window": "2s", "per": "claim:team"},
    {"name": "gpt", "count": "requests", "limit": 10, "window": "2s", "when": {"model": "gpt-*", "route": "/v1/*"}},
    {"name": "beta", "count": "requests", "limit": 5, "window": "1s",
     "when": {"header": ["x-beta"], "route": "/v1/beta/*", "method": "GET"}},
    {"name": "watched", "count": "tokens", "algorithm": "gcra", "limit": 900, "window": "1s", "burst": 1500,
     "shadow": True},
]  # fmt: skip
SHARED: list[dict[str, Any]] = [
    {"name": "everybody", "count": "requests", "algorithm": "gcra", "limit": 300, "window": "1s", "burst": 60},
    {"name": "all-parallel", "count": "concurrent", "limit": 14, "per": "upstream"},
    {"name": "all-tokens", "count": "tokens", "limit": 20000, "window": "3s", "per": "model"},
    {"name": "all-ips", "count": "requests", "limit": 60, "window": "2s", "per": "client_ip", "shadow": True},
]


@dataclass
class Router:
    """An upstream that does what `x-do` says, and knows who waits for it."""

    arrived: dict[str, asyncio.Event] = field(default_factory=dict)

    async def __call__(self, visit: Visit) -> None:
        while True:
            head = (await visit.read_head()).decode("latin-1").lower()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = await visit.reader.readexactly(int(fields.get("content-length", "0")))
            asked = json.loads(body) if body[:1] == b"{" else {}
            do = fields.get("x-do", "answer")
            if fields.get("x-pause"):
                await asyncio.sleep(float(fields["x-pause"]))
            if do == "hang-up":
                return
            if do == "break":
                await visit.send(HALF)
                return
            if do.startswith("wait"):
                if do == "wait-midway":
                    await visit.send(HALF)
                self.arrived[fields["x-tag"]].set()
                await visit.until_closed()
                return
            await visit.send(_answer(do, asked))


def _answer(do: str, asked: Mapping[str, Any]) -> bytes:
    if do == "fail":
        return b"HTTP/1.1 500 Oops\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    tokens = 20 + len(json.dumps(asked)) % 150
    usage = {"prompt_tokens": tokens, "completion_tokens": 3 * tokens, "total_tokens": 4 * tokens}
    # A model of its own name, as routers have it: limits are for what was asked.
    answer: dict[str, Any] = {"model": f"{asked.get('model', 'some')}-2026", "choices": []}
    if do != "silent":
        answer["usage"] = usage
    text = json.dumps(answer).encode()
    if not asked.get("stream"):
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        return head % len(text) + text
    events = b"data: %b\n\ndata: [DONE]\n\n" % text
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n"
    return head % len(events) + events


def settle_in(house: House) -> None:
    """The house is set up for `Traffic`."""
    house.settings |= {
        "trusted": "[127.0.0.0/8]",
        "routes": ROUTES,
        "identity": f'[ api_key: {{}}, jwt: {{ keys: [ secret: "{SECRET}" ], org: org, user: sub, plan: plan }} ]',
        "shared_limits": json.dumps(SHARED),
        # Few enough that some find none and never reach the upstream.
        "connections_max": "6",
        "queue_timeout": "20ms",
        "redis_timeout": "5s",
    }
    house.limits, house.price = LIMITS, 1


@dataclass
class Traffic:
    """`send` so many requests."""

    house: House
    router: Router
    credentials: list[str] = field(default_factory=list)

    async def prepare(self) -> None:
        house = self.house
        for org in ORGS:
            await grant(house.postgres, org, 1_000_000, grant_id=f"grant:{org}")
            self.credentials += [await house.add_key(org, user) for user in ("ann", "bob", None)]
        await grant(house.postgres, "umbrella", 1_000_000, grant_id="grant:umbrella")
        await grant(house.postgres, "poor", 30, grant_id="grant:poor")
        self.credentials.append(await house.add_key("poor", "ann"))
        for user, team in (("ada", "red"), ("alan", "blue"), ("kurt", None)):
            claims: dict[str, Any] = {"org": "umbrella", "sub": user, "plan": "pro", "exp": int(time.time()) + 3600}
            self.credentials.append(jwt.encode(claims | ({"team": team} if team else {}), SECRET, algorithm="HS256"))

    async def send(self, running: Running, count: int, seed: int) -> None:
        """All have been answered, or have left; an org's limits are changed on the way."""
        dice = random.Random(seed)
        numbers = iter(range(count))
        changes = {
            count // 3: lambda: self._change(running, "acme", {"user-rpm": 12, "rps": 8}),
            count // 2: lambda: self._change(running, "globex", {"org-rpm": 60, "tpm": 20_000}),
        }
        async with self.house.client(running.address) as client:

            async def visitor() -> None:
                for number in numbers:
                    if number in changes:
                        await changes[number]()
                    await self._ask(client, dice, number)

            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(visitor())

    async def _change(self, running: Running, org: str, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            await set_override(self.house.postgres, running.gateway._settings, org, name, value)

    async def _ask(self, client: httpx.AsyncClient, dice: random.Random, number: int) -> None:
        tag = f"t{number}"
        fields = {
            "x-request-id": tag,
            "x-tag": tag,
            "x-forwarded-for": f"10.0.0.{dice.randint(1, 6)}",
            "authorization": f"Bearer {self._credential(dice)}",
            "x-do": dice.choices(
                ("answer", "silent", "fail", "hang-up", "break", "wait", "wait-midway"), (70, 8, 6, 3, 3, 5, 5)
            )[0],
        }
        if dice.random() < 0.3:
            fields["x-pause"] = f"{dice.random() * 0.05:.3f}"
        if dice.random() < 0.6:
            fields["x-session-id"] = f"talk-{dice.randint(1, 40)}"
        if dice.random() < 0.1:
            fields["x-tenant"] = dice.choice(("red", "blue", "x" * 300, "café"))
        if dice.random() < 0.2:
            fields["x-beta"] = "1"
        path, options = self._path(dice)
        if dice.random() < 0.02:
            fields["authorization"] = "Bearer nobody"
        raw_fields = {name.encode(): value.encode("latin-1") for name, value in fields.items()}
        request = client.build_request("GET" if not options else "POST", path, headers=raw_fields, **options)
        if fields["x-do"].startswith("wait"):
            await self._leave(client, request, tag)
        else:
            with contextlib.suppress(httpx.TransportError):
                await client.send(request)

    def _credential(self, dice: random.Random) -> str:
        return dice.choices(self.credentials, [3, 2, 1, 3, 2, 1, 1, 1, 1, 1, 2, 1, 1])[0]

    def _path(self, dice: random.Random) -> tuple[str, dict[str, Any]]:
        if dice.random() < 0.25:
            return dice.choice(("/v1/beta/x?y=1", "/v1/%62eta/Straße", "/v1/other", "/files/a%20b", "/nowhere")), {}
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * dice.randint(1, 120)}]}
        if (model := dice.choice(MODELS)) is not None:
            body["model"] = model
        if dice.random() < 0.3:
            body["stream"] = True
        if dice.random() < 0.9:
            body["max_tokens"] = dice.choices((1, 50, 300, 99_999), (9, 40, 50, 2))[0]
        return CHAT, {"content": json.dumps(body).encode() if dice.random() < 0.98 else b"{"}

    async def _leave(self, client: httpx.AsyncClient, request: httpx.Request, tag: str) -> None:
        """Once the upstream has the request, its client goes; or it has its refusal before."""
        arrived = self.router.arrived[tag] = asyncio.Event()
        asking = asyncio.create_task(client.send(request))
        waiting = asyncio.create_task(arrived.wait())
        await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        asking.cancel()
        await asyncio.gather(asking, waiting, return_exceptions=True)
        del self.router.arrived[tag]


@asynccontextmanager
async def traffic(house: House) -> AsyncIterator[Traffic]:
    """A house with an upstream and everybody in it; its gateway is still to be started."""
    settle_in(house)
    router = Router()
    async with raw.upstream(router) as scripted:
        house.upstream_url = scripted.url
        ready = Traffic(house, router)
        await ready.prepare()
        yield ready

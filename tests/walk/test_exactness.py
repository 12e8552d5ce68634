"""Limits of every kind at once, thousands of requests at once, four gateways: never one more, and never one less.

Each org sends as many requests as the others. All of them meet loose limits of several kinds, one of which all orgs
share, and the tight ones that a header of theirs names. What the tight ones admit is known beforehand; what the loose
ones have counted afterwards is what was admitted.
"""

import asyncio
import json
import resource
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from gateway import keys
from tests.cluster import ClusterHandle, cluster
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House, Process, in_process
from tests.walk.raw import Visit
from tests.walk.test_bounds import deaf_port

GATEWAYS = 4
REQUESTS = 2_000
#: Connections opened at a time: no listener's queue overflows, which would cost seconds.
OPENED_TOGETHER = 200
BODY = json.dumps({"model": "model-0", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]})
#: What a request reserves, and what it then uses: a quarter of its bytes and its max_tokens.
TOKENS = -(-len(BODY) // 4) + 100
TOKENS_MAX = 10_000
USERS = 5
MODELS = 4


def limit(name: str, most: int, count: str = "requests", **more: Any) -> dict[str, Any]:
    how = {} if count == "concurrent" or "period" in more else {"window": "1h"}
    return {"name": name, "count": count, "limit": most, **how, **more}


def tight(name: str, most: int, count: str = "requests", **more: Any) -> dict[str, Any]:
    return limit(name, most, count, when={"header": f"x-{name}"}, **more)


LOOSE = [
    limit("all", 100_000),
    limit("all-paced", 100_000, algorithm="gcra", burst=100_000),
    limit("all-monthly", 100_000, algorithm="calendar", period="month"),
    limit("all-running", 100_000, "concurrent"),
    limit("all-tokens", 100_000_000, "tokens"),
]
TIGHT = [
    tight("log", 100),
    tight("buckets", 150),
    tight("paced", 1, algorithm="gcra", burst=80),
    tight("monthly", 90, algorithm="calendar", period="month"),
    tight("running", 40, "concurrent"),
    tight("tokens", TOKENS_MAX, "tokens"),
    tight("each-user", 12, per="user"),
    tight("each-model", 7, per=["user", "model"]),
    tight("talks", 30, "sessions"),
]
SHARED = [limit("everybody", 100_000), tight("together", 111)]
#: What each header lets through, of all orgs that send it.
ADMITTED = {
    "log": 100,
    "buckets": 150,
    "paced": 80,
    "monthly": 90,
    "running": 40,
    "tokens": TOKENS_MAX // TOKENS,
    "each-user": 12 * USERS,
    "each-model": 7 * USERS * MODELS,
    "talks": 30,
    "together": 111,
}
#: What an org sends -> its name; two of them share what they have together.
ORGS = {f"org-{name}": name for name in ADMITTED} | {"org-other": "together"}
EACH = -(-REQUESTS // len(ORGS))


@dataclass
class Stores:
    """The servers of limits, as the test sees them."""

    url: str
    clients: list[redis.Redis]
    owner: Callable[[str], redis.Redis]

    def counted(self, key: str) -> int:
        """The sum that sliding buckets keep."""
        text = self.owner(key).get(key)
        assert isinstance(text, bytes)
        total, _ = struct.unpack_from(">dd", text)
        return int(total)

    def errors(self) -> set[str]:
        """Every kind of error that a server has replied."""
        return {kind.removeprefix("errorstat_") for client in self.clients for kind in client.info("errorstats")}


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[ClusterHandle]:
    with cluster(nodes=3) as handle:
        yield handle


@pytest.fixture(params=["one server", "cluster of three"])
def limiting(request: pytest.FixtureRequest, redis_url: str) -> Iterator[Stores]:
    if request.param == "one server":
        with redis.Redis.from_url(redis_url) as only:
            yield Stores(redis_url, [only], lambda key: only)
        return
    handle: ClusterHandle = request.getfixturevalue("three_nodes")
    clients = {node.port: redis.Redis.from_url(node.url) for node in handle.nodes}
    assert {handle.owner(keys.account(org)).port for org in ORGS} == set(clients)
    yield Stores(handle.url, list(clients.values()), lambda key: clients[handle.owner(key).port])
    for client in clients.values():
        client.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Both ends of all connections are files, here and in the gateways."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Upstream:
    """Says how many tokens were used; those that are to run at the same time it lets wait for one another."""

    waiting: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, visit: Visit) -> None:
        head = (await visit.read_head()).lower()
        await visit.reader.readexactly(len(BODY))
        if b"x-running:" in head:
            self.waiting += 1
            await self.go_on.wait()
        usage = {"prompt_tokens": TOKENS - 100, "completion_tokens": 100, "total_tokens": TOKENS}
        answer = json.dumps({"object": "chat.completion", "choices": [], "usage": usage}).encode()
        fields = b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d" % len(answer)
        await visit.send(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (fields, answer))


@dataclass
class Crowd:
    """Every request, on a connection of its own."""

    requests: list[tuple[str, bytes]]
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    strange: list[bytes] = field(default_factory=list)

    async def ask(self, addresses: list[str]) -> None:
        """All connections stand, then all requests leave."""
        async with AsyncExitStack() as stack:
            streams = []
            for at in range(0, len(self.requests), OPENED_TOGETHER):
                some = range(at, min(at + OPENED_TOGETHER, len(self.requests)))
                streams += await asyncio.gather(
                    *(stack.enter_async_context(raw.connection(addresses[number % len(addresses)])) for number in some)
                )
            await asyncio.gather(*map(self._ask, self.requests, streams))

    async def _ask(self, asked: tuple[str, bytes], stream: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        group, request = asked
        reader, writer = stream
        writer.write(request)
        answer = await reader.read(-1)
        status = int(answer[9:12] or b"0")
        self.answers[group, status] += 1
        if status not in (200, 429):
            self.strange.append(answer)


async def requests_of(house: House) -> list[tuple[str, bytes]]:
    """What every org sends, mixed: (the limit that is tight for it, the request)."""
    found = []
    for org, name in ORGS.items():
        secrets = [await house.add_key(org, f"user-{number}") for number in range(USERS)]
        for number in range(EACH):
            body = BODY.replace("model-0", f"model-{number // USERS % MODELS}")
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nX-{name}: 1\r\n"
                f"X-Session-Id: talk-{number}\r\nAuthorization: Bearer {secrets[number % USERS]}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            found.append((number, name, (head + body).encode()))
    return [(name, request) for _, name, request in sorted(found)]


@asynccontextmanager
async def four_gateways(house: House) -> AsyncIterator[list[Process]]:
    async with AsyncExitStack() as stack:
        yield await asyncio.gather(*(stack.enter_async_context(Process(house)) for _ in range(GATEWAYS)))


@pytest.mark.usefixtures("many_files")
async def test_four_gateways_admit_exactly_what_each_of_many_limits_says(house: House, limiting: Stores) -> None:
    house.settings.update(
        redis=limiting.url, redis_timeout="10s", postgres_timeout="20s", shared_limits=json.dumps(SHARED)
    )
    house.limits, house.price = [*LOOSE, *TIGHT], 0
    for client in limiting.clients:
        client.flushall()
        client.config_resetstat()
    upstream = Upstream()
    async with raw.upstream(upstream) as router:
        house.upstream_url = router.url
        async with four_gateways(house) as gateways:
            crowd = Crowd(await requests_of(house))
            asking = asyncio.create_task(crowd.ask([gateway.address for gateway in gateways]))
            await until(lambda: crowd.answers.total() + upstream.waiting == len(crowd.requests) or asking.done(), 60)
            upstream.go_on.set()
            await asking
            assert crowd.strange == []
            assert {name: crowd.answers[name, 200] for name in ADMITTED} == ADMITTED
            assert upstream.waiting == ADMITTED["running"]
            # What was refused has been given back wherever it had been taken already.
            everybody = keys.counter(keys.SHARED, "everybody:sliding_buckets:3600000")
            await until(lambda: limiting.counted(everybody) == sum(ADMITTED.values()))
            for org, name in ORGS.items():
                if name != "together":
                    assert limiting.counted(keys.counter(org, "all:sliding_buckets:3600000")) == ADMITTED[name]
                    tokens = limiting.counted(keys.counter(org, "all-tokens:sliding_buckets:3600000"))
                    assert tokens == ADMITTED[name] * TOKENS
            assert not limiting.errors() & {"CROSSSLOT", "WRONGTYPE", "ERR", "MOVED", "TRYAGAIN"}
        lines = [line for gateway in gateways for line in gateway.output]
        assert [line for line in lines if "CROSSSLOT" in str(line) or line.get("level") in ("warning", "error")] == []


async def test_what_one_gateway_remembers_keeps_nobody_from_what_another_has_given_back(house: House) -> None:
    """It is remembered for a second; without that, for the hour that the server said."""
    house.limits, house.price = [limit("rph", 1)], 0
    house.settings.update(connect="3s", limit_rules="{ deny_cache: 1s }")
    reachable = house.upstream_url
    with deaf_port() as house.upstream_url:
        async with Process(house) as trying:
            house.upstream_url = reachable
            async with (
                in_process(house) as gateway,
                house.client(trying.address) as elsewhere,
                house.client(gateway.address) as here,
            ):
                lost = asyncio.create_task(elsewhere.get("/echo"))
                await until(lambda: house.redis.keys("*:l:rph:*"))
                refused = await here.get("/echo")
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 3_000
                assert gateway.gateway.admission.denials_count == 1

                async def admitted() -> bool:
                    assert lost.done() or gateway.gateway.admission.denials_count == 1
                    return (await here.get("/echo")).status_code == 200

                await until(admitted, 10)
                assert (await lost).status_code == 504

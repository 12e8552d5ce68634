"""A gateway with a fault proxy and a scripted upstream behind it, in this process; leaving it shows what was left."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House, Running, in_process
from tests.walk.raw import Visit
from tests.walk.storm.cases import ANSWERS, Case
from tests.walk.storm.faults import FaultProxy, fault_proxy
from tests.walk.storm.reading import Reading, ask
from tests.walk.storm.remains import Remains

ROUTES = """
  - { path: /v1/chat/completions, method: POST, upstream: ai_router, dialect: openai, usage: openai_chat }
  - { path: /again/*, upstream: ai_router, retry: idempotent }
  - { path: /never/*, upstream: ai_router, retry: never }
  - { path: /*, upstream: ai_router }
"""
LIMITS = [
    {"name": "tpm", "count": "tokens", "limit": 1_000_000_000, "window": "1h", "per": "org"},
    {"name": "parallel", "count": "concurrent", "limit": 1_000_000, "per": "org"},
]
AT_ONCE = 24


@dataclass
class Scene:
    """What a test can do and see."""

    house: House
    gateway: Running
    proxy: FaultProxy
    #: Ids of the requests that reached the upstream whole, as often as they did.
    seen: list[str] = field(default_factory=list)

    async def ask(self, case: Case) -> Reading:
        return await ask(self.gateway.address, case.request(self.house.secret))

    async def ask_all(self, cases: Iterable[Case], at_once: int = AT_ONCE) -> dict[Case, Reading]:
        """Every case was asked, `at_once` at a time. More than 100 may not knock at the upstream together."""
        waiting = list(cases)[::-1]
        readings: dict[Case, Reading] = {}

        async def work() -> None:
            while waiting:
                case = waiting.pop()
                readings[case] = await self.ask(case)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return readings

    async def ledger(self) -> dict[str, tuple[str, str, int]]:
        """Outcome, basis and micro-credits of all that was charged, by request id, once everything is settled; without
        the requests whose fault is `none`."""
        await self.quiet()
        rows = await self.house.postgres.rows(
            "SELECT meta->>'request_id' AS id, meta->>'outcome' AS outcome, meta->>'basis' AS basis,"
            " -amount AS charged FROM gateway.ledger WHERE kind IN ('settle', 'orphan')"
        )
        rows = [row for row in rows if "-none-" not in row["id"]]
        booked = {row["id"]: (row["outcome"], row["basis"], int(row["charged"])) for row in rows}
        assert len(booked) == len(rows), "a request was charged twice"
        return booked

    async def quiet(self) -> None:
        """No request is open, none holds anything, and nothing is owed to the ledger."""
        inside = self.gateway.gateway
        await until(lambda: inside.admission.open_count == 0 and inside.settling.idle)
        [stats] = inside.upstreams.stats().values()
        assert (stats.in_use, stats.waiting, stats.dialling, stats.in_flight, stats.queued) == (0, 0, 0, 0, 0)
        await self.house.settled()
        assert [key async for key in self.house.redis.scan_iter("*:l:parallel*")] == []

    async def disconnected(self) -> None:
        """Nor is there a connection to the upstream any more, not even one that rests."""
        await self.quiet()
        await until(lambda: self.gateway.gateway.upstreams.stats()["ai_router"].open == 0)
        await until(lambda: self.proxy.open_count == 0)


@asynccontextmanager
async def scene(house: House, **settings: str) -> AsyncIterator[Scene]:
    """Leaving it, nothing may be left: no slot, waiter or dial, no hold or lease, no task, no socket."""
    house.limits = LIMITS
    house.settings.update(routes=ROUTES, trusted="[127.0.0.0/8]", keepalive="100ms", **settings)
    await house.credits(100_000)
    seen: list[str] = []
    async with raw.upstream(lambda visit: _answer(visit, seen)) as upstream, fault_proxy(upstream.url) as proxy:
        house.upstream_url = proxy.url
        async with in_process(house) as gateway:
            current = Scene(house, gateway, proxy, seen)
            # Whatever is opened once and kept is open now.
            await current.ask_all(Case("length", "none", 0, number=number) for number in range(AT_ONCE))
            await current.disconnected()
            before = Remains.now((house.database_url, house.redis_url))
            yield current
            await current.disconnected()
            await before.none_new()


async def _answer(visit: Visit, seen: list[str]) -> None:
    """Every request of a connection gets what its `X-Answer` names."""
    while True:
        head = await visit.read_head()
        lines = (line.partition(": ") for line in head.decode().split("\r\n")[1:-2])
        fields = {name.lower(): value for name, _, value in lines}
        if "content-length" in fields:
            await visit.reader.readexactly(int(fields["content-length"]))
        elif "transfer-encoding" in fields:
            while size := int(await visit.reader.readline(), 16):
                await visit.reader.readexactly(size + 2)
            await visit.reader.readline()
        seen.append(fields["x-request-id"])
        answer = ANSWERS[fields["x-answer"]]
        await visit.send(answer.wire)
        if not answer.framed:
            return

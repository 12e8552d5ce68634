"""Stores that go away: a quick 503 to whom they are needed for, service to everybody else, and nothing left over.

Timeouts are the defaults here. The bound is for what the gateway takes, so where it lies close to a deadline of ours
the quickest of a few answers counts: what a busy machine adds is not the gateway's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from gateway.identity.api_key import new_key
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, DEFAULT_TIMEOUTS, REFUSE, House, Running, chat_body, in_process
from tests.walk.raw import Relay, Visit

CHAT, ECHO = "/v1/chat/completions", "/echo"
#: Far beyond the deadlines (100 ms Redis, 200 ms PostgreSQL), far below any hang: a busy machine must not fail a test.
#: What it really took goes into the report: `make test ARGS="tests/walk/test_stores_away.py --junitxml=report.xml"`.
BOUND_S = 2.0
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LIMITS = [
    {"name": "rph", "count": "requests", "limit": 5, "window": "1h", "per": "org"},
    {"name": "tph", "count": "tokens", "limit": 100_000, "window": "1h", "per": "org"},
    {"name": "parallel", "count": "concurrent", "limit": 5, "per": "org"},
]


@pytest.fixture
async def house(house: House) -> House:
    house.settings.update(DEFAULT_TIMEOUTS)
    await house.credits(20)
    return house


@pytest.fixture
async def redis_relay(house: House) -> AsyncIterator[Relay]:
    async with raw.relay(house.redis_url) as relay:
        house.settings["redis"] = relay.url
        yield relay


@pytest.fixture
async def postgres_relay(house: House) -> AsyncIterator[Relay]:
    async with raw.relay(house.database_url) as relay:
        house.settings["postgres"] = relay.url
        yield relay


@dataclass
class Timed:
    answer: httpx.Response
    took_s: float


async def timed(client: httpx.AsyncClient, path: str = CHAT, secret: str | None = None) -> Timed:
    started = time.perf_counter()
    fields = {} if secret is None else {"authorization": f"Bearer {secret}"}
    answer = await client.post(path, json=chat_body(), headers={"x-session-id": "talk", **fields})
    took_s = time.perf_counter() - started
    if answer.status_code == 503:
        _refused_after_ms.append(round(took_s * 1000, 1))
    return Timed(answer, took_s)


_refused_after_ms: list[float] = []


@pytest.fixture(autouse=True)
def figures(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """How long each 503 of this test took, for the report."""
    _refused_after_ms.clear()
    yield
    record_property("refused_after_ms", sorted(_refused_after_ms))


def unavailable(answer: httpx.Response, path: str = CHAT, code: str = "store_unavailable") -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) in (1, 2)
    assert answer.headers["x-should-retry"] == "true"
    assert len(answer.headers["x-request-id"]) == 32
    document = answer.json()["error"] if path == CHAT else answer.json()
    assert document["code"] == code
    assert "127.0.0.1" not in answer.text  # where our stores are is nobody's business


async def served_again(client: httpx.AsyncClient) -> None:
    async def served() -> bool:
        return (await client.post(CHAT, json=chat_body())).status_code == 200

    await until(served)


async def nothing_is_left(house: House, gateway: Running) -> None:
    admission = gateway.gateway.admission
    await until(lambda: admission.open_count == 0 and admission.settling.idle)
    await house.settled()
    assert [key async for key in house.redis.scan_iter("*:l:parallel*")] == []


@pytest.mark.parametrize("way", ["refuses", "never answers"])
async def test_without_redis_from_the_start_every_answer_is_a_quick_503(
    house: House, redis_relay: Relay, way: str
) -> None:
    house.settings.update(REFUSE)
    if way == "refuses":
        await redis_relay.close()
    else:
        redis_relay.freeze()
    async with in_process(house, redis_is_up=False) as gateway, house.client(gateway.address) as client:
        for path in (CHAT, ECHO, CHAT):
            refused = await timed(client, path)
            unavailable(refused.answer, path)
            assert refused.took_s < BOUND_S
        together = await asyncio.gather(*(timed(client) for _ in range(20)))
        assert {refused.answer.status_code for refused in together} == {503}
        assert max(refused.took_s for refused in together) < BOUND_S
        # Nothing was decided by that: it is served as soon as Redis is there.
        if way == "refuses":
            await redis_relay.open()
        else:
            redis_relay.thaw()
        await served_again(client)
        await nothing_is_left(house, gateway)
    assert await house.charges() == [("settle", CREDIT)]


async def test_redis_that_stalls_is_a_quick_503_and_every_doubtful_admission_is_taken_back(
    house: House, redis_relay: Relay
) -> None:
    """What was sent before the stall is executed after it, long after its client was told no."""
    house.limits = LIMITS
    house.settings.update(REFUSE)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert (await timed(client)).answer.status_code == 200
        await nothing_is_left(house, gateway)
        redis_relay.freeze()
        stalled = await asyncio.gather(*(timed(client, path) for path in (CHAT, ECHO, CHAT)))
        for refused, path in zip(stalled, (CHAT, ECHO, CHAT), strict=True):
            unavailable(refused.answer, path)
            assert refused.took_s < BOUND_S
        # Until the connection is given up, and after.
        await until(lambda: not gateway.gateway.redis.usable)
        later = await timed(client)
        unavailable(later.answer)
        assert later.took_s < BOUND_S
        assert gateway.gateway.settling.backlog_count >= 3
        redis_relay.thaw()
        await until(lambda: gateway.gateway.redis.usable)
        await nothing_is_left(house, gateway)
        # Of five an hour one was used. Every one of the others is still there, so no refused request kept its place.
        statuses = [(await timed(client)).answer.status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 200, 429]
        await nothing_is_left(house, gateway)
    assert await house.charges() == [("settle", CREDIT)] * 5


async def test_redis_that_stalls_during_an_answer_neither_delays_nor_loses_it(house: House, redis_relay: Relay) -> None:
    go_on = asyncio.Event()

    async def in_two_parts(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(HEAD + b"5\r\nfirst\r\n")
        await go_on.wait()
        await visit.send(b"6\r\nsecond\r\n0\r\n\r\n")
        await visit.until_closed()

    house.limits = LIMITS
    async with raw.upstream(in_two_parts) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(raw.request(house.secret, ECHO))
            await reader.readuntil(b"first")
            redis_relay.freeze()
            started = time.perf_counter()
            go_on.set()
            await reader.readuntil(b"0\r\n\r\n")
            assert time.perf_counter() - started < BOUND_S
            await until(lambda: gateway.gateway.settling.backlog_count == 1)

            # Redis does not take it, so PostgreSQL does; what is held for it there waits for Redis.
            async def is_charged() -> bool:
                return await house.charges() == [("settle", CREDIT)]

            await until(is_charged)
            assert gateway.gateway.settling.backlog_count == 1
            redis_relay.thaw()
            await nothing_is_left(house, gateway)
    assert await house.charges() == [("settle", CREDIT)]


async def test_redis_that_restarts_is_used_again(house: House, redis_relay: Relay) -> None:
    house.settings.update(REFUSE)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert (await timed(client)).answer.status_code == 200
        await nothing_is_left(house, gateway)
        await redis_relay.close()
        for _ in range(3):
            refused = await timed(client)
            unavailable(refused.answer)
            assert refused.took_s < BOUND_S
        await redis_relay.open()
        await served_again(client)
        await nothing_is_left(house, gateway)
    assert await house.charges() == [("settle", CREDIT)] * 2


@pytest.mark.parametrize("way", ["refuses", "stalls"])
async def test_without_postgres_known_orgs_are_served_and_strangers_get_a_quick_503(
    house: House, postgres_relay: Relay, way: str
) -> None:
    other = await house.add_key("globex")
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        # globex is known, but not what it may spend.
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200
        assert (await timed(client, secret=other)).answer.status_code == 402
        await nothing_is_left(house, gateway)
        await house.redis.delete("{ai_credits:org_globex}:a")
        if way == "refuses":
            await postgres_relay.close()
        else:
            postgres_relay.freeze()
        for path in (CHAT, ECHO):
            strangers = [await timed(client, path, new_key().secret) for _ in range(3)]
            for stranger in strangers:
                unavailable(stranger.answer, path)
            assert min(stranger.took_s for stranger in strangers) < BOUND_S
        penniless = [await timed(client, secret=other) for _ in range(3)]
        for unknown in penniless:
            unavailable(unknown.answer, code="credits_unavailable")
        assert min(unknown.took_s for unknown in penniless) < BOUND_S
        served = [await timed(client) for _ in range(3)]
        assert [request.answer.status_code for request in served] == [200] * 3
        assert min(request.took_s for request in served) < BOUND_S
        assert await house.charges() == [("settle", CREDIT)]
        if way == "refuses":
            await postgres_relay.open()
        else:
            postgres_relay.thaw()
        await nothing_is_left(house, gateway)
        assert await house.charges() == [("settle", CREDIT)] * 4

        async def known_again() -> bool:
            answer = await client.post(CHAT, json=chat_body(), headers={"authorization": f"Bearer {other}"})
            return answer.status_code == 402

        await until(known_again)

"""A gateway that is killed, a database that goes away: every hold ends, every request is charged at most once."""

import asyncio
import contextlib
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from gateway import keys
from gateway.embedded import EmbeddedPostgres
from gateway.ledger import migrate
from gateway.stores import Postgres
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, Process, chat_body, in_process
from tests.walk.raw import Visit

STREAMS = 50
OUTAGE_S, OUTAGE_FULL_S = 5.0, 20.0

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)


async def endless(visit: Visit) -> None:
    """The first event of a stream that never ends by itself."""
    await visit.read_head()
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    await visit.send(b"9\r\ndata: 1\n\n\r\n")
    await visit.until_closed()


@BOTH_STORES
async def test_a_gateway_killed_during_fifty_streams_leaves_no_hold_and_charges_each_once(house: House) -> None:
    house.settings.update(lease="2s", heartbeat="500ms")
    house.limits = [{"name": "parallel", "count": "concurrent", "limit": STREAMS, "per": "org"}]
    await house.credits(100)
    async with raw.upstream(endless) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as gateway:
            async with asyncio.TaskGroup() as clients:
                heard: list[bytes] = []
                for _ in range(STREAMS):
                    clients.create_task(follow(gateway.address, house.secret, heard))
                await until(lambda: len(heard) == STREAMS)
                assert await house.redis.hlen(keys.holds(house.org_id)) == STREAMS
                await gateway.end(signal.SIGKILL)
        async with Process(house) as successor:
            await house.settled(20)
            assert await house.charges() == [("orphan", CREDIT)] * STREAMS
            assert await house.balance() == (100 - STREAMS) * CREDIT
            await house.assert_accounted_for()
            # The slots of the dead are free as well.
            async with raw.connection(successor.address) as (reader, writer):
                writer.write(raw.request(house.secret))
                assert b"200 OK" in await reader.readuntil(b"\r\n")


async def follow(address: str, secret: str, heard: list[bytes]) -> None:
    """One client of a stream, until its connection ends; its first event goes to `heard`."""
    async with raw.connection(address) as (reader, writer):
        writer.write(raw.request(secret, "/v1/chat/completions", body=b'{"stream": true}'))
        heard.append(await reader.readuntil(b"data: 1\n\n"))
        with contextlib.suppress(ConnectionError):
            await reader.read()


async def test_a_stream_that_outlives_its_lease_keeps_its_hold(house: House) -> None:
    house.settings.update(lease="1s", heartbeat="200ms")
    await house.credits(5)
    async with raw.upstream(endless) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(raw.request(house.secret))
            await reader.readuntil(b"data: 1")
            [hold_id] = await house.redis.hkeys(keys.holds(house.org_id))
            first_ms = await house.redis.zscore(keys.deadlines(house.org_id), hold_id)

            async def renewed_past_its_first_lease() -> bool:
                now_ms = await house.redis.zscore(keys.deadlines(house.org_id), hold_id)
                return now_ms is not None and first_ms is not None and now_ms > first_ms + 1500

            await until(renewed_past_its_first_lease)
            assert await house.redis.hlen(keys.holds(house.org_id)) == 1
            assert gateway.gateway.money.sweeper.swept_count == 0


async def test_postgres_stopped_for_a_while_under_load_loses_nothing(house: House, tmp_path: Path, full: bool) -> None:
    database = EmbeddedPostgres(tmp_path / "own", durable=False)
    url = await database.start()
    try:
        async with raw.relay(url) as relay:
            async with _moved_to(house, url, relay.url), in_process(house) as gateway:
                await house.credits(100_000)
                async with house.client(gateway.address) as client:
                    assert (await client.get("/echo")).status_code == 200
                    statuses = Counter[int]()
                    stop = asyncio.Event()
                    load = [asyncio.create_task(_ask(client, statuses, stop)) for _ in range(4)]
                    await until(lambda: statuses[200] > 20)
                    await relay.close()
                    await database.stop()
                    # The outage itself: a length of time, not a wait for something.
                    await asyncio.sleep(OUTAGE_FULL_S if full else OUTAGE_S)
                    during = sum(statuses.values())
                    url = await database.start()
                    await relay.open(url)
                    await until(lambda: sum(statuses.values()) > during + 20)
                    stop.set()
                    await asyncio.gather(*load)
                assert set(statuses) == {200}
                house.postgres = Postgres(url, timeout_ms=10_000, pool_max=2)
                await house.postgres.open()
                await house.settled(30)
                asked = statuses[200] + 1
                assert await house.charges() == [("settle", CREDIT)] * asked
                assert await house.balance() == (100_000 - asked) * CREDIT
                await house.assert_accounted_for()
                await house.postgres.close()
    finally:
        await database.stop()


class _moved_to:
    """The house lives in another database for a while."""

    def __init__(self, house: House, url: str, relayed_url: str) -> None:
        self._house, self._url, self._relayed_url = house, url, relayed_url

    async def __aenter__(self) -> None:
        house = self._house
        self._before = house.postgres
        house.database_url = self._relayed_url
        house.postgres = Postgres(self._url, timeout_ms=10_000, pool_max=2)
        await house.postgres.open()
        await migrate(house.postgres)
        house.secret = await house.add_key(house.org_id, "ann")

    async def __aexit__(self, *_: object) -> None:
        await self._house.postgres.close()
        self._house.postgres = self._before


async def _ask(client: httpx.AsyncClient, statuses: Counter[int], stop: asyncio.Event) -> None:
    while not stop.is_set():
        answer = await client.post("/v1/chat/completions", json=chat_body())
        statuses[answer.status_code] += 1
        if answer.status_code != 200:
            return

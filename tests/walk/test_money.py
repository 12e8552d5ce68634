"""Exactly what was paid for, whatever happens at the same time."""

import asyncio
from collections import Counter

import httpx
import pytest

from tests.waiting import until
from tests.walk.house import CREDIT, House, Process, chat_body, in_process

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)


async def storm(house: House, addresses: list[str], count: int) -> Counter[int]:
    """`count` requests at once, spread over the gateways; how often each status came back."""

    async def ask(client: httpx.AsyncClient) -> int:
        answer = await client.post("/v1/chat/completions", json=chat_body())
        return answer.status_code

    clients = [house.client(address) for address in addresses]
    try:
        return Counter(await asyncio.gather(*(ask(clients[number % len(clients)]) for number in range(count))))
    finally:
        for client in clients:
            await client.aclose()


async def assert_twenty_paid(house: House, statuses: Counter[int]) -> None:
    assert statuses[200] == 20
    assert statuses[402] + statuses[429] == 180  # out of credits, or the last of them held by requests in flight
    await house.settled()
    assert await house.charges() == [("settle", CREDIT)] * 20
    assert await house.balance() == 0
    assert await house.redis.get(f"ai_credits:org_{house.org_id}") == b"0"
    await house.assert_accounted_for()


@BOTH_STORES
async def test_two_hundred_requests_for_twenty_credits(house: House) -> None:
    await house.credits(20)
    async with in_process(house) as gateway:
        await assert_twenty_paid(house, await storm(house, [gateway.address], 200))


@BOTH_STORES
async def test_two_hundred_requests_for_twenty_credits_over_two_gateways(house: House) -> None:
    await house.credits(20)
    async with Process(house) as one, Process(house) as two:
        await assert_twenty_paid(house, await storm(house, [one.address, two.address], 200))


async def test_fifty_a_minute_admits_exactly_fifty_over_two_gateways(house: House) -> None:
    house.price = 0
    house.limits = [{"name": "rpm", "count": "requests", "limit": 50, "window": "1m", "per": "org"}]
    async with Process(house) as one, Process(house) as two:
        statuses = await storm(house, [one.address, two.address], 500)
    assert statuses == {200: 50, 429: 450}


async def test_a_denial_changes_no_key(house: House) -> None:
    house.limits = [
        {"name": "rpm", "count": "requests", "limit": 1, "window": "1h", "per": "org"},
        {"name": "tpm", "count": "tokens", "limit": 100000, "window": "1h", "per": "user"},
        {"name": "parallel", "count": "concurrent", "limit": 5, "per": "org"},
    ]
    await house.credits(5)

    async def dump() -> dict[bytes, bytes | None]:
        return {key: await house.redis.dump(key) async for key in house.redis.scan_iter()}

    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200
        await house.settled()
        before = await dump()
        for _ in range(5):
            answer = await client.post("/v1/chat/completions", json=chat_body(), headers={"x-session-id": "new"})
            assert answer.status_code == 429
        assert await dump() == before


async def test_a_top_up_by_plain_sql_is_spendable_at_once(house: House) -> None:
    await house.credits(1)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        assert (await client.get("/echo")).status_code == 200
        assert (await client.get("/echo")).status_code == 402
        await house.settled()
        await house.postgres.row("UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'acme'")

        async def mirrored() -> bool:
            return bool(await house.redis.get("ai_credits:org_acme") == b"1")

        await until(mirrored, 5.0)
        assert (await client.get("/echo")).status_code == 200


async def test_a_revoked_key_is_refused_at_once_by_every_gateway(house: House) -> None:

    house.price = 0
    async with Process(house) as one, Process(house) as two:
        for process in (one, two):
            async with house.client(process.address) as client:
                assert (await client.get("/echo")).status_code == 200
        await house.revoke(house.secret)
        for process in (one, two):
            async with house.client(process.address) as client:

                async def refused(client: httpx.AsyncClient = client) -> bool:
                    return (await client.get("/echo")).status_code == 401

                await until(refused, 2.0)

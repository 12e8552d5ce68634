"""Floods of requests that are nobody's are refused before a store is asked; known clients next to them are served."""

import asyncio
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from gateway import app as application
from gateway.identity.api_key import Rows, key_loader, key_sha256, new_key
from gateway.identity.key_cache import KeyRecord, LoadKey
from tests.identity.given import Time
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House, Running, chat_body, in_process

ECHO, CHAT = "/echo", "/v1/chat/completions"
#: Nothing drains while a test runs, but by the clock that it sets.
THREE_AN_HOUR = "{ failures: 3, window: 1h, burst: 3, networks_max: 100 }"
ROUTES = f"""
  - {{ path: {CHAT}, method: POST, upstream: ai_router, dialect: openai, usage: openai_chat }}
  - {{ path: {ECHO}, method: [GET, POST], upstream: ai_router }}
"""


@pytest.fixture
async def house(house: House) -> House:
    house.settings.update(unauthenticated=THREE_AN_HOUR, routes=ROUTES)
    house.price = 0
    return house


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The keys that PostgreSQL was asked for."""
    asked: list[bytes] = []

    def counting(postgres: Rows) -> LoadKey:
        load = key_loader(postgres)

        async def look_up(digest: bytes) -> KeyRecord | None:
            asked.append(digest)
            return await load(digest)

        return look_up

    monkeypatch.setattr(application, "key_loader", counting)
    yield asked


def bearer(secret: str, client_ip: str | None = None) -> dict[str, str]:
    fields = {"authorization": f"Bearer {secret}"}
    return fields if client_ip is None else {**fields, "x-forwarded-for": client_ip}


def code(answer: httpx.Response) -> tuple[int, str | None]:
    body = answer.json()
    return answer.status_code, body.get("code") or body.get("error", {}).get("code")


async def ask(client: httpx.AsyncClient, fields: dict[str, str] | None = None, path: str = ECHO) -> int:
    return (await client.post(path, json=chat_body(), headers=fields)).status_code


async def fail(client: httpx.AsyncClient, times: int = 3) -> None:
    for _ in range(times):
        assert await ask(client, bearer(new_key().secret)) == 401


def client_of(gateway: Running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.address, timeout=30)


async def scripts_run(house: House) -> int:
    """How many scripts Redis has run: every admission is one."""
    stats = await house.redis.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha", "fcall"))


async def test_a_flood_of_bad_keys_stops_before_any_store_is_asked(house: House, lookups: list[bytes]) -> None:
    async with in_process(house) as gateway, client_of(gateway) as client:
        clock = gateway.gateway.floodgate._monotonic_ms = Time()
        for _ in range(3):
            answer = await client.post(CHAT, json=chat_body(), headers=bearer(new_key().secret))
            assert code(answer) == (401, "invalid_api_key")
        asked = len(lookups)
        assert asked >= 3, "one may be repeated when the channel for announcements comes up"
        scripts = await scripts_run(house)
        for _ in range(50):
            answer = await client.post(CHAT, json=chat_body(), headers=bearer(new_key().secret))
            assert code(answer) == (429, "too_many_failures")
            assert answer.json()["error"]["type"] == "rate_limit_error", "the route's dialect"
            assert 0 < int(answer.headers["retry-after-ms"]) <= 20 * 60_000
        assert len(lookups) == asked
        assert await scripts_run(house) == scripts
        clock.pass_ms(3_600_000)
        assert await ask(client, bearer(house.secret)) == 200
        assert len(lookups) > asked and await scripts_run(house) > scripts, "what is let through does show"


async def test_a_known_key_is_served_next_to_a_flood_though_its_record_is_old(
    house: House, lookups: list[bytes]
) -> None:
    house.settings["identity"] = "[ api_key: { cache_ttl: 0s } ]"
    async with in_process(house) as gateway, client_of(gateway) as client:
        assert await ask(client, bearer(house.secret)) == 200
        await fail(client)
        assert await ask(client, bearer(new_key().secret)) == 429
        assert [await ask(client, bearer(house.secret)) for _ in range(5)] == [200] * 5
        assert lookups.count(key_sha256(house.secret)) >= 1 + 5
        await house.revoke(house.secret)
        assert await ask(client, bearer(house.secret)) in (401, 429), "the announcement may come first"
        assert await ask(client, bearer(house.secret)) == 429


async def test_a_key_nobody_has_seen_waits_as_long_as_it_is_told(house: House) -> None:
    async with in_process(house) as gateway, client_of(gateway) as client:
        clock = gateway.gateway.floodgate._monotonic_ms = Time()
        await fail(client)
        answer = await client.post(ECHO, headers=bearer(house.secret))
        assert code(answer) == (429, "too_many_failures")
        retry_ms = int(answer.headers["retry-after-ms"])
        assert retry_ms == 20 * 60_000
        # Others of its network go on knocking meanwhile; being refused costs nobody anything.
        for _ in range(20):
            assert await ask(client, bearer(new_key().secret)) == 429
        clock.pass_ms(retry_ms - 1)
        assert await ask(client, bearer(house.secret)) == 429
        clock.pass_ms(1)
        assert await ask(client, bearer(house.secret)) == 200
        await fail(client, times=1)
        assert await ask(client, bearer(house.secret)) == 200, "from now on it is known"


async def test_other_networks_behind_the_same_proxy_do_not_notice(house: House) -> None:
    house.settings["trusted"] = "[127.0.0.0/8]"
    bad, good = new_key().secret, house.secret
    async with in_process(house) as gateway, client_of(gateway) as client:
        # However it is rotated on the left, the rightmost hop that is no proxy of ours is who is asking.
        for number, client_ip in enumerate(("2001:db8::1", "2001:db8::2", "2001:db8::ffff:0:0:3")):
            assert await ask(client, bearer(bad, f"198.51.100.{number}, {client_ip}, 127.0.0.2")) == 401
        assert await ask(client, bearer(good, "198.51.100.9, 2001:db8::4")) == 429
        for client_ip in ("2001:db8:0:1::1", "198.51.100.1", "198.51.100.9"):
            assert await ask(client, bearer(bad, client_ip)) == 401
        assert await ask(client, bearer(good, "198.51.100.1")) == 200


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/echo", 401),
        ("GET", "/nowhere", 404),
        ("PUT", "/echo", 405),
        ("GET", "/%65cho", 400),
    ],
)
async def test_whatever_is_refused_before_somebody_is_known_counts(
    house: House, method: str, target: str, status: int
) -> None:
    async with in_process(house) as gateway:
        statuses = []
        for _ in range(5):
            async with raw.connection(gateway.address) as (reader, writer):
                writer.write(f"{method} {target} HTTP/1.1\r\nHost: gateway\r\n\r\n".encode())
                statuses.append(int((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]))
    assert statuses == [status] * 3 + [429] * 2


async def test_mistakes_of_a_known_client_are_its_own_and_nobody_elses(house: House) -> None:
    async with in_process(house) as gateway, client_of(gateway) as client:
        assert await ask(client, bearer(house.secret)) == 200
        assert [await ask(client, bearer(house.secret), "/nowhere") for _ in range(5)] == [404] * 5
        assert (await client.put(ECHO, headers=bearer(house.secret))).status_code == 405
        assert gateway.gateway.floodgate.networks_count == 0


async def test_what_is_refused_once_somebody_is_known_does_not_count(house: House) -> None:
    house.price = 1
    async with in_process(house) as gateway, client_of(gateway) as client:
        assert [await ask(client, bearer(house.secret)) for _ in range(5)] == [402] * 5
        too_large = {**bearer(house.secret), "content-type": "application/json"}
        answer = await client.post(CHAT, content=b"x" * (11 << 20), headers=too_large)
        assert answer.status_code == 413
        assert gateway.gateway.floodgate.networks_count == 0


async def test_a_store_that_is_away_is_nobodys_failure(house: House) -> None:
    async with raw.relay(house.database_url) as relay:
        house.settings["postgres"] = relay.url
        async with in_process(house) as gateway, client_of(gateway) as client:
            assert await ask(client, bearer(house.secret)) == 200
            await relay.close()
            assert [await ask(client, bearer(new_key().secret)) for _ in range(5)] == [503] * 5
            assert gateway.gateway.floodgate.networks_count == 0


async def test_leaving_before_the_answer_is_no_way_around_it(house: House, lookups: list[bytes]) -> None:
    house.settings["postgres_timeout"] = "30s"
    async with raw.relay(house.database_url) as relay:
        house.settings["postgres"] = relay.url
        async with in_process(house) as gateway, client_of(gateway) as client:
            await fail(client, times=1)
            relay.freeze()
            for secret in (new_key().secret, new_key().secret):
                async with raw.connection(gateway.address) as (_, writer):
                    writer.write(raw.request(secret))
                    await until(partial(lookups.count, key_sha256(secret)))
            await until(partial(gateway.gateway.floodgate.refusal, "127.0.0.1"))
            assert await ask(client, bearer(new_key().secret)) == 429
            relay.thaw()


async def test_what_a_trusted_proxy_vouches_for_is_served_whatever_others_did(house: House) -> None:
    house.settings["identity"] = (
        "[ api_key: {}, trusted_header: { org: x-tenant, from: [127.0.0.0/8], default_plan: pro } ]"
    )
    async with in_process(house) as gateway, client_of(gateway) as client:
        await fail(client)
        assert await ask(client) == 429
        assert await ask(client, {"x-tenant": "acme"}) == 200


async def test_a_handshake_of_a_network_that_fails_is_refused_like_any_request(house: House) -> None:
    async with in_process(house) as gateway, client_of(gateway) as client:
        await fail(client)
        fields = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        answer = await client.get(ECHO, headers={**bearer(house.secret), **fields})
        assert code(answer) == (429, "too_many_failures")


async def test_without_a_bound_nothing_is_ever_refused_before_identity(house: House) -> None:
    house.settings["unauthenticated"] = "{ failures: 0 }"
    async with in_process(house) as gateway, client_of(gateway) as client:
        await fail(client, times=50)
        assert gateway.gateway.floodgate.networks_count == 0


async def test_what_was_refused_and_who_is_remembered_can_be_seen(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    async with in_process(house) as gateway, client_of(gateway) as client:
        await fail(client)
        await asyncio.gather(*(ask(client, bearer(new_key().secret), CHAT) for _ in range(4)))
        assert (await client.post("/nowhere")).status_code == 429
        text = (await client.get("/-/metrics")).text
    assert "gateway_unauthenticated_networks 1.0" in text
    refused = 'gateway_requests_total{decision="too_many_failures",route="%s",status="429"} %s'
    assert refused % (f"POST {CHAT}", "4.0") in text and refused % ("none", "1.0") in text
    assert capsys.readouterr().out.count('"decision":"too_many_failures"') == 5

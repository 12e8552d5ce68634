"""The gateway's own pages: what they say is true now, not when the gateway started."""

import asyncio
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, DEFAULT_TIMEOUTS, House, Process, chat_body, in_process
from tests.walk.raw import Relay, Visit

CHAT = "/v1/chat/completions"
NAMES = ("redis", "postgres", "upstream:ai_router")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def relays(house: House, stack: AsyncExitStack, *, are_open: bool = True) -> Mapping[str, Relay]:
    """A relay in front of everything the gateway depends on, by the name of its check."""
    house.settings.update(DEFAULT_TIMEOUTS)
    urls = (house.redis_url, house.database_url, house.upstream_url)
    opened = [await stack.enter_async_context(raw.relay(url, is_open=are_open)) for url in urls]
    for setting, relay in zip(("redis", "postgres", "upstream"), opened, strict=True):
        house.settings[setting] = relay.url
    return dict(zip(NAMES, opened, strict=True))


async def until_health(client: httpx.AsyncClient, status: str, *missing: str) -> Mapping[str, Any]:
    """`/-/health` comes to say exactly this, and `/-/ready` agrees with it."""
    seen: dict[str, Any] = {}

    async def says() -> bool:
        answer = await client.get("/-/health")
        seen.update(answer.json())
        away = {name for name, check in seen["checks"].items() if not check["ok"]}
        assert answer.status_code == (503 if seen["status"] == "down" else 200)
        return seen["status"] == status and away == set(missing)

    await until(says)
    assert seen["checks"].keys() == set(NAMES)
    ready = await client.get("/-/ready")
    serves = status != "down"
    assert (ready.status_code, ready.json()["ready"]) == (200 if serves else 503, serves)
    return seen


async def chat(client: httpx.AsyncClient) -> int:
    return (await client.post(CHAT, json=chat_body())).status_code


async def test_health_tells_what_is_away_and_when_it_is_back(house: House) -> None:
    await house.credits(50)
    async with AsyncExitStack() as stack:
        relay = await relays(house, stack)
        gateway = await stack.enter_async_context(in_process(house))
        client = await stack.enter_async_context(house.client(gateway.address))
        await until_health(client, "ok")
        assert await chat(client) == 200
        for name, status, answered in (
            ("redis", "degraded", 200),
            ("postgres", "degraded", 200),
            ("upstream:ai_router", "degraded", 502),
        ):
            await relay[name].close()
            seen = await until_health(client, status, name)
            assert seen["checks"][name]["says"]
            assert await chat(client) == answered
            await relay[name].open()
        for name in ("redis", "postgres"):
            relay[name].freeze()
            await until_health(client, "degraded", name)
            relay[name].thaw()
        await until_health(client, "ok")
        assert await chat(client) == 200
        text = (await client.get("/-/health")).text
        for url in (house.redis_url, house.database_url):
            assert url.partition("@")[0].rpartition(":")[2] not in text
        await house.settled()


async def test_without_redis_nothing_is_served_where_nothing_may_stand_in(house: House) -> None:
    house.settings["credits"] = ", without_redis: refuse"
    await house.credits(5)
    async with AsyncExitStack() as stack:
        relay = await relays(house, stack)
        gateway = await stack.enter_async_context(in_process(house))
        client = await stack.enter_async_context(house.client(gateway.address))
        await until_health(client, "ok")
        await relay["redis"].close()
        await until_health(client, "down", "redis")
        assert await chat(client) == 503


async def test_a_gateway_started_before_everything_else_is_ready_when_the_rest_is_there(house: House) -> None:
    """Not even the schema is there: it is migrated when PostgreSQL can be asked."""
    await house.postgres.rows("DROP SCHEMA gateway CASCADE")
    async with AsyncExitStack() as stack:
        relay = await relays(house, stack, are_open=False)
        process = await stack.enter_async_context(Process(house))
        client = await stack.enter_async_context(house.client(process.address))
        await until_health(client, "down", *NAMES)
        assert (await client.get("/-/ready")).json() == {"ready": False, "status": "down"}
        assert await chat(client) == 503
        await relay["redis"].open()
        await until_health(client, "degraded", "postgres", "upstream:ai_router")
        await relay["postgres"].open()
        await until_health(client, "degraded", "upstream:ai_router")
        house.secret = await house.add_key(house.org_id, "ann")
        client.headers["authorization"] = f"Bearer {house.secret}"
        await house.credits(5)
        assert await chat(client) == 502
        await relay["upstream:ai_router"].open()
        await until_health(client, "ok")
        assert await chat(client) == 200
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


async def test_ready_says_no_while_draining_and_what_was_begun_is_finished(house: House) -> None:
    finish = asyncio.Event()

    async def in_two_parts(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(HEAD + b"5\r\nfirst\r\n")
        await finish.wait()
        await visit.send(b"6\r\nsecond\r\n0\r\n\r\n")
        await visit.until_closed()

    house.settings["grace"] = "1500ms"
    await house.credits(5)
    async with raw.upstream(in_two_parts) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as process, house.client(process.address) as client:
            assert process.process is not None
            await until_health(client, "ok")
            assert (await client.get("/-/ready")).json() == {"ready": True, "status": "ok"}
            async with client.stream("POST", "/echo", content=b"{}") as answer:
                chunks = answer.aiter_raw()
                assert await anext(chunks) == b"first"
                process.process.send_signal(signal.SIGTERM)

                async def draining() -> bool:
                    return (await client.get("/-/ready")).status_code == 503

                await until(draining)
                assert (await client.get("/-/ready")).json() == {"ready": False, "status": "draining"}
                health = await client.get("/-/health")
                assert (health.status_code, health.json()["draining"]) == (200, True)
                # Balancers have not noticed yet: who still comes here is served.
                assert (await client.post("/echo", headers={"authorization": "Bearer gw_none"})).status_code == 401

                async def refuses_new_connections() -> bool:
                    try:
                        async with raw.connection(process.address):
                            return False
                    except ConnectionRefusedError:
                        return True

                await until(refuses_new_connections)
                finish.set()
                assert [chunk async for chunk in chunks] == [b"second"]
            assert await asyncio.wait_for(process.process.wait(), 10) == 0
        # Not left to a lease: settled and posted before the process ended.
        assert await house.at_rest()
    assert await house.charges() == [("settle", CREDIT)]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of an exposition, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labelled(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


async def test_metrics_count_what_was_sent(house: House) -> None:
    house.limits = [{"name": "per-talk", "count": "requests", "limit": 1, "window": "1h", "per": "session"}]
    await house.credits(4)
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        used = []
        for talk in ("a", "b", "a", "a"):
            answer = await client.post(CHAT, json=chat_body(), headers={"x-session-id": talk})
            used += [answer.json()["usage"]] if answer.status_code == 200 else []
        await client.get("/echo")
        await client.get("/echo", headers={"x-demo-status": "500"})
        await client.get("/echo", headers={"authorization": "Bearer gw_none"})
        await client.get("/echo/../../etc/passwd", headers={"x-request-id": "x" * 100})
        async with raw.connection(gateway.address) as (reader, writer):
            writer.write(raw.request(house.secret, "/../b"))
            assert b" 400 " in await reader.readline()
        async with raw.connection(gateway.address) as (reader, writer):
            writer.write(b"GET /echo HTTP/1.1\r\nHost : gateway\r\n\r\n")
            assert b" 400 " in await reader.readline()
        await house.settled()
        answer = await client.get("/-/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    counted = samples(answer.text)
    chat_route, any_route = f"POST {CHAT}", "/*"
    requests = {labels: value for (name, labels), value in counted.items() if name == "gateway_requests_total"}
    expected = {
        labelled(route=chat_route, status="200", decision="admitted"): 2,
        labelled(route=chat_route, status="429", decision="rate_limit_exceeded"): 2,
        labelled(route=any_route, status="200", decision="admitted"): 1,
        labelled(route=any_route, status="500", decision="admitted"): 1,
        labelled(route=any_route, status="401", decision="invalid_api_key"): 1,
        labelled(route=any_route, status="404", decision="admitted"): 1,
        labelled(route="none", status="400", decision="ambiguous_path"): 1,
        labelled(route="none", status="400", decision="refused_unread"): 1,
    }
    assert requests == expected
    assert len(used) == 2
    for (name, labels), value in {
        ("gateway_charged_ucredits_total", labelled(plan="pro")): 3 * CREDIT,
        ("gateway_tokens_total", labelled(plan="pro", direction="input")): sum(u["prompt_tokens"] for u in used),
        ("gateway_tokens_total", labelled(plan="pro", direction="output")): sum(u["completion_tokens"] for u in used),
        ("gateway_outcomes_total", labelled(outcome="complete", basis="exact")): 3,
        ("gateway_outcomes_total", labelled(outcome="upstream_refused", basis="released")): 2,
        ("gateway_phase_seconds_count", labelled(phase="total")): sum(expected.values())
        - 1,  # all but the one that was never read
        ("gateway_phase_seconds_count", labelled(phase="first_byte")): 5,
        ("gateway_open_requests", ()): 0,
        ("gateway_settle_backlog", ()): 0,
        ("gateway_outbox_posted", ()): 3,
        ("gateway_upstream_connections", labelled(upstream="ai_router", state="in_use")): 0,
    }.items():
        assert counted[name, labels] == value, (name, labels)
    assert "passwd" not in answer.text and house.org_id not in answer.text


async def test_the_gateways_own_pages_need_no_credential_and_are_no_requests(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        for path in ("/-/health", "/-/ready", "/-/metrics"):
            assert (await client.get(path)).status_code == 200
            assert (await client.post(path)).status_code == 405
        # Whatever else is below is not there, and never the upstream's.
        assert (await client.get("/-/admin")).status_code == 404
        assert "gateway_requests_total{" not in (await client.get("/-/metrics")).text
    assert '"event":"request"' not in capsys.readouterr().out

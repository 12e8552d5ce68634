"""Limits as clients and operators meet them: over real servers, from the policy file to the answer."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from gateway import keys
from gateway.config import load
from gateway.ledger.overrides import set_override, unset_override
from tests.waiting import until
from tests.walk.house import House, Running, chat_body, in_process

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
async def _money_is_no_matter(house: House) -> None:
    await house.credits(1000)


def rpm(most: int, **more: Any) -> dict[str, Any]:
    return {"name": "rpm", "count": "requests", "limit": most, "window": "1m", **more}


async def statuses(client: httpx.AsyncClient, count: int, **options: Any) -> list[int]:
    return [(await client.get("/echo", **options)).status_code for _ in range(count)]


async def refused(client: httpx.AsyncClient) -> tuple[httpx.Response, Mapping[str, Any]]:
    response = await client.get("/echo")
    assert response.status_code == 429
    return response, response.json()


def verdicts(running: Running, limit: str) -> dict[str, float]:
    samples = running.gateway.metrics_text().decode().splitlines()
    found = {}
    for line in samples:
        if line.startswith(f'gateway_limit_verdicts_total{{limit="{limit}"'):
            labels, _, value = line.rpartition(" ")
            found[labels.partition('verdict="')[2].partition('"')[0]] = float(value)
    return found


@pytest.mark.parametrize(
    "limit",
    [
        rpm(3),
        rpm(3, per="user"),
        rpm(3, per=["org", "route"]),
        {"name": "rps", "count": "requests", "algorithm": "gcra", "limit": 1, "window": "1m", "burst": 3},
        {"name": "month", "count": "requests", "algorithm": "calendar", "limit": 3, "period": "month"},
        {"name": "spend", "count": "credits", "limit": 3, "window": "1h"},
        {"name": "talks", "count": "sessions", "limit": 3, "window": "1m"},
    ],
    ids=lambda limit: f"{limit['name']} per {limit.get('per', 'org')}",
)
async def test_each_kind_admits_as_many_as_it_says(house: House, limit: dict[str, Any]) -> None:
    house.limits = [limit]
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 5) == [200, 200, 200, 429, 429]
        _, body = await refused(client)
        assert body["limit"] == limit["name"] and body["violated-policies"] == [limit["name"]]
        assert (body["used"], body["max"]) == (3, 3)


async def test_who_waits_as_told_is_admitted(house: House) -> None:
    house.limits = [{"name": "rps", "count": "requests", "algorithm": "gcra", "limit": 5, "window": "1s", "burst": 1}]
    async with in_process(house) as running, house.client(running.address) as client:
        for _ in range(4):
            assert (await client.get("/echo")).status_code == 200
            response, body = await refused(client)
            assert int(response.headers["retry-after-ms"]) == body["retry_after_ms"] <= 200
            await asyncio.sleep(body["retry_after_ms"] / 1000)  # what the client was told is what is tested


async def test_a_refused_request_takes_nothing_of_the_other_limits(house: House) -> None:
    house.limits = [rpm(100), {"name": "burst", "count": "requests", "limit": 2, "window": "1h"}]
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 10) == [200] * 2 + [429] * 8
        await until(lambda: verdicts(running, "burst") == {"refused": 8.0})
        rpm_key, _ = sorted([key async for key in house.redis.scan_iter("*:l:*")], reverse=True)
        assert rpm_key.decode().endswith(":l:rpm:sliding_log:60000")
        log = await house.redis.get(rpm_key)
        assert isinstance(log, bytes) and len(log) == 2 * 8


async def test_a_shadow_refuses_nobody_and_is_seen_by_the_operator(house: House) -> None:
    house.limits = [rpm(2, shadow=True), rpm(100) | {"name": "real"}]
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 5) == [200] * 5
        await until(lambda: verdicts(running, "rpm") == {"would_refuse": 3.0})
        assert "rpm" not in (await client.get("/echo")).headers["ratelimit-policy"]


async def test_a_client_is_warned_before_it_is_refused(house: House) -> None:
    house.limits = [rpm(5, warn_at=0.8)]
    async with in_process(house) as running, house.client(running.address) as client:
        warnings = [(await client.get("/echo")).headers.get("x-ratelimit-warning") for _ in range(5)]
        assert [warning is not None for warning in warnings] == [False, False, False, True, True]
        await until(lambda: verdicts(running, "rpm") == {"warned": 2.0})


async def test_a_limit_counts_only_what_it_is_about(house: House) -> None:
    house.limits = [
        rpm(1, when={"header": "x-batch"}) | {"name": "batch"},
        rpm(1, when={"model": "large-*"}) | {"name": "large"},
        rpm(1, when={"route": CHAT, "stream": True}) | {"name": "streams"},
    ]
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 3) == [200] * 3
        assert await statuses(client, 2, headers={"x-batch": "1"}) == [200, 429]
        for model, stream, expected in (
            ("large-1", False, 200),
            ("large-2", False, 429),
            ("small", True, 200),
            ("small", True, 429),
            ("small", False, 200),
        ):
            response = await client.post(CHAT, json=chat_body(stream=stream) | {"model": model})
            assert response.status_code == expected, model


async def test_each_model_of_an_org_has_a_portion_of_its_own(house: House) -> None:
    house.limits = [rpm(1, per=["org", "model"])]
    async with in_process(house) as running, house.client(running.address) as client:
        seen = [
            (await client.post(CHAT, json=chat_body() | {"model": m})).status_code for m in ("a", "b", "a", "b", "c")
        ]
        assert seen == [200, 200, 429, 429, 200]


async def test_shared_limits_hold_for_all_orgs_together_and_are_given_back_when_the_org_denies(house: House) -> None:
    house.settings["shared_limits"] = json.dumps([rpm(4) | {"name": "everybody"}])
    house.limits = [rpm(2)]
    other = await house.add_key("globex")
    org, house.org_id = house.org_id, "globex"
    await house.credits(100)
    house.org_id = org
    async with (
        in_process(house) as running,
        house.client(running.address) as acme,
        house.client(running.address, other) as globex,
    ):
        assert await statuses(acme, 4) == [200, 200, 429, 429]
        assert await statuses(globex, 2) == [200, 200]
        response, body = await refused(globex)
        assert set(body["violated-policies"]) <= {"everybody", "rpm"}
        stored = [key async for key in house.redis.scan_iter("{gateway:shared}*")]
        assert len(stored) >= 2 and all([await house.redis.pttl(key) > 0 for key in stored])


async def test_an_override_takes_effect_in_running_gateways_and_goes_again(house: House) -> None:
    house.limits = [rpm(1)]
    house.settings["limit_rules"] = "{ deny_cache: 0s }"
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 2) == [200, 429]
        await set_override(house.postgres, load(house.write_config(), {}), house.org_id, "rpm", 3)
        await until(lambda: running.gateway.overrides.of(house.org_id))
        assert await statuses(client, 3) == [200, 200, 429]
        await unset_override(house.postgres, house.org_id, "rpm")
        await until(lambda: not running.gateway.overrides.of(house.org_id))
        assert (await refused(client))[1]["max"] == 1


async def test_tokens_of_input_and_output_are_reserved_and_corrected(house: House) -> None:
    house.limits = [
        {"name": "in", "count": "input_tokens", "limit": 10_000, "window": "1m"},
        {"name": "out", "count": "output_tokens", "limit": 10_000, "window": "1m"},
        {"name": "tpm", "count": "tokens", "limit": 10_000, "window": "1m"},
    ]
    async with in_process(house) as running, house.client(running.address) as client:
        usage = (await client.post(CHAT, json=chat_body())).json()["usage"]
        await house.settled()
        again = await client.post(CHAT, json=chat_body(max_tokens=9_976))
        assert again.status_code == 429, again.text
        states = {state.split(";")[0].strip(' "'): state for state in again.headers["ratelimit"].split(",")}
        assert f"r={10_000 - usage['prompt_tokens']}" in states["in"]
        assert f"r={10_000 - usage['completion_tokens']}" in states["out"]
        assert f"r={10_000 - usage['total_tokens']}" in states["tpm"]


async def test_who_asks_again_at_once_is_answered_without_redis(house: House) -> None:
    house.limits = [rpm(1)]
    async with in_process(house) as running, house.client(running.address) as client:
        assert await statuses(client, 2) == [200, 429]
        await house.redis.config_resetstat()
        assert await statuses(client, 20) == [429] * 20
        stats = await house.redis.info("commandstats")
        assert stats.get("cmdstat_evalsha", {}).get("calls", 0) <= 1  # one second may have passed
        assert running.gateway.admission.denials_count == 1


async def test_every_limiter_key_has_a_time_to_live(house: House) -> None:
    house.limits = [rpm(5), rpm(500, per="user") | {"name": "u"}, {"name": "p", "count": "concurrent", "limit": 5}]
    async with in_process(house) as running, house.client(running.address) as client:
        await statuses(client, 8)
        await house.settled()
        counters = [key async for key in house.redis.scan_iter(f"{keys.tag(house.org_id)}:l:*")]
        assert len(counters) == 2  # the one of requests in flight is empty, and gone
        assert all([await house.redis.pttl(key) > 0 for key in counters])

"""What clients read about their limits, through a whole gateway: on answers, on refusals, on handshakes."""

import re
from typing import Any

import anthropic
import httpx
import openai
import pytest
from websockets.exceptions import InvalidStatus

from tests.walk.house import House, chat_body, in_process
from tests.walk.live import live

ROUTES = """
  - { path: /v1/messages, upstream: ai_router, dialect: anthropic }
  - { path: /v1/*, upstream: ai_router, dialect: openai, usage: openai_chat }
  - { path: /*, upstream: ai_router }
"""
RPH: dict[str, Any] = {"name": "rph", "count": "requests", "limit": 2, "window": "1h", "warn_at": 0.9}
SHADOW: dict[str, Any] = {"name": "tried-out", "count": "requests", "limit": 1, "window": "1h", "shadow": True}


@pytest.fixture(autouse=True)
def free_of_charge(house: House) -> None:
    house.price = 0
    house.limits = [SHADOW, RPH]
    house.settings["routes"] = ROUTES


def said(answer: httpx.Response | openai.APIStatusError | anthropic.APIStatusError) -> dict[str, str]:
    """The limit fields, with figures of time in place of the times that cannot be known: those within the hour."""
    headers = answer.headers if isinstance(answer, httpx.Response) else answer.response.headers
    fields = {name: value for name, value in headers.items() if "ratelimit" in name}
    for name, value in fields.items():
        if name == "ratelimit":
            fields[name] = re.sub(r"t=(3\d{3})\b", "t=3xxx", value)
        elif name.startswith("x-ratelimit-reset"):
            fields[name] = re.sub(r"^(59m[0-9.]+s|1h0m[0-9.]+s)$", "an hour", value)
        elif name.endswith("-reset"):
            fields[name] = re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", "a time", value)
    return fields


async def test_each_answer_says_what_is_left_and_the_refusal_that_nothing_is(house: House) -> None:
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        first, second, third = [await client.get("/echo") for _ in range(3)]

    policy = '"rph";q=2;w=3600'
    assert [one.status_code for one in (first, second, third)] == [200, 200, 429]
    assert said(first) == {"ratelimit-policy": policy, "ratelimit": '"rph";r=1;t=3xxx'}
    assert said(second) == {
        "ratelimit-policy": policy,
        "ratelimit": '"rph";r=0;t=3xxx',
        "x-ratelimit-warning": "rph;used=1.00",
    }
    assert said(third) == {"ratelimit-policy": policy, "ratelimit": '"rph";r=0;t=3xxx'}
    # Both point to one instant, and the draft forbids that Retry-After is the earlier one.
    assert f"t={third.headers['retry-after']}" in third.headers["ratelimit"]


async def test_an_openai_client_reads_its_own_fields(house: House) -> None:
    async with (
        in_process(house) as gateway,
        openai.AsyncOpenAI(api_key=house.secret, base_url=f"{gateway.address}/v1", max_retries=0) as sdk,
    ):
        answer = await sdk.chat.completions.with_raw_response.create(**chat_body())  # type: ignore[call-overload]
        await sdk.chat.completions.create(**chat_body())  # type: ignore[call-overload]
        with pytest.raises(openai.RateLimitError) as refused:
            await sdk.chat.completions.create(**chat_body())  # type: ignore[call-overload]

    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert said(refused.value) == {
        "ratelimit-policy": '"rph";q=2;w=3600',
        "ratelimit": '"rph";r=0;t=3xxx',
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "an hour",
    }


async def test_an_anthropic_client_reads_its_own_fields_and_its_own_kind_of_refusal(house: House) -> None:
    async with (
        in_process(house) as gateway,
        anthropic.AsyncAnthropic(auth_token=house.secret, base_url=gateway.address, max_retries=0) as sdk,
    ):
        ask: dict[str, Any] = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
        answer = await sdk.messages.with_raw_response.create(**ask)
        await sdk.messages.create(**ask)
        with pytest.raises(anthropic.RateLimitError) as refused:
            await sdk.messages.create(**ask)

    assert answer.headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert (refused.value.type, refused.value.error_code) == ("rate_limit_error", "rate_limit_exceeded")
    assert refused.value.request_id
    assert said(refused.value) == {
        "ratelimit-policy": '"rph";q=2;w=3600',
        "ratelimit": '"rph";r=0;t=3xxx',
        "anthropic-ratelimit-requests-limit": "2",
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "a time",
    }


async def test_an_operator_may_keep_it_all_to_himself_but_for_when_to_come_back(house: House) -> None:
    house.settings["limit_rules"] = "{ headers: false }"
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answers = [await client.get("/v1/models") for _ in range(3)]

    assert [said(one) for one in answers] == [{}, {}, {}]
    assert answers[2].status_code == 429 and int(answers[2].headers["retry-after"]) > 0


async def test_a_websocket_is_told_as_it_opens_and_as_it_is_refused(house: House) -> None:
    del house.settings["routes"]
    async with live(house) as door:
        opened = []
        for _ in range(2):
            async with door.connect() as client:
                assert client.response is not None
                opened.append(client.response.headers["ratelimit"])
        with pytest.raises(InvalidStatus) as refused:
            await door.connect()

    assert [re.sub(r";t=3\d{3}$", "", one) for one in opened] == ['"rph";r=1', '"rph";r=0']
    assert refused.value.response.headers["ratelimit"].startswith('"rph";r=0;t=')
    assert refused.value.response.headers["ratelimit-policy"] == '"rph";q=2;w=3600'

"""The real SDKs, unchanged but for the host name: the same answers, and refusals they understand."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.walk.house import CREDIT, House, in_process

pytestmark = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me, größer oder kleiner? 🙂"},
]


@dataclass
class Attempt:
    """One request as it left the SDK, and what came back."""

    sent_at: float
    status: int = 0
    retry_after_ms: int | None = None
    retry_after: str | None = None


@dataclass
class Attempts:
    """An HTTP client for an SDK that remembers every attempt."""

    made: list[Attempt] = field(default_factory=list)

    def client(self) -> httpx2.AsyncClient:
        async def leaving(_: httpx2.Request) -> None:
            self.made.append(Attempt(time.monotonic()))

        async def arrived(response: httpx2.Response) -> None:
            attempt, wait_ms = self.made[-1], response.headers.get("retry-after-ms")
            attempt.status = response.status_code
            attempt.retry_after_ms = None if wait_ms is None else int(wait_ms)
            attempt.retry_after = response.headers.get("retry-after")

        return httpx2.AsyncClient(event_hooks={"request": [leaving], "response": [arrived]}, timeout=30)

    @property
    def statuses(self) -> list[int]:
        return [attempt.status for attempt in self.made]


@asynccontextmanager
async def openai_at(address: str, secret: str, *, max_retries: int = 2) -> AsyncIterator[tuple[AsyncOpenAI, Attempts]]:
    attempts = Attempts()
    async with AsyncOpenAI(
        api_key=secret, base_url=f"{address}/v1", max_retries=max_retries, http_client=attempts.client()
    ) as client:
        yield client, attempts


@asynccontextmanager
async def anthropic_at(address: str, secret: str) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(api_key=secret, base_url=address, http_client=Attempts().client()) as client:
        yield client


def timeless(value: dict[str, Any]) -> dict[str, Any]:
    """Without the one member of an answer that depends on when it was given."""
    return {name: member for name, member in value.items() if name != "created"}


async def openai_says(address: str, secret: str) -> dict[str, Any]:
    """Everything the SDK makes of the same calls at `address`."""
    async with openai_at(address, secret) as (client, _):
        plain = await client.chat.completions.create(model="demo-small", messages=MESSAGES)
        two = await client.chat.completions.create(model="demo-small", messages=MESSAGES, n=2, max_tokens=4)
        stream = await client.chat.completions.create(model="demo-small", messages=MESSAGES, stream=True)
        counted = await client.chat.completions.create(
            model="demo-small", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        return {
            "plain": timeless(plain.to_dict()),
            "two choices, cut": timeless(two.to_dict()),
            "stream": [timeless(chunk.to_dict()) async for chunk in stream],
            "stream with usage": [timeless(chunk.to_dict()) async for chunk in counted],
            "models": [model.to_dict() async for model in client.models.list()],
        }


async def test_openai_gets_what_it_gets_from_the_router_directly(house: House) -> None:
    await house.credits(10)
    direct = await openai_says(house.upstream_url, house.secret)
    async with in_process(house) as gateway:
        assert await openai_says(gateway.address, house.secret) == direct
        await house.settled()
    # The comparison is about something: text in pieces, and a usage only where it was asked for.
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in direct["stream"]).startswith("You said")
    assert "usage" not in direct["stream"][-1]
    assert direct["stream with usage"][-1]["usage"] == direct["plain"]["usage"]
    assert await house.charges() == [("settle", CREDIT)] * 5


async def anthropic_says(address: str, secret: str) -> dict[str, Any]:
    async with anthropic_at(address, secret) as client:
        plain = await client.messages.create(
            model="demo-large", max_tokens=64, messages=[{"role": "user", "content": "Größer oder kleiner? 🙂"}]
        )
        stream = await client.messages.create(
            model="demo-large", max_tokens=64, stream=True, messages=[{"role": "user", "content": "And streamed?"}]
        )
        return {"plain": plain.to_dict(), "stream": [event.to_dict() async for event in stream]}


async def test_anthropic_gets_what_it_gets_from_the_router_directly(house: House) -> None:
    await house.credits(10)
    direct = await anthropic_says(house.upstream_url, house.secret)
    async with in_process(house) as gateway:
        assert await anthropic_says(gateway.address, house.secret) == direct
        await house.settled()
    assert direct["plain"]["content"][0]["text"].startswith("You said")
    assert direct["stream"][-1]["type"] == "message_stop"
    assert await house.charges() == [("settle", CREDIT)] * 2


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_out_of_credits_is_one_402_and_is_not_retried(
    house: House, capsys: pytest.CaptureFixture[str], stream: bool
) -> None:
    await house.credits(1)
    async with in_process(house) as gateway, openai_at(gateway.address, house.secret) as (client, attempts):
        await client.chat.completions.create(model="demo-small", messages=MESSAGES)
        await house.settled()
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="demo-small", messages=MESSAGES, stream=stream)
    error = caught.value
    assert (type(error), error.status_code, error.code) == (openai.APIStatusError, 402, "insufficient_credits")
    assert isinstance(error.body, dict)
    assert (error.body["required_credits"], error.body["available_credits"]) == (1, 0)
    assert error.request_id == error.body["request_id"]
    assert attempts.statuses == [200, 402]
    assert capsys.readouterr().out.count('"decision":"insufficient_credits"') == 1
    assert await house.charges() == [("settle", CREDIT)]


ONE_A_SECOND = [{"name": "rps", "count": "requests", "limit": 1, "window": "1s", "per": "org"}]


async def test_over_a_limit_the_sdk_waits_as_long_as_it_was_told(house: House) -> None:
    """Four at once where one fits: each of the others is told how long to wait, waits, and asks once more. The window
    has room for one again then, so at least one of them succeeds; whom there is no room for gets RateLimitError."""
    house.price, house.limits = 0, ONE_A_SECOND

    async def call(address: str) -> tuple[bool, Attempts]:
        async with openai_at(address, house.secret, max_retries=1) as (client, attempts):
            try:
                await client.chat.completions.create(model="demo-small", messages=MESSAGES)
            except openai.RateLimitError:
                return False, attempts
            return True, attempts

    async with in_process(house) as gateway:
        calls = await asyncio.gather(*(call(gateway.address) for _ in range(4)))

    at_once = [attempts for _, attempts in calls if len(attempts.made) == 1]
    assert [attempts.statuses for attempts in at_once] == [[200]]
    waited = [(answered, attempts) for answered, attempts in calls if len(attempts.made) == 2]
    assert len(waited) == 3
    for answered, attempts in waited:
        first, second = attempts.made
        assert (first.status, second.status) == (429, 200 if answered else 429)
        assert first.retry_after_ms is not None and 1 <= first.retry_after_ms <= 1000
        assert first.retry_after == "1"
        assert second.sent_at - first.sent_at >= first.retry_after_ms / 1000
    assert any(answered for answered, _ in waited)


async def test_over_a_limit_without_retries_the_error_says_which(house: House) -> None:
    house.price, house.limits = 0, ONE_A_SECOND
    async with in_process(house) as gateway:
        async with openai_at(gateway.address, house.secret, max_retries=0) as (client, attempts):
            outcomes = await asyncio.gather(
                *(client.chat.completions.create(model="demo-small", messages=MESSAGES) for _ in range(3)),
                return_exceptions=True,
            )
    refusals = [outcome for outcome in outcomes if isinstance(outcome, openai.RateLimitError)]
    assert len(refusals) == 2
    assert len(attempts.made) == 3
    for error in refusals:
        assert (error.status_code, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
        assert isinstance(error.body, dict)
        told = {name: error.body[name] for name in ("limit", "scope", "unit", "used", "max", "requested")}
        assert told == {"limit": "rps", "scope": "org", "unit": "requests", "used": 1, "max": 1, "requested": 1}


async def test_a_wrong_key_is_an_authentication_error_and_not_retried(house: House) -> None:
    async with in_process(house) as gateway:
        async with openai_at(gateway.address, "gw_" + "x" * 43) as (client, attempts):
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model="demo-small", messages=MESSAGES)
    assert caught.value.code == "invalid_api_key"
    assert attempts.statuses == [401]

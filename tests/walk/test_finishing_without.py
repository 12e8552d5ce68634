"""Routes with `on_disconnect: drain`: the answer is read to its end without its client, and charged for what it was."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, Running, chat_body, in_process
from tests.walk.raw import Visit

ROUTES = """
  - path: /v1/chat/completions
    method: POST
    upstream: ai_router
    dialect: openai
    usage: openai_chat
    on_disconnect: drain
    drain_timeout: {drain}
    drain_bytes_max: {bytes_max}
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":90,"total_tokens":97}}\n\n'
TOKENS = [{"name": "tokens", "count": "tokens", "limit": 100_000, "window": "1h"}]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Story:
    """An upstream that tells its answer's rest when the test lets it."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.rest = chunk(USAGE) + b"0\r\n\r\n"
        self.closed = False

    async def __call__(self, visit: Visit) -> None:
        await visit.read_head()
        await visit.send(HEAD + chunk(FIRST))
        await self.go_on.wait()
        await visit.send(self.rest)
        await visit.until_closed()
        self.closed = True


@asynccontextmanager
async def left_in_mid_stream(
    house: House, story: Story, *, drain: str = "30s", bytes_max: str = "1MiB"
) -> AsyncIterator[Running]:
    """A gateway whose only client has just left after the first event."""
    house.settings["routes"] = ROUTES.format(drain=drain, bytes_max=bytes_max)
    house.limits = [*TOKENS, {"name": "parallel", "count": "concurrent", "limit": 1}]
    await house.credits(5)
    async with raw.upstream(story) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway:
            async with raw.connection(gateway.address) as (reader, writer):
                body = json.dumps(chat_body(stream=True)).encode()
                writer.write(raw.request(house.secret, "/v1/chat/completions", body=body))
                await reader.readuntil(FIRST)
            proxy = gateway.app._proxy
            assert proxy is not None
            await until(lambda: all(walk._client.left for walk in proxy._open))
            yield gateway


async def ledger_meta(house: House) -> dict[str, object]:
    row = await house.postgres.row("SELECT meta FROM gateway.ledger WHERE kind = 'settle'")
    assert row is not None
    meta = row["meta"]
    return dict(json.loads(meta) if isinstance(meta, str) else meta)


async def test_an_answer_finishes_without_its_client_and_is_charged_in_full(house: House) -> None:
    story = Story()
    async with left_in_mid_stream(house, story) as gateway:
        assert (gateway.gateway.admission.open_count, story.closed) == (1, False)
        story.go_on.set()
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]
    meta = await ledger_meta(house)
    assert (meta["outcome"], meta["output_tokens"], meta["basis"]) == ("complete", 90, "exact")


@pytest.mark.parametrize(
    ("drain", "rest", "bytes_max"),
    [("100ms", b"", "1MiB"), ("30s", chunk(b"data: 1\n\n" * 1000), "1KiB")],
    ids=["too long", "too much"],
)
async def test_going_on_has_a_bound(house: House, drain: str, rest: bytes, bytes_max: str) -> None:
    story = Story()
    story.rest = rest
    async with left_in_mid_stream(house, story, drain=drain, bytes_max=bytes_max) as gateway:
        story.go_on.set()
        await until(lambda: story.closed)
        await house.settled()
        assert gateway.gateway.admission.open_count == 0
    assert await house.charges() == [("settle", CREDIT)]
    assert (await ledger_meta(house))["outcome"] == "client_left"


async def test_a_request_that_was_not_sent_whole_is_not_gone_on_with(house: House) -> None:
    async def waits_for_the_rest(visit: Visit) -> None:
        await visit.read_head()
        await visit.until_closed()

    house.settings["routes"] = ROUTES.format(drain="30s", bytes_max="1MiB")
    await house.credits(5)
    async with raw.upstream(waits_for_the_rest) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway:
            async with raw.connection(gateway.address) as (_, writer):
                whole = raw.request(house.secret, "/v1/chat/completions", body=b"x" * 1000)
                writer.write(whole[:-1])
                await until(lambda: upstream.visits and upstream.visits[0].head)
            await until(lambda: upstream.visits[0].closed_at)
            await house.settled()
            assert gateway.gateway.admission.open_count == 0
    assert (await ledger_meta(house))["outcome"] == "client_left"


async def test_a_client_leaving_before_there_is_a_connection_costs_nothing(house: House) -> None:
    async def never_shakes_hands(visit: Visit) -> None:
        await visit.until_closed()

    house.settings["routes"] = ROUTES.format(drain="30s", bytes_max="1MiB")
    await house.credits(5)
    async with raw.upstream(never_shakes_hands) as upstream:
        house.upstream_url = upstream.url.replace("http:", "https:")
        house.settings["connect"] = "60s"
        async with in_process(house) as gateway:
            async with raw.connection(gateway.address) as (_, writer):
                writer.write(raw.request(house.secret, "/v1/chat/completions", body=b"{}"))
                await until(lambda: upstream.visits)
                assert gateway.gateway.admission.open_count == 1
            await until(lambda: gateway.gateway.admission.open_count == 0)
            await house.settled()
    assert await house.charges() == []

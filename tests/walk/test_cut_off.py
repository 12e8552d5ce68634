"""Prices by the token: a stream ends where its credits do, and every token that was delivered is charged.

The upstream of these tests sends an event when it is told to, and the client takes it before the next one is sent. So a
read is one event, and what is delivered beyond the hold is at most one event: the bound that is promised, one read and
the error of counting, at its sharpest. Counted are four bytes to a token here, which is what the texts are made of.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.waiting import until
from tests.walk.house import CREDIT, House, Running, chat_body, in_process
from tests.walk.live import live
from tests.walk.raw import Upstream, Visit, upstream

#: A credit is a thousand tokens of output; an event has a hundred.
TOKEN, EVENT_TOKENS = 1_000, 100
PRICES = ", per_million_output_tokens: 1000"
EVENT = EVENT_TOKENS * TOKEN

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
DONE = b"data: [DONE]\n\n"


def event(tokens: int = EVENT_TOKENS) -> bytes:
    delta = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    choice = {"index": 0, "delta": {"content": "abcd" * tokens}, "finish_reason": None}
    return b"data: " + json.dumps(delta | {"choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def report(prompt: int, completion: int) -> bytes:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    said = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": usage}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def body_of(head: bytes) -> int:
    lines = head.lower().split(b"\r\n")
    return next((int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")), 0)


@dataclass
class Source:
    """The upstream: `send` is one read of the gateway's; None ends the answer."""

    served: Upstream
    queue: "asyncio.Queue[bytes | None]" = field(default_factory=asyncio.Queue)
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, *data: bytes | None) -> None:
        for one in data:
            self.queue.put_nowait(one)


@asynccontextmanager
async def source(house: House, head: bytes = HEAD, chunked: bool = True) -> AsyncIterator[Source]:
    """An upstream that streams what it is told to."""

    async def script(visit: Visit) -> None:
        found.heads.append(await visit.read_head())
        found.bodies.append(await visit.reader.readexactly(body_of(visit.head)))
        closing = asyncio.create_task(visit.until_closed())
        await visit.send(head + b"\r\n")
        while not closing.done():
            asking = asyncio.create_task(found.queue.get())
            await asyncio.wait((asking, closing), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                asking.cancel()
                break
            data = asking.result()
            if data is None:
                await visit.send(b"0\r\n\r\n" if chunked else b"")
                break
            await visit.send(chunk(data) if chunked else data)
        if closing.done():
            found.closed.set()
        closing.cancel()

    async with upstream(script) as served:
        found = Source(served)
        house.upstream_url = served.url
        yield found


def routes(dialect: str = "openai", more: str = "") -> str:
    at = "/v1/messages" if dialect == "anthropic" else "/v1/chat/completions"
    return f"\n  - {{ path: {at}, upstream: ai_router, dialect: {dialect}, usage: openai_chat{more} }}\n"


def priced(
    house: House, hold: str = "clamp", *, dialect: str = "openai", overrun: str = "debt", more: str = ""
) -> House:
    house.price, house.prices = 0, PRICES
    house.settings["credits"] = f", hold: {hold}, overrun: {overrun}"
    house.settings["routes"] = routes(dialect, more)
    return house


def openai_at(gateway: Running, house: House) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=house.secret, base_url=f"{gateway.address}/v1", max_retries=2)


@dataclass
class Listener:
    """A client of a stream, and what it got."""

    answer: httpx.Response
    pieces: AsyncIterator[bytes]
    got: bytes = b""

    async def hears(self, data: bytes) -> None:
        """`data`, and nothing else, has come."""
        while len(self.got) < len(data):
            self.got += await anext(self.pieces)
        assert self.got == data
        self.got = b""

    async def rest(self) -> bytes:
        async for piece in self.pieces:
            self.got += piece
        return self.got


@asynccontextmanager
async def listening(gateway: Running, house: House, **body: Any) -> AsyncIterator[Listener]:
    asked = chat_body(stream=True, **{"max_tokens": 4000, **body})
    at = "/v1/messages" if "/v1/messages" in house.settings["routes"] else "/v1/chat/completions"
    async with house.client(gateway.address) as client, client.stream("POST", at, json=asked) as answer:
        assert answer.status_code == 200, await answer.aread()
        yield Listener(answer, answer.aiter_raw())


async def hear(listener: Listener, found: Source, count: int) -> None:
    """So many events, one after the other."""
    for _ in range(count):
        found.send(event())
        await listener.hears(event())


async def outcomes(house: House) -> list[tuple[str, str, int]]:
    """(outcome, basis, micro-credits) of every charge."""
    await house.settled()
    rows = await house.postgres.rows(
        "SELECT meta, -amount AS charged FROM gateway.ledger WHERE kind = 'settle' ORDER BY seq"
    )
    found = [(json.loads(row["meta"]) if isinstance(row["meta"], str) else row["meta"], row["charged"]) for row in rows]
    return [(meta["outcome"], meta["basis"], charged) for meta, charged in found]


# The cut


async def test_the_openai_sdk_hears_that_the_credits_are_used_up(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, openai_at(gateway, house) as client:
        found.send(event())
        heard = 0
        with pytest.raises(openai.APIError) as caught:
            async for part in await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "go on"}], stream=True, max_tokens=4000
            ):
                heard += len(part.choices[0].delta.content or "") // 4
                found.send(event())
        assert caught.value.code == "insufficient_credits"
        assert caught.value.type == "insufficient_quota"
        await asyncio.wait_for(found.closed.wait(), 5)
        assert len(found.bodies) == 1  # nobody tried again
        # 1000 tokens are paid for, and one read more was delivered.
        assert heard == 1000 + EVENT_TOKENS
        assert await outcomes(house) == [("out_of_credits", "under_estimate", heard * TOKEN)]
        assert await house.balance() == CREDIT - heard * TOKEN == -EVENT


async def test_the_anthropic_sdk_hears_that_the_credits_are_used_up(house: House) -> None:
    await priced(house, dialect="anthropic").credits(1)
    async with (
        source(house) as found,
        in_process(house) as gateway,
        AsyncAnthropic(api_key=house.secret, base_url=gateway.address) as client,
    ):
        found.send(*(event() for _ in range(11)))
        with pytest.raises(anthropic.APIStatusError) as caught:
            async for _ in await client.messages.create(
                model="m", messages=[{"role": "user", "content": "go on"}], stream=True, max_tokens=4000
            ):
                pass
        body = caught.value.body
        assert isinstance(body, dict)
        assert (body["type"], body["error"]["type"]) == ("error", "billing_error")
        assert body["error"]["details"]["error_code"] == "insufficient_credits"
        ((outcome, _, charged),) = await outcomes(house)
        assert outcome == "out_of_credits" and charged >= CREDIT


@pytest.mark.parametrize(
    ("dialect", "last"),
    [("openai", b'data: {"error":{"message":'), ("anthropic", b'event: error\ndata: {"type":"error","error":{')],
)
async def test_one_event_of_the_dialect_ends_the_stream(house: House, dialect: str, last: bytes) -> None:
    await priced(house, dialect=dialect).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event(1))
        rest = await listener.rest()
        # The answer's own status stood, and it ends in order.
        told = rest.removeprefix(event(1))
        assert told.startswith(last) and told.endswith(b"\n\n") and told.count(b"\n\n") == 1
        assert b"insufficient_credits" in told
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + TOKEN)]


async def test_a_dialect_without_a_word_for_it_cuts_the_connection(house: House) -> None:
    await priced(house, dialect="problem").credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event())
        with pytest.raises(httpx.RemoteProtocolError):
            await listener.rest()
        assert listener.got == event()
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + EVENT)]


async def test_what_was_delivered_beyond_the_hold_may_be_forgiven(house: House) -> None:
    await priced(house, overrun="absorb").credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        found.send(*(event() for _ in range(12)))
        await listener.rest()
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT)]
        assert await house.balance() == 0


@pytest.mark.parametrize("read_tokens", [1, 250, 5000])
async def test_the_over_run_is_one_read_and_no_more(house: House, read_tokens: int) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event(read_tokens))
        assert b"insufficient_credits" in await listener.rest()
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + read_tokens * TOKEN)]


# Where the cut falls


async def test_the_event_under_way_is_delivered_to_its_end(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        under_way = event(7)
        found.send(event() + under_way[:30])
        await listener.hears(event() + under_way[:30])
        found.send(under_way[30:] + event())
        told = (await listener.rest()).removeprefix(under_way[30:])
        assert told.startswith(b'data: {"error":') and told.count(b"data:") == 1
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + EVENT + 7 * TOKEN)]


async def test_an_event_that_never_ends_is_not_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.proxy.passage.EVENT_REST_S", 0.05)
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event() + b'data: {"cho')
        with pytest.raises(httpx.RemoteProtocolError):
            await listener.rest()
        assert [outcome for outcome, _, _ in await outcomes(house)] == ["out_of_credits"]


async def test_an_event_without_end_is_not_delivered_without_end(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event() + b"data: ", *([b"x" * 32_000] * 20))
        with pytest.raises(httpx.RemoteProtocolError):
            await listener.rest()
        assert len(listener.got) < 6 * 32_000


async def test_an_answer_that_ends_within_its_last_read_is_whole(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event() + report(9, 1100) + DONE, None)
        assert await listener.rest() == event() + report(9, 1100) + DONE
        assert await outcomes(house) == [("complete", "exact", CREDIT + EVENT)]


async def test_a_compressed_stream_is_cut_without_a_last_event(house: House) -> None:
    await priced(house).credits(1)
    head = HEAD + b"Content-Encoding: gzip\r\n"
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    sent = b""
    async with source(house, head) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        for number in range(11):
            packed = packer.compress(event()) + packer.flush(zlib.Z_SYNC_FLUSH)
            sent += packed
            found.send(packed)
            if number < 10:
                await listener.hears(packed)
        with pytest.raises(httpx.RemoteProtocolError):
            await listener.rest()
        assert sent.endswith(listener.got)
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + EVENT)]


# More credits on the way


async def test_a_top_up_by_another_hand_lets_a_stream_go_on(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 9)  # more was asked for by now, and there was none
        await house.postgres.row("UPDATE ai_credits SET credits = credits + 5 WHERE organization_id = 'acme'")

        async def arrived() -> bool:
            return (await house.account()).get("p", 0) == 6 * CREDIT

        await until(arrived, 5)
        await hear(listener, found, 30)
        found.send(report(9, 3900) + DONE, None)
        assert (await listener.rest()).endswith(DONE)
        assert await outcomes(house) == [("complete", "exact", 39 * EVENT)]
        assert await house.balance() == 6 * CREDIT - 39 * EVENT


async def test_a_stream_beyond_its_estimate_goes_on_as_long_as_there_are_credits(house: House) -> None:
    await priced(house).credits(1000)
    unnamed = {"max_tokens": None}
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house, **unnamed) as listener:
        await hear(listener, found, 30)  # 1024 tokens were reserved for a client that names no maximum
        found.send(DONE, None)
        await listener.rest()
        assert await outcomes(house) == [("complete", "estimated", 30 * EVENT)]


async def test_an_incremental_hold_begins_small_and_grows_ahead_of_need(house: House) -> None:
    await priced(house, "incremental").credits(1000)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        (hold,) = gateway.gateway.admission._open.values()
        assert hold.ucredits == 512 * TOKEN
        await hear(listener, found, 3)
        assert (hold.ucredits, hold.used_ucredits) == (512 * TOKEN, 3 * EVENT)
        await hear(listener, found, 1)  # 112 tokens are left
        await until(lambda: hold.ucredits == (512 + 1024) * TOKEN)
        await hear(listener, found, 9)
        assert hold.used_ucredits == 13 * EVENT
        found.send(report(9, 1300) + DONE, None)
        await listener.rest()
        assert await outcomes(house) == [("complete", "exact", 13 * EVENT)]


async def test_an_incremental_hold_takes_what_there_is_and_then_ends(house: House) -> None:
    await priced(house, "incremental").credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        await hear(listener, found, 10)
        found.send(event())
        assert b"insufficient_credits" in await listener.rest()
        assert await outcomes(house) == [("out_of_credits", "under_estimate", CREDIT + EVENT)]


async def test_what_was_admitted_in_full_is_never_cut(house: House) -> None:
    await priced(house, "full").credits(1)
    async with source(house) as found, in_process(house) as gateway:
        async with listening(gateway, house, max_tokens=900) as listener:
            await hear(listener, found, 15)  # the upstream does not keep to it
            found.send(report(9, 1500) + DONE, None)
            assert (await listener.rest()).endswith(DONE)
        assert await outcomes(house) == [("complete", "exact", 15 * EVENT)]
        async with house.client(gateway.address) as client:
            asked = chat_body(stream=True, max_tokens=900)
            assert (await client.post("/v1/chat/completions", json=asked)).status_code == 402


# Other ends


async def test_a_client_that_leaves_pays_for_what_it_got(house: House) -> None:
    await priced(house).credits(100)
    async with source(house) as found, in_process(house) as gateway:
        async with listening(gateway, house) as listener:
            await hear(listener, found, 3)
        await asyncio.wait_for(found.closed.wait(), 5)
        assert await outcomes(house) == [("client_left", "under_estimate", 3 * EVENT)]


async def test_a_plain_answer_cannot_be_cut(house: House) -> None:
    await priced(house).credits(1)
    usage = {"prompt_tokens": 9, "completion_tokens": 5000, "total_tokens": 5009}
    plain = json.dumps({"model": "m", "choices": [{"message": {"content": "abcd" * 5000}}], "usage": usage}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(plain)
    async with source(house, head, chunked=False) as found, in_process(house) as gateway:
        async with house.client(gateway.address) as client:
            found.send(plain, None)
            answer = await client.post("/v1/chat/completions", json=chat_body(max_tokens=5000))
            assert answer.content == plain
        assert await outcomes(house) == [("complete", "exact", 5 * CREDIT)]
        assert await house.balance() == -4 * CREDIT


async def test_an_answer_in_a_coding_that_nobody_can_undo_costs_its_estimate(house: House) -> None:
    await priced(house).credits(100)
    head = HEAD + b"Content-Encoding: br\r\n"
    async with source(house, head) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        found.send(b"\x0b\x02\x80hello\x03", None)
        await listener.rest()
        assert await outcomes(house) == [("complete", "estimated", 4000 * TOKEN)]


async def test_a_refusal_of_the_upstream_costs_nothing_whatever_it_claims(house: House) -> None:
    await priced(house).credits(100)
    claims = json.dumps({"error": {}, "usage": {"prompt_tokens": 9, "completion_tokens": 9}}).encode()
    head = b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(claims)
    async with source(house, head, chunked=False) as found, in_process(house) as gateway:
        async with house.client(gateway.address) as client:
            found.send(claims, None)
            assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 400
        await house.settled()
        assert await house.balance() == 100 * CREDIT


async def test_a_websocket_costs_its_flat_price_whatever_tokens_cost(house: House) -> None:
    house.price, house.prices = 2, PRICES
    await house.credits(3)
    house.settings["routes"] = (
        "\n  - { path: /live, upstream: ai_router, usage: openai_chat, websocket: {} }"
        "\n  - { path: /v1/chat/completions, upstream: ai_router, usage: openai_chat }\n"
    )
    async with live(house) as opened:
        async with opened.connect() as websocket:
            await websocket.send("x" * 40_000)
            assert await websocket.recv() == "x" * 40_000
        await house.settled()
        assert await house.charges() == [("settle", 2 * CREDIT)]


# The maximum that the hold pays for


INJECT = ", enforce_max_tokens: inject"


@pytest.mark.parametrize(
    ("sent", "forwarded", "named"),
    [
        (b'{"model":"m","messages":[]}', b'{"max_completion_tokens":1000,"model":"m","messages":[]}', b"1000"),
        (b'{ "max_tokens" : 5000, "n": 2 }', b'{ "max_tokens" : 500, "n": 2 }', b"500"),
        (b'{"max_tokens":1000}', b'{"max_tokens":1000}', None),
        (b'{"max_tokens":10,"temperature":0.1}', b'{"max_tokens":10,"temperature":0.1}', None),
    ],
)
async def test_a_request_is_held_to_what_its_hold_pays_for(
    house: House, sent: bytes, forwarded: bytes, named: bytes | None
) -> None:
    await priced(house, more=INJECT).credits(1)
    plain = b'{"usage":{"prompt_tokens":1,"completion_tokens":10}}'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(plain)
    async with source(house, head, chunked=False) as found, in_process(house) as gateway:
        async with house.client(gateway.address) as client:
            found.send(plain, None)
            fields = {"content-type": "application/json", "content-digest": "sha-256=:x:"}
            answer = await client.post("/v1/chat/completions", content=sent, headers=fields)
        assert answer.status_code == 200
        assert found.bodies == [forwarded]
        assert answer.headers.get("x-gateway-max-tokens") == (None if named is None else named.decode())
        assert (b"content-digest" in found.heads[0].lower()) is (named is None)


async def test_a_body_in_chunks_is_held_to_it_too(house: House) -> None:
    await priced(house, more=INJECT).credits(1)
    house.settings["routes"] = routes("openai", INJECT)

    async def script(visit: Visit) -> None:
        head = await visit.read_head()
        assert b"content-length" not in head.lower()
        got.append(await visit.reader.readuntil(b"\r\n0\r\n\r\n"))
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        await visit.until_closed()

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model":'
        yield b'"m"}'

    got: list[bytes] = []
    async with upstream(script) as served:
        house.upstream_url = served.url
        async with in_process(house) as gateway, house.client(gateway.address) as client:
            assert (await client.post("/v1/chat/completions", content=body())).status_code == 200
    assert b'{"max_completion_tokens":1000,"model":"m"}' in got[0]


async def test_without_being_told_no_body_is_changed(house: House) -> None:
    await priced(house).credits(1)
    async with source(house) as found, in_process(house) as gateway, listening(gateway, house) as listener:
        assert b'"max_tokens":4000' in found.bodies[0]
        assert "x-gateway-max-tokens" not in listener.answer.headers
        found.send(DONE, None)
        await listener.rest()


# Models without a price


async def test_a_model_without_a_price_is_refused_for_good(house: House) -> None:
    house.price = 0
    house.prices = ", models: [{ model: 'gpt-4*', per_request: 1 }], unknown_model: deny"
    await house.credits(5)
    async with source(house) as found, in_process(house) as gateway, openai_at(gateway, house) as client:
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.chat.completions.create(model="o1", messages=[{"role": "user", "content": "hi"}])
        assert (caught.value.code, caught.value.param) == ("unknown_model_price", "model")
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert "retry-after" not in caught.value.response.headers
        assert found.bodies == []
        assert await house.at_rest()
        assert await house.balance() == 5 * CREDIT

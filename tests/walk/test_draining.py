"""The gateway's own end: what still runs when the time to drain is over is told so in its dialect, and settled."""

import asyncio
import json
import signal

import openai
import pytest

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, Process, chat_body
from tests.walk.raw import Visit

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def whole_events(visit: Visit) -> None:
    await visit.read_head()
    await visit.send(HEAD + chunk(EVENT))
    await visit.until_closed()


async def half_an_event(visit: Visit) -> None:
    await visit.read_head()
    await visit.send(HEAD + chunk(EVENT) + chunk(EVENT[:20]))
    await visit.until_closed()


async def of_known_length(visit: Visit) -> None:
    await visit.read_head()
    await visit.send(HEAD.replace(b"Transfer-Encoding: chunked", b"Content-Length: 1000") + EVENT)
    await visit.until_closed()


async def silent(visit: Visit) -> None:
    await visit.read_head()
    await visit.until_closed()


async def told_to_end(process: Process, signals: int) -> None:
    """One SIGTERM and the drain that follows it, or two at once."""
    assert process.process is not None
    process.process.send_signal(signal.SIGTERM)
    if signals == 2:
        await until(process.drains)  # two at once would be one
        process.process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.process.wait(), 20) == 0


@pytest.mark.parametrize(("signals", "drain_timeout"), [(1, "200ms"), (2, "1h")], ids=["drain over", "second signal"])
async def test_an_event_stream_ends_with_an_error_event(house: House, signals: int, drain_timeout: str) -> None:
    house.settings["drain_timeout"] = drain_timeout
    await house.credits(5)
    async with raw.upstream(whole_events) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as process:
            client = openai.AsyncOpenAI(base_url=f"{process.address}/v1", api_key=house.secret, max_retries=0)
            messages = chat_body()["messages"]
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)  # type: ignore[call-overload]  # as JSON
            assert (await anext(stream)).id == "1"
            with pytest.raises(openai.APIError, match="shutting down") as caught:
                ending = asyncio.create_task(told_to_end(process, signals))
                await anext(stream)
            assert caught.value.code == "shutting_down"
            await ending
            await client.close()
            line = next(line for line in process.output if line.get("outcome") == "cut")
            assert (line["status"], line["decision"]) == (200, "shutting_down")
        assert await house.at_rest()
    assert await house.charges() == [("settle", CREDIT)]


@pytest.mark.parametrize("script", [half_an_event, of_known_length])
async def test_a_stream_that_has_no_place_for_an_event_is_cut(house: House, script: raw.Script) -> None:
    house.settings["drain_timeout"] = "200ms"
    await house.credits(5)
    async with raw.upstream(script) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as process, raw.connection(process.address) as (reader, writer):
            body = json.dumps(chat_body(stream=True)).encode()
            writer.write(raw.request(house.secret, "/v1/chat/completions", body=body))
            got = await reader.readuntil(EVENT)
            await told_to_end(process, 1)
            got += await reader.read()
            assert b"shutting_down" not in got
            assert not got.endswith(b"0\r\n\r\n")
        assert await house.at_rest()
    assert await house.charges() == [("settle", CREDIT)]


async def test_a_request_without_an_answer_yet_is_told_to_try_again_and_costs_nothing(house: House) -> None:
    house.settings["drain_timeout"] = "200ms"
    await house.credits(5)
    async with raw.upstream(silent) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as process, raw.connection(process.address) as (reader, writer):
            writer.write(raw.request(house.secret, "/v1/chat/completions", body=json.dumps(chat_body()).encode()))
            await until(lambda: upstream.visits and upstream.visits[0].head)
            await told_to_end(process, 1)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"x-should-retry: true" in answer and b'"code":"shutting_down"' in answer
        assert await house.at_rest()
    assert await house.charges() == []


async def test_a_second_signal_while_nothing_is_open_ends_at_once(house: House) -> None:
    house.settings.update(grace="10m", drain_timeout="1h")
    async with Process(house) as process:
        await told_to_end(process, 2)

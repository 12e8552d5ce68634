"""The demo AI router, judged by the SDKs that will talk to it through the gateway."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from gateway.embedded import EmbeddedDemoRouter, EmbeddedError
from gateway.embedded.demo_exchange import Journal, Pace
from gateway.embedded.demo_router import DemoRouter, serving

QUESTION = "How many words are these?"
ANSWER = f'You said: "{QUESTION}" That is 5 words.'


@pytest.fixture
def chat(demo_router_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="sk-demo", base_url=f"{demo_router_url}/v1", max_retries=0)


@pytest.fixture
def claude(demo_router_url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key="sk-demo", base_url=demo_router_url, max_retries=0)


async def test_openai_sdk_reads_a_completion(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        answer = await chat.chat.completions.create(
            model="demo-small",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        )
        again = await chat.chat.completions.create(
            model="demo-small",
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    # 2 + 5 words asked, 11 words answered; four tokens for three words, rounded up.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 15)
    assert answer.usage.total_tokens == 25
    assert answer.id == again.id


async def test_openai_sdk_reads_a_stream_and_its_usage(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        stream = await chat.chat.completions.create(
            model="demo-small",
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 15
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_stream_without_the_option_has_no_usage(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        stream = await chat.chat.completions.create(
            model="demo-small", messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_a_maximum_of_tokens_cuts_the_answer(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        for maximum, words in ((4, 3), (1, 1), (7, 5)):
            answer = await chat.chat.completions.create(
                model="demo-small", messages=[{"role": "user", "content": QUESTION}], max_completion_tokens=maximum
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.choices[0].message.content == " ".join(ANSWER.split()[:words])
            assert answer.usage is not None and answer.usage.completion_tokens <= maximum


async def test_several_choices_are_all_written_and_all_counted(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        answer = await chat.chat.completions.create(
            model="demo-small", messages=[{"role": "user", "content": QUESTION}], n=3
        )
        stream = await chat.chat.completions.create(
            model="demo-small", messages=[{"role": "user", "content": QUESTION}], n=3, stream=True
        )
        texts = ["", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [choice.message.content for choice in answer.choices] == texts == [ANSWER] * 3
    assert answer.usage is not None and answer.usage.completion_tokens == 45


async def test_openai_sdk_reads_models_and_errors(chat: openai.AsyncOpenAI) -> None:
    async with chat:
        assert [model.id async for model in chat.models.list()] == ["demo-small", "demo-large"]
        with pytest.raises(openai.BadRequestError, match="at `\\$.messages`"):
            await chat.chat.completions.create(model="demo-small", messages=[])
        with pytest.raises(openai.RateLimitError) as caught:
            await chat.chat.completions.create(
                model="demo-small",
                messages=[{"role": "user", "content": QUESTION}],
                extra_headers={"x-demo-status": "429", "x-request-id": "req-7"},
            )
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.request_id == "req-7"


async def test_anthropic_sdk_reads_a_message(claude: anthropic.AsyncAnthropic) -> None:
    async with claude:
        answer = await claude.messages.create(
            model="demo-small", max_tokens=100, system="Be brief.", messages=[{"role": "user", "content": QUESTION}]
        )
        short = await claude.messages.create(
            model="demo-small", max_tokens=4, messages=[{"role": "user", "content": QUESTION}]
        )
    assert [block.text for block in answer.content if block.type == "text"] == [ANSWER]
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 15)
    assert (answer.stop_reason, short.stop_reason) == ("end_turn", "max_tokens")
    assert short.usage.output_tokens == 4


async def test_anthropic_sdk_reads_a_stream(claude: anthropic.AsyncAnthropic) -> None:
    async with (
        claude,
        claude.messages.stream(
            model="demo-small",
            max_tokens=100,
            messages=[{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        ) as stream,
    ):
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == ANSWER
    assert (final.usage.input_tokens, final.usage.output_tokens, final.stop_reason) == (7, 15, "end_turn")


async def test_anthropic_sdk_reads_errors(claude: anthropic.AsyncAnthropic) -> None:
    async with claude:
        with pytest.raises(anthropic.BadRequestError):
            await claude.messages.create(model="demo-small", max_tokens=9, messages=[])
        with pytest.raises(anthropic.APIStatusError) as caught:
            await claude.messages.create(
                model="demo-small",
                max_tokens=9,
                messages=[{"role": "user", "content": QUESTION}],
                extra_headers={"x-demo-status": "529"},
            )
    assert caught.value.status_code == 529
    assert isinstance(caught.value.body, dict) and caught.value.body["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "expected"),
    [
        ("GET", '/trpc/demo.hello?input={"name":"Ada"}', None, 200, {"result": {"data": {"greeting": "Hello Ada"}}}),
        ("GET", "/trpc/demo.hello", None, 200, {"result": {"data": {"greeting": "Hello world"}}}),
        ("POST", "/trpc/demo.add", {"a": 2, "b": 3}, 200, {"result": {"data": {"sum": 5}}}),
        ("GET", "/trpc/nothing", None, 404, ("NOT_FOUND", -32004)),
        ("GET", "/trpc/demo.add", None, 405, ("METHOD_NOT_SUPPORTED", -32005)),
        ("POST", "/trpc/demo.add", {"a": "x"}, 400, ("BAD_REQUEST", -32600)),
    ],
)
async def test_trpc_procedures_answer_in_its_shape(
    demo_router_url: str, method: str, path: str, body: Any, status: int, expected: Any
) -> None:
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        answer = await client.request(method, path, json=body)
    assert answer.status_code == status
    if isinstance(expected, dict):
        assert answer.json() == expected
    else:
        error = answer.json()["error"]
        assert (error["data"]["code"], error["code"], error["data"]["httpStatus"]) == (*expected, status)


async def test_a_trpc_batch_has_an_answer_for_every_call(demo_router_url: str) -> None:
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        mixed = await client.get('/trpc/demo.hello,nothing?batch=1&input={"0":{"name":"Ada"}}')
        added = await client.post(
            "/trpc/demo.add,demo.add?batch=1", json={"0": {"a": 1, "b": 2}, "1": {"a": 3, "b": 4}}
        )
    assert mixed.status_code == 207
    assert mixed.json()[0] == {"result": {"data": {"greeting": "Hello Ada"}}}
    assert mixed.json()[1]["error"]["data"]["httpStatus"] == 404
    assert added.json() == [{"result": {"data": {"sum": 3}}}, {"result": {"data": {"sum": 7}}}]


async def test_echo_tells_what_arrived(demo_router_url: str) -> None:
    body = b"x" * 300_000
    headers = [("x-twice", "1"), ("x-twice", "2")]
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        answer = await client.request("PROPFIND", "/echo?a=%2F&a=b", content=body, headers=headers)
    told = answer.json()
    assert (told["method"], told["path"], told["query"]) == ("PROPFIND", "/echo", "a=%2F&a=b")
    assert [value for name, value in told["headers"] if name == "x-twice"] == ["1", "2"]
    assert (told["body_bytes"], told["body_sha256"]) == (300_000, hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", b"{", 400, "could not parse the JSON body"),
        ("/v1/chat/completions", b'{"model": "m", "messages": [{"role": "user", "content": 7}]}', 400, "messages"),
        ("/v1/chat/completions", b"\xff", 400, "could not parse"),
        ("/nowhere", b"", 404, "Unknown request URL: POST /nowhere"),
    ],
)
async def test_what_cannot_be_answered_is_refused_in_openai_shape(
    demo_router_url: str, path: str, body: bytes, status: int, message: str
) -> None:
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        answer = await client.post(path, content=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


async def test_a_delay_that_is_no_number_or_too_long_is_refused(demo_router_url: str) -> None:
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        for value in ("soon", "-1", "300001", "٣"):
            answer = await client.get("/v1/models", headers={b"x-demo-first-byte-delay-ms": value.encode()})
            assert answer.status_code == 400
            assert "from 0 to 300000" in answer.json()["error"]["message"]


async def test_a_request_sets_its_own_pace(demo_router_url: str) -> None:
    loop = asyncio.get_running_loop()
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    headers = {"x-demo-first-byte-delay-ms": "60", "x-demo-chunk-delay-ms": "15", "x-demo-reply-words": "4"}
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        begun = loop.time()
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            first_s = loop.time() - begun
            events = [line async for line in answer.aiter_lines() if line]
            total_s = loop.time() - begun
    assert first_s >= 0.06
    # Role, four words, finish reason, [DONE]: six pauses between seven events.
    assert len(events) == 7
    assert total_s - first_s >= 0.9 * 6 * 0.015


async def test_a_broken_stream_ends_without_its_end(demo_router_url: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    events: list[str] = []
    async with httpx.AsyncClient(base_url=demo_router_url) as client:
        headers = {"x-demo-break-after-chunks": "3"}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            with pytest.raises(httpx.RemoteProtocolError):
                async for line in answer.aiter_lines():
                    events.append(line)
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/chat/completions", json=body | {"stream": False}, headers=headers)
    assert len([line for line in events if line]) == 3


async def test_the_journal_knows_how_each_request_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with serving(DemoRouter(Pace(chunk_delay_ms=2), journal)) as url, httpx.AsyncClient(base_url=url) as client:
        await client.post("/v1/chat/completions", json=body, headers={"x-request-id": "whole"})
        broken = {"x-request-id": "broken", "x-demo-break-after-chunks": "2"}
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/v1/chat/completions", json=body, headers=broken)
        left = {"x-request-id": "left", "x-demo-chunk-delay-ms": "300000"}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=left) as answer:
            await anext(answer.aiter_lines())
        slow = {"x-request-id": "slow", "x-demo-first-byte-delay-ms": "300000"}
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/v1/models", headers=slow, timeout=httpx.Timeout(5, read=0.05))
        await _ends(path, 4)
    journal.close()
    ends = {line["request_id"]: line for line in await _ends(path, 4)}
    assert {name: line["event"] for name, line in ends.items()} == {
        "whole": "finished",
        "broken": "broke",
        "left": "client_gone",
        "slow": "client_gone",
    }
    # Role, seven words, finish reason, [DONE].
    assert (ends["whole"]["chunks"], ends["whole"]["words"], ends["whole"]["status"]) == (10, 7, 200)
    assert (ends["broken"]["chunks"], ends["broken"]["words"]) == (2, 1)
    assert (ends["left"]["chunks"], ends["left"]["status"]) == (1, 200)
    assert (ends["slow"]["chunks"], ends["slow"]["status"]) == (0, 0)


async def _ends(path: Path, count: int) -> list[dict[str, Any]]:
    """The journal's lines about how requests ended, once there are `count` of them."""
    async with asyncio.timeout(10):
        while True:
            ends = [line for line in _lines(path) if line["event"] != "started"]
            if len(ends) >= count:
                return ends
            await asyncio.sleep(0.005)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_flags_reach_the_process_and_wrong_ones_show_in_the_error(empty_state_dir: Path) -> None:
    journal = empty_state_dir / "journal"
    flags = ("--first-byte-delay", "30ms", "--journal", str(journal))
    async with EmbeddedDemoRouter(empty_state_dir, flags=flags) as url, httpx.AsyncClient(base_url=url) as client:
        begun = asyncio.get_running_loop().time()
        assert (await client.get("/v1/models")).status_code == 200
        assert asyncio.get_running_loop().time() - begun >= 0.03
    assert [line["event"] for line in await _ends(journal, 1)] == ["finished"]
    with pytest.raises(EmbeddedError, match="(?s)did not start.*'50' is not a duration"):
        await EmbeddedDemoRouter(empty_state_dir, flags=("--chunk-delay", "50")).start()

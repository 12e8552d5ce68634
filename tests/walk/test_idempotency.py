"""Routes with `idempotency: true`: what its client sends again runs once and is charged once, whatever was lost."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from gateway import keys
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, Process, chat_body, in_process
from tests.walk.raw import Relay, Visit

ROUTES = """
  - path: /v1/chat/completions
    method: POST
    upstream: ai_router
    dialect: openai
    usage: openai_chat
    idempotency: {idempotency}
    on_disconnect: {on_disconnect}
  - {{ path: /*, upstream: ai_router, idempotency: true }}
"""
PATH = "/v1/chat/completions"
COMPLETION = b"""\
{"id":"c","object":"chat.completion","created":1,"model":"demo-small","choices":[{"index":0,"finish_reason":"stop",\
"message":{"role":"assistant","content":"Hi."}}],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}"""
#: More than any test needs.
RETRIES = 4


class Router:
    """An upstream that answers when it may, each request with the next of `statuses`, the last one for ever."""

    def __init__(self, *statuses: int, may_answer: bool = True) -> None:
        self.statuses = list(statuses) or [200]
        self.heads: list[bytes] = []
        self.may_answer = asyncio.Event()
        if may_answer:
            self.may_answer.set()

    async def __call__(self, visit: Visit) -> None:
        head = await visit.read_head()
        self.heads.append(head.lower())
        await self.may_answer.wait()
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        await visit.send(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b"
            % (status, len(COMPLETION), COMPLETION)
        )
        await visit.until_closed()

    @property
    def was_asked(self) -> bool:
        return bool(self.heads)


@dataclass
class Attempts:
    """What left the SDK, by its own count, and the code of what came back: `ok`, or empty for nothing."""

    counts: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def client(self) -> httpx2.AsyncClient:
        async def leaving(request: httpx2.Request) -> None:
            self.counts.append(request.headers["x-stainless-retry-count"])
            self.codes.append("")

        async def arrived(response: httpx2.Response) -> None:
            document = json.loads(await response.aread())
            self.codes[-1] = document["error"]["code"] if "error" in document else "ok"

        return httpx2.AsyncClient(event_hooks={"request": [leaving], "response": [arrived]}, timeout=30)


@dataclass
class Line:
    """The SDK, on a line to the gateway that the test cuts."""

    line: Relay
    sdk: AsyncOpenAI
    attempts: Attempts

    def ask(self, key: str | None = "k1", words: str = "hello") -> "asyncio.Task[Any]":
        headers = {} if key is None else {"Idempotency-Key": key}
        return asyncio.create_task(
            self.sdk.chat.completions.create(
                model="demo-small", messages=[{"role": "user", "content": words}], extra_headers=headers
            )
        )

    async def cut(self) -> None:
        """Every connection is cut; new ones are taken."""
        await self.line.close()
        self.line.thaw()
        await self.line.open()


@asynccontextmanager
async def line(house: House, address: str) -> AsyncIterator[Line]:
    attempts = Attempts()
    async with raw.relay(address) as relay:
        sdk = AsyncOpenAI(
            api_key=house.secret, base_url=f"{relay.url}/v1", max_retries=RETRIES, http_client=attempts.client()
        )
        async with sdk:
            yield Line(relay, sdk, attempts)


@asynccontextmanager
async def stage(
    house: House, router: Router, *, idempotency: str = "true", on_disconnect: str = "abort", credits: int = 5
) -> AsyncIterator[Line]:
    """The SDK, the line, a gateway and the router behind it."""
    house.settings["routes"] = ROUTES.format(idempotency=idempotency, on_disconnect=on_disconnect)
    await house.credits(credits)
    async with raw.upstream(router) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, line(house, gateway.address) as lined:
            yield lined


async def charged_for_it(house: House, credits: int) -> None:
    await house.settled()
    assert sum(ucredits for _, ucredits in await house.charges()) == credits * CREDIT
    assert await house.balance() == 5 * CREDIT - credits * CREDIT


async def ended(house: House, count: int) -> None:
    """So many requests have ended, as far as the ledger of keys is concerned."""

    async def have() -> bool:
        rows = await house.postgres.rows("SELECT FROM gateway.idempotency WHERE outcome IS NOT NULL")
        return len(rows) == count

    await until(have)


def first_of(error: openai.APIStatusError) -> dict[str, Any]:
    assert isinstance(error.body, dict)
    first = dict(error.body["first"])
    assert first.pop("request_id") and first.pop("at")
    return first


async def lose_the_answer(house: House, router: Router, lined: Line) -> None:
    """The request is answered in full, and nothing of the answer arrives."""
    await until(lambda: router.was_asked)
    lined.line.freeze()
    router.may_answer.set()

    async def answered() -> bool:
        return len(await house.charges()) == 1

    await until(answered)
    await lined.cut()


async def test_an_sdk_that_tries_again_after_a_lost_answer_is_charged_once(house: House) -> None:
    router = Router(may_answer=False)
    async with stage(house, router) as lined:
        asking = lined.ask()
        await lose_the_answer(house, router, lined)
        with pytest.raises(openai.ConflictError) as caught:
            await asking
        assert lined.attempts.counts == ["0", "1"]
        assert lined.attempts.codes == ["", "request_finished"]
        assert first_of(caught.value) == {"status": 200, "outcome": "complete", "charged_credits": 1}
        assert len(router.heads) == 1 and b"x-stainless-retry-count: 0" in router.heads[0]
        await charged_for_it(house, 1)


@pytest.mark.parametrize(("idempotency", "key"), [("false", "k1"), ("true", None)], ids=["not asked for", "no key"])
async def test_without_a_key_that_counts_both_are_run_and_charged(
    house: House, idempotency: str, key: str | None
) -> None:
    router = Router(may_answer=False)
    async with stage(house, router, idempotency=idempotency) as lined:
        asking = lined.ask(key)
        await lose_the_answer(house, router, lined)
        assert (await asking).choices[0].message.content == "Hi."
        assert len(router.heads) == 2
        await charged_for_it(house, 2)


async def test_an_sdk_that_was_cut_off_before_the_answer_is_charged_once(house: House) -> None:
    """The router had the request, and may have worked: a flat price is owed."""
    router = Router(may_answer=False)
    async with stage(house, router) as lined:
        asking = lined.ask()
        await until(lambda: router.was_asked)
        await lined.cut()
        with pytest.raises(openai.ConflictError) as caught:
            await asking
        assert lined.attempts.codes[-1] == "request_finished"
        assert first_of(caught.value)["outcome"] == "client_left"
        assert len(router.heads) == 1
        await charged_for_it(house, 1)


async def test_an_sdk_comes_back_until_what_still_runs_has_ended(house: House) -> None:
    """With `on_disconnect: drain` the answer is read to its end without its client."""
    router = Router(may_answer=False)
    async with stage(house, router, on_disconnect="drain") as lined:
        asking = lined.ask()
        await until(lambda: router.was_asked)
        await lined.cut()
        await until(lambda: "request_in_progress" in lined.attempts.codes)
        router.may_answer.set()
        with pytest.raises(openai.ConflictError) as caught:
            await asking
        assert set(lined.attempts.codes[1:-1]) == {"request_in_progress"}
        assert lined.attempts.codes[-1] == "request_finished"
        assert first_of(caught.value) == {"status": 200, "outcome": "complete", "charged_credits": 1}
        assert len(router.heads) == 1
        await charged_for_it(house, 1)


async def test_an_error_of_the_upstream_is_tried_again_under_the_same_key(house: House) -> None:
    router = Router(500, 503, 200)
    async with stage(house, router) as lined:
        assert (await lined.ask()).choices[0].message.content == "Hi."
        assert lined.attempts.counts == ["0", "1", "2"]
        assert len(router.heads) == 3
        await charged_for_it(house, 1)


async def test_what_was_refused_for_want_of_credits_runs_once_there_are_some(house: House) -> None:
    router = Router()
    async with stage(house, router, credits=0) as lined:
        with pytest.raises(openai.APIStatusError) as caught:
            await lined.ask()
        assert caught.value.code == "insufficient_credits"
        await house.credits(5, "grant:second")

        async def is_there() -> bool:
            return (await house.account()).get("p") == 5 * CREDIT

        await until(is_there)
        assert (await lined.ask()).choices[0].message.content == "Hi."
        await charged_for_it(house, 1)


async def test_a_key_for_another_request_is_unprocessable_and_not_retried(house: House) -> None:
    router = Router()
    async with stage(house, router) as lined:
        await lined.ask()
        await ended(house, 1)
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            await lined.ask(words="something else")
        assert caught.value.code == "idempotency_key_reused"
        assert lined.attempts.codes == ["ok", "idempotency_key_reused"]
        await lined.ask("k2", "something else")
        await charged_for_it(house, 2)


async def test_bodies_of_any_framing_and_routes_without_a_format_count(house: House) -> None:
    async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async with stage(house, Router()) as lined, house.client(lined.line.url) as client:

        async def post(path: str, key: str, **content: Any) -> int:
            return (await client.post(path, headers={"idempotency-key": key}, **content)).status_code

        assert await post("/files", "a", content=in_pieces(b"one", b"two")) == 200
        await ended(house, 1)
        assert await post("/files", "a", content=b"onetwo") == 409
        assert await post("/files", "a", content=in_pieces(b"one", b"three")) == 422
        assert await post("/files?n=2", "a", content=b"onetwo") == 422
        assert await post("/files", "b") == 200
        await ended(house, 2)
        assert await post("/files", "b") == 409
        assert await post(PATH, "two words", json=chat_body()) == 400
        await charged_for_it(house, 2)


async def test_of_many_at_once_through_two_gateways_one_runs(house: House) -> None:
    router = Router(may_answer=False)
    house.settings["routes"] = ROUTES.format(idempotency="true", on_disconnect="abort")
    await house.credits(5)
    async with AsyncExitStack() as stack:
        house.upstream_url = (await stack.enter_async_context(raw.upstream(router))).url
        gateways = [await stack.enter_async_context(in_process(house)) for _ in range(2)]
        clients = [await stack.enter_async_context(house.client(gateway.address)) for gateway in gateways]

        async def ask(client: httpx.AsyncClient) -> str:
            answer = await client.post(PATH, json=chat_body(), headers={"idempotency-key": "k1"})
            told = "ok" if answer.status_code == 200 else str(answer.json()["error"]["code"])
            if told == "request_in_progress":
                router.may_answer.set()
            return told

        told = await asyncio.gather(*(ask(client) for client in clients * 10))
        assert told.count("ok") == 1
        assert set(told) <= {"ok", "request_in_progress", "request_finished"}
        assert len(router.heads) == 1
        await charged_for_it(house, 1)


async def test_what_ran_on_a_gateway_that_was_killed_is_charged_once_and_not_run_again(house: House) -> None:
    house.settings.update(
        lease="2s", heartbeat="500ms", routes=ROUTES.format(idempotency="true", on_disconnect="abort")
    )
    await house.credits(5)
    router = Router(may_answer=False)
    headers = {"idempotency-key": "k1"}
    async with raw.upstream(router) as upstream:
        house.upstream_url = upstream.url
        async with Process(house) as killed, house.client(killed.address) as client:

            async def ready() -> bool:
                return (await client.get("/-/ready")).status_code == 200

            await until(ready)
            asking = asyncio.create_task(client.post(PATH, json=chat_body(), headers=headers))
            await until(lambda: router.was_asked)
            [hold_id] = await house.redis.hkeys(keys.holds(house.org_id))
            await killed.end(signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await asking
        async with in_process(house) as successor, house.client(successor.address) as client:
            codes = set()

            async def finished() -> bool:
                answer = await client.post(PATH, json=chat_body(), headers=headers)
                error = answer.json()["error"]
                codes.add((answer.status_code, error["code"]))
                if error["code"] != "request_finished":
                    return False
                assert error["first"]["request_id"].encode() == hold_id
                assert (error["first"]["outcome"], error["first"]["charged_credits"]) == ("gateway_died", 1)
                return True

            await until(finished, 20)
            assert codes <= {(409, "request_in_progress"), (409, "request_finished")}
            await charged_for_it(house, 1)
        assert await house.charges() == [("orphan", CREDIT)]
        assert len(router.heads) == 1


async def test_without_postgres_only_what_has_no_key_runs(house: House) -> None:
    async with raw.relay(house.database_url) as database:
        house.database_url = database.url
        async with stage(house, Router()) as lined, house.client(lined.line.url) as client:
            assert (await client.post(PATH, json=chat_body())).status_code == 200
            await database.close()
            refused = await client.post(PATH, json=chat_body(), headers={"idempotency-key": "k1"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            assert refused.headers["x-should-retry"] == "true"
            assert (await client.post(PATH, json=chat_body())).status_code == 200
            await database.open()

            async def runs() -> bool:
                answer = await client.post(PATH, json=chat_body(), headers={"idempotency-key": "k1"})
                return answer.status_code == 200

            await until(runs)
            await charged_for_it(house, 3)

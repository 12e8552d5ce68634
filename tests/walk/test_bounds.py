"""Input that is too large, too slow or plainly wrong, and upstreams that are not there: a clear answer, at no cost."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway.downstream import HEAD_BYTES_MAX
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, chat_body, in_process
from tests.walk.raw import Visit

BODY_BYTES_MAX = 64 * 1024
ROUTES = """
  - path: /v1/chat/completions
    method: POST
    upstream: ai_router
    dialect: openai
    usage: openai_chat
    body_bytes_max: 64KiB
  - { path: /echo, method: [GET, POST], upstream: ai_router, body_bytes_max: 64KiB }
"""
TOKENS = [{"name": "tpm", "count": "tokens", "limit": 1000, "window": "1h", "per": "org"}]
CHAT, ECHO = "/v1/chat/completions", "/echo"
BOTH_DIALECTS = pytest.mark.parametrize("path", [CHAT, ECHO], ids=["openai", "problem"])


@pytest.fixture
async def house(house: House) -> House:
    """With nothing but two routes, and credits that a refusal must leave alone."""
    house.settings["routes"] = ROUTES
    await house.credits(5)
    return house


def refused(answer: httpx.Response, status: int, code: str, path: str) -> dict[str, Any]:
    """The members of a refusal of our own, in the dialect of `path`, with the request's id; checked against both."""
    assert answer.status_code == status, answer.text
    request_id = answer.headers["x-request-id"]
    document: dict[str, Any] = answer.json()
    if path == CHAT:
        assert answer.headers["content-type"] == "application/json"
        assert list(document) == ["error"]
        document = document["error"]
        assert {"message", "type", "param"} <= document.keys()
        assert document["request_id"] == request_id
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert (document["type"], document["status"]) == ("about:blank", status)
        assert document["instance"].startswith("urn:")
    assert document["code"] == code
    return document


async def nothing_was_charged(house: House) -> None:
    await house.settled()
    assert await house.charges() == []


async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


# -- bodies ----------------------------------------------------------------------------------------------------------


async def listen_only(visit: Visit) -> None:
    """Collects everything that arrives, in `visit.head`, and never answers."""
    while data := await visit.reader.read(65536):
        visit.head += data


@BOTH_DIALECTS
@pytest.mark.parametrize("counts_tokens", [False, True], ids=["passing through", "read first"])
async def test_a_body_over_the_bound_is_413_and_never_forwarded_whole(
    house: House, path: str, counts_tokens: bool
) -> None:
    house.limits = TOKENS if counts_tokens else []
    async with raw.upstream(listen_only) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, house.client(gateway.address) as client:
            announced = await client.post(path, content=b"x" * (BODY_BYTES_MAX + 1))
            refused(announced, 413, "body_too_large", path)
            assert upstream.visits == []
            unannounced = await client.post(path, content=in_pieces(*[b"x" * 1024] * 65))
            assert str(BODY_BYTES_MAX) in str(refused(unannounced, 413, "body_too_large", path))
            if counts_tokens and path == CHAT:
                assert upstream.visits == []
            # A part may have gone ahead; the end that would make it a request has not.
            assert not any(visit.head.endswith(b"\r\n0\r\n\r\n") for visit in upstream.visits)
            await nothing_was_charged(house)


async def test_a_body_of_exactly_the_bound_passes(house: House) -> None:
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        announced = await client.post(ECHO, content=b"x" * BODY_BYTES_MAX)
        unannounced = await client.post(ECHO, content=in_pieces(*[b"x" * 1024] * 64))
    assert announced.json()["body_bytes"] == unannounced.json()["body_bytes"] == BODY_BYTES_MAX


async def test_a_body_that_cannot_be_read_is_400_only_where_a_limit_must_know_it(house: House) -> None:
    house.limits = TOKENS
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        for body, trouble in (
            (b'{"model": ', "JSON"),
            (b"", "JSON"),
            (b"[1]", "object"),
            (b'{"model":"m","messages":[],"max_tokens":"many"}', "max_tokens"),
            (b'{"model":"m","messages":[],"n":-1}', "`n`"),
        ):
            error = refused(await client.post(CHAT, content=body), 400, "bad_request", CHAT)
            assert trouble in error["message"]
            # The same body on a route that nobody reads is the upstream's business.
            assert (await client.post(ECHO, content=body)).json()["body_bytes"] == len(body)


async def test_without_a_token_limit_the_upstream_judges_a_malformed_body(house: House) -> None:
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.post(CHAT, content=b'{"model": ')
        assert answer.status_code == 400
        direct = await client.post(house.upstream_url + CHAT, content=b'{"model": ')
        assert answer.content == direct.content
        await nothing_was_charged(house)


async def test_a_request_that_can_never_fit_is_told_so_at_once(house: House) -> None:
    house.limits = TOKENS
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.post(CHAT, json=chat_body(max_tokens=1000))
        error = refused(answer, 400, "request_exceeds_limit", CHAT)
        assert (error["limit"], error["allowed"]) == ("tpm", 1000) and error["requested"] > 1000
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        assert (await client.post(CHAT, json=chat_body(max_tokens=100))).status_code == 200


@BOTH_DIALECTS
@pytest.mark.parametrize("counts_tokens", [False, True], ids=["passing through", "read first"])
async def test_a_client_that_stops_sending_its_body_gets_408(house: House, path: str, counts_tokens: bool) -> None:
    house.limits = TOKENS if counts_tokens else []
    house.settings["client_idle"] = "150ms"
    async with raw.upstream(listen_only) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(raw.request(house.secret, path, body=b"x" * 100)[:-60])
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b'"request_timeout"' in await reader.readuntil(b"}")
            assert not any(visit.head.endswith(b"x" * 100) for visit in upstream.visits)
            await nothing_was_charged(house)


async def test_a_client_that_does_not_finish_its_head_is_let_go(house: House) -> None:
    house.settings["client_idle"] = "150ms"
    async with in_process(house) as gateway:
        whole = raw.request(house.secret, ECHO, body=b"x")
        for begun in (b"", b"POST", whole[:-10]):
            async with raw.connection(gateway.address) as (reader, writer):
                writer.write(begun)
                assert await asyncio.wait_for(reader.read(), 5) == b""
        # On a connection that has served already, too; and there only once something was begun.
        async with raw.connection(gateway.address) as (reader, writer):
            writer.write(whole)
            await reader.readuntil(b'"body_bytes":1')
            await asyncio.sleep(0.3)
            writer.write(whole)
            await reader.readuntil(b'"body_bytes":1')
            writer.write(whole[:20])
            await asyncio.wait_for(reader.read(), 5)


async def test_an_unfinished_head_behind_a_request_does_not_cut_its_answer(house: House) -> None:
    async def slow(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
        for piece in (b"one", b"two", b"end"):
            await asyncio.sleep(0.1)
            await visit.send(piece)
        await visit.until_closed()

    house.settings["client_idle"] = "150ms"
    async with raw.upstream(slow) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            whole = raw.request(house.secret, ECHO)
            writer.write(whole + whole[:20])
            assert (await asyncio.wait_for(reader.read(), 5)).endswith(b"onetwoend")


async def test_a_head_without_end_is_431(house: House) -> None:
    begun = b"GET /echo HTTP/1.1\r\nHost: gateway\r\nx-field: "
    async with in_process(house) as gateway:
        # Not a byte more than it takes: what is left unread would turn the end of the connection into a reset.
        async with raw.connection(gateway.address) as (reader, writer):
            writer.write(begun + b"x" * (HEAD_BYTES_MAX + 1 - len(begun)))
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 431 ")
        async with raw.connection(gateway.address) as (reader, writer):
            writer.write(begun + b"x" * (HEAD_BYTES_MAX - len(begun) - 4) + b"\r\n\r\n")
            assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 401 ")


async def test_a_client_that_stops_reading_is_let_go_and_pays(house: House) -> None:
    async def endless(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        try:
            while True:
                await visit.send(b"x" * 65536)
        finally:
            visit.closed_at = asyncio.get_running_loop().time()

    house.settings["client_idle"] = "150ms"
    async with raw.upstream(endless) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (_, writer):
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a socket's, which reads too
            writer.write(raw.request(house.secret, ECHO))
            await until(lambda: upstream.visits and upstream.visits[0].closed_at)
            await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


# -- routes and credentials ------------------------------------------------------------------------------------------


async def test_a_path_without_a_route_is_404(house: House) -> None:
    async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
        for path in ("/", "/v1/chat/completions/", "/v1/models", "/echo/../v1/models"):
            writer.write(raw.request(house.secret, path))
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 "), path
            assert b"application/problem+json" in await reader.readuntil(b"\r\n\r\n")
            assert b'"code":"unknown_route"' in await reader.readuntil(b"}")


async def test_a_method_the_route_does_not_take_is_405_and_says_which_it_takes(house: House) -> None:
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answer = await client.get(CHAT)
        refused(answer, 405, "method_not_allowed", CHAT)
        assert answer.headers["allow"] == "POST"
        answer = await client.delete(ECHO)
        refused(answer, 405, "method_not_allowed", ECHO)
        assert answer.headers["allow"] == "GET, POST"


NO_CREDENTIAL: list[list[tuple[str, str]]] = [
    [],
    [("authorization", "Bearer sk-of-somebody-else")],
    [("authorization", "Bearer gw_short")],
    [("authorization", "Bearer gw_" + "x" * 43)],
    [("x-api-key", "gw_" + "x" * 43)],
    [("authorization", "Basic Z3c6Z3c=")],
    [("authorization", "Bearer gw_" + "x" * 43), ("x-api-key", "gw_" + "y" * 43)],
    [("cookie", "authorization=gw_" + "x" * 43)],
]


async def test_a_missing_or_bad_credential_is_401_with_a_challenge(house: House) -> None:
    async with in_process(house) as gateway, httpx.AsyncClient(base_url=gateway.address) as client:
        for fields, path in itertools.product(NO_CREDENTIAL, (CHAT, ECHO)):
            answer = await client.post(path, headers=fields, json=chat_body())
            refused(answer, 401, "invalid_api_key", path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "retry-after" not in answer.headers
            assert not any(value[-20:] in answer.text for _, value in fields)


# -- request ids -----------------------------------------------------------------------------------------------------


async def test_a_trusted_proxy_names_the_request_and_each_is_charged(house: House) -> None:
    house.settings["trusted"] = "[127.0.0.0/8]"
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        for _ in range(2):
            answer = await client.get(ECHO, headers={"x-request-id": "lb-1:retry.2"})
            assert answer.headers.get_list("x-request-id") == ["lb-1:retry.2"]
            assert dict(answer.json()["headers"])["x-request-id"] == "lb-1:retry.2"
        answer = await client.delete(ECHO, headers={"x-request-id": "lb-1:retry.2"})
        said = refused(answer, 405, "method_not_allowed", ECHO)
        assert (answer.headers["x-request-id"], said["instance"]) == ("lb-1:retry.2", "urn:request:lb-1%3Aretry.2")
        for unusable in ("x" * 129, "two words", "", "semi;colon"):
            answer = await client.get(ECHO, headers={"x-request-id": unusable})
            assert answer.headers["x-request-id"] not in ("", unusable)
        await house.settled()
    # The same id twice, and still two charges: what is charged is the request, not its name.
    rows = await house.postgres.rows("SELECT request_id, meta->>'request_id' AS name FROM gateway.ledger ORDER BY seq")
    named = [row["request_id"] for row in rows if row["name"] == "lb-1:retry.2"]
    assert len(named) == len(set(named)) == 2


async def test_anybody_else_gets_an_id_of_our_own(house: House) -> None:
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        answers = [await client.get(ECHO, headers={"x-request-id": "mine"}) for _ in range(2)]
        answers.append(await client.get("/nowhere", headers={"x-request-id": "mine"}))
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == 3 and "mine" not in ids
    assert dict(answers[0].json()["headers"])["x-request-id"] == ids[0]


# -- upstreams -------------------------------------------------------------------------------------------------------


@contextmanager
def deaf_port() -> Iterator[str]:
    """An address where connecting neither succeeds nor fails: the listener's backlog is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def refused_by_both_routes(house: House, status: int, code: str) -> None:
    """Whichever way the upstream is away: each route says so in its dialect, and nobody pays."""
    async with in_process(house) as gateway, house.client(gateway.address) as client:
        for path in (CHAT, ECHO):
            refused(await client.post(path, json=chat_body()), status, code, path)
        await nothing_was_charged(house)


async def test_an_upstream_that_refuses_connections_is_502(house: House) -> None:
    house.upstream_url = "http://127.0.0.1:1"
    await refused_by_both_routes(house, 502, "upstream_unreachable")


async def test_an_upstream_that_does_not_accept_in_time_is_504(house: House) -> None:
    house.settings["connect"] = "150ms"
    with deaf_port() as url:
        house.upstream_url = url
        await refused_by_both_routes(house, 504, "upstream_unreachable")


async def test_an_upstream_that_does_not_answer_in_time_is_504(house: House) -> None:
    house.settings["first_byte"] = "150ms"
    async with raw.upstream(listen_only) as upstream:
        house.upstream_url = upstream.url
        await refused_by_both_routes(house, 504, "upstream_timeout")
        assert len(upstream.visits) == 2  # it may be at work on a request: never asked twice


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200", b"not HTTP\r\n\r\n"], ids=["nothing", "half a line", "garbage"])
async def test_an_upstream_that_breaks_before_it_answers_is_502(house: House, part: bytes) -> None:

    async def break_off(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(part)

    async with raw.upstream(break_off) as upstream:
        house.upstream_url = upstream.url
        await refused_by_both_routes(house, 502, "upstream_broke")
        assert len(upstream.visits) == 2


async def test_an_upstreams_own_502_passes_as_it_is(house: House) -> None:
    page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<hr>"

    async def bad_gateway(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(page)
        await visit.until_closed()

    async with raw.upstream(bad_gateway) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, house.client(gateway.address) as client:
            answer = await client.post(CHAT, json=chat_body())
            await nothing_was_charged(house)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (502, b"<hr>", "text/html")


async def test_an_answer_that_stops_arriving_is_cut_and_charged(house: House) -> None:
    async def stall(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await visit.until_closed()

    house.settings["idle"] = "150ms"
    async with raw.upstream(stall) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(raw.request(house.secret))
            received = await asyncio.wait_for(reader.read(), 5)
            assert received.endswith(b"half")
            await until(lambda: upstream.visits[0].closed_at)
            await house.settled()
    assert await house.charges() == [("settle", CREDIT)]

"""Opening a WebSocket: who gets one, what a refusal looks like, and what is never taken for an agreement."""

import asyncio
import json
from typing import Any

import pytest
import uvloop
from websockets.exceptions import InvalidStatus

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, in_process
from tests.walk.live import KEY, SWITCH, Open, handshake, live, routes
from tests.walk.raw import Visit
from tests.websocket.cases import cases, play
from tests.websocket.echo import echo_server
from tests.websocket.ends import TEXT, frame

LOOPS = {"uvloop": uvloop.new_event_loop}
BOTH_DIALECTS = pytest.mark.parametrize("dialect", ["openai", "problem"])


def refused(raised: pytest.ExceptionInfo[InvalidStatus], dialect: str) -> tuple[int, str]:
    """Status and code of a refusal of our own; checked for its dialect's shape."""
    response = raised.value.response
    document: dict[str, Any] = json.loads(response.body)
    if dialect == "openai":
        assert response.headers["content-type"] == "application/json"
        document = document["error"]
    else:
        assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, document["code"]


@BOTH_DIALECTS
async def test_a_refusal_is_an_http_answer_in_the_dialect(house: House, dialect: str) -> None:
    house.limits = [{"name": "parallel", "count": "concurrent", "limit": 1, "per": "org"}]
    house.settings["routes"] = routes(dialect=dialect)
    async with live(house) as door:
        with pytest.raises(InvalidStatus) as raised:
            await door.connect()
        assert refused(raised, dialect) == (402, "insufficient_credits")
        await house.credits(5)
        with pytest.raises(InvalidStatus) as raised:
            await door.connect(secret="gw_unknown")
        # Of a credential that nobody knows it is not said which routes there are.
        assert refused(raised, dialect) == (401, "invalid_api_key")
        with pytest.raises(InvalidStatus) as raised:
            await door.connect("/elsewhere")
        assert refused(raised, dialect) == (403, "websocket_not_allowed")
        await until(lambda: _has_credits(house))
        async with door.connect():
            with pytest.raises(InvalidStatus) as raised:
                await door.connect()
            assert refused(raised, dialect) == (429, "rate_limit_exceeded")
        assert len(door.served) == 1
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


async def _has_credits(house: House) -> bool:
    """The grant has reached Redis: an org refused for want of credits is looked up again in the background."""
    return (await house.account()).get("p", 0) > 0


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (handshake("{}", version="8"), b"426"),
        (handshake("{}", "Sec-WebSocket-Key: " + KEY), b"400"),
        (handshake("{}", method="POST"), b"400"),
        (handshake("{}", "Content-Length: 5") + b"hello", b"400"),
        (handshake("{}", "Transfer-Encoding: chunked") + b"0\r\n\r\n", b"400"),
    ],
    ids=["version", "two keys", "POST", "a body", "a chunked body"],
)
async def test_what_is_no_handshake_is_refused_and_costs_nothing(house: House, sent: bytes, status: bytes) -> None:
    opened = Open()
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(sent.replace(b"{}", house.secret.encode()))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split(b" ")[1] == status
            if status == b"426":
                assert b"\r\nsec-websocket-version: 13\r\n" in head
        assert upstream.visits == []


async def test_the_handshake_and_its_answer_cross_as_they_are(house: House) -> None:
    house.price = 0
    answer = SWITCH.replace(b"Connection: Upgrade", b"X-Up: 1\r\nConnection: Upgrade")
    opened = Open(answer=answer[:-2] + b"Sec-WebSocket-Protocol: b\r\n\r\n")
    more = "sec-websocket-protocol: a, b", "Sec-WebSocket-Extensions: x; y=1", "Sec-WebSocket-Extensions: z"
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret, *more, path="/live?x=%2F"))
            head = await reader.readuntil(b"\r\n\r\n")
            visit = await opened.visits.get()
    asked = visit.head.split(b"\r\n")
    assert asked[0] == b"GET /live?x=%2F HTTP/1.1"
    own = [line for line in asked if line.lower().startswith((b"connection", b"upgrade", b"sec-websocket"))]
    version, key = b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + KEY.encode()
    assert own == [b"Connection: Upgrade", b"Upgrade: websocket", version, key, *(line.encode() for line in more)]
    assert not any(line.lower().startswith(b"authorization") for line in asked)
    lines = head.split(b"\r\n")
    assert [line for line in lines if not line.startswith(b"x-")] == [
        *SWITCH.replace(b"Connection: Upgrade", b"X-Up: 1\r\nConnection: Upgrade").split(b"\r\n")[:-2],
        b"Sec-WebSocket-Protocol: b",
        b"",
        b"",
    ]
    assert any(line.startswith(b"x-request-id: ") for line in lines)


LIES = {
    "another key": SWITCH.replace(b"Sec-WebSocket-Accept: ", b"Sec-WebSocket-Accept: A"),
    "no key": SWITCH.replace(b"Sec-WebSocket-Accept", b"X"),
    "another protocol": SWITCH.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
    "no connection": SWITCH.replace(b"Connection: Upgrade\r\n", b""),
    "a body": SWITCH.replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n"),
    "chunks": SWITCH.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
}


@pytest.mark.parametrize("answer", LIES.values(), ids=LIES.keys())
async def test_a_101_that_proves_nothing_opens_nothing(house: House, answer: bytes) -> None:
    """Else a client and an upstream could agree on a tunnel through which unseen requests go."""
    await house.credits(5)
    opened = Open(answer=answer)
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret) + raw.request(house.secret, "/smuggled"))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502 ")
            assert b'"upstream_broke"' in await reader.read()
            visit = await opened.visits.get()
            assert await visit.reader.read() == b""
            await house.settled()
        assert len(upstream.visits) == 1
    assert await house.charges() == []


@pytest.mark.parametrize("status", [b"200 OK", b"401 Unauthorized", b"426 Upgrade Required", b"503 Away"])
async def test_any_other_answer_of_the_upstream_is_an_ordinary_one(house: House, status: bytes) -> None:
    await house.credits(5)

    async def answer(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(b"HTTP/1.1 %b\r\nX-Up: 1\r\nContent-Length: 4\r\n\r\nbody" % status)
        assert await visit.reader.read() == b""

    async with raw.upstream(answer) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret) + raw.request(house.secret, "/smuggled"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %b\r\nX-Up: 1\r\n" % status)
            # After an upgrade that was not taken nobody knows what the next bytes are: they are no request.
            assert await reader.read() == b"body"
        assert len(upstream.visits) == 1
        await house.settled()
    assert await house.charges() == ([("settle", CREDIT)] if status.startswith(b"2") else [])


async def test_what_a_client_sends_too_early_waits_for_the_agreement(house: House) -> None:
    house.price = 0
    agreed = asyncio.Event()
    visits: asyncio.Queue[Visit] = asyncio.Queue()

    async def think(visit: Visit) -> None:
        await visit.read_head()
        visits.put_nowait(visit)
        await agreed.wait()
        await visit.send(SWITCH)
        await asyncio.Event().wait()

    async with raw.upstream(think) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (_, writer):
            early = frame(TEXT, b"early")
            writer.write(handshake(house.secret) + early)
            visit = await visits.get()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await visit.reader.read(1)
            agreed.set()
            assert await visit.reader.readexactly(len(early)) == early


async def test_a_client_that_sends_too_much_too_early_gets_no_websocket(house: House) -> None:
    house.price = 0
    agreed = asyncio.Event()

    async def think(visit: Visit) -> None:
        await visit.read_head()
        await agreed.wait()
        await visit.send(SWITCH)
        assert await visit.reader.read() == b""

    async with raw.upstream(think) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret) + frame(TEXT, b"x" * 1_000_000))
            await until(lambda: upstream.visits and upstream.visits[0].head)
            await writer.drain()
            agreed.set()
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


async def test_another_upgrade_is_no_websocket(house: House) -> None:
    house.price = 0
    house.settings["routes"] = routes()
    async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
        request = raw.request(house.secret, "/echo", "GET", b"")
        writer.write(request.replace(b"\r\nHost", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHost", 1))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert b"h2c" not in await reader.readuntil(b"}")


async def test_case_by_case_a_client_gets_what_it_gets_without_us(house: House, full: bool) -> None:
    """tests/websocket/test_cases.py, through the whole gateway."""
    house.price = 0
    credential = {"Authorization": f"Bearer {house.secret}"}
    wanted = list(cases(full))
    async with echo_server() as server:
        house.upstream_url = f"http://{server[0]}:{server[1]}"
        house.settings["routes"] = routes("message_bytes_max: 32MiB")
        async with in_process(house) as gateway:
            together = asyncio.Semaphore(20)
            differences = []

            async def compare(number: int) -> None:
                case = wanted[number]
                async with together:
                    direct = await play(case, house.upstream_url, "/live", {})
                    through = await play(case, gateway.address, "/live", credential)
                if difference := through.body_differs_from(direct):
                    differences.append(f"{case.name}: {difference}")

            await asyncio.gather(*(compare(number) for number in range(len(wanted))))
    assert differences == []

"""No bytes that a client can send become, at the upstream, a request that was not admitted and charged.

Every payload is sent alone on a connection. It is refused with the status that stands beside it, or forwarded, and
then strict and lenient readers of what the upstream got agree on what it was: as many requests as were charged, and
none but those that are expected.
"""

import asyncio
import contextlib
import re

import pytest

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, in_process
from tests.walk.raw import Visit
from tests.walk.smuggling.framing import (
    CHUNKS,
    CL_0,
    CL_CL,
    CL_TE,
    LEADING_ZEROS,
    OBFUSCATED,
    PIPELINED,
    TE_PLAIN,
    TE_TE,
    UNKNOWN_CODINGS,
)
from tests.walk.smuggling.heads import EXPECT, FAKE_HANDSHAKES, FIELDS, LINES, SEC_KEY, UPGRADES, VERSION, handshake
from tests.walk.smuggling.payload import HIDDEN, KEY, Payload, request
from tests.walk.smuggling.recorder import Recorder, Seen, read_leniently, recording

ROUTES = "[ { path: /ws, upstream: ai_router, websocket: {} }, { path: /*, upstream: ai_router } ]"
FAMILIES = {
    "CL.TE and TE.CL": CL_TE,
    "TE.TE": TE_TE,
    "chunked as it may be": TE_PLAIN,
    "CL.CL and 0.CL": CL_CL,
    "lengths with leading zeros": LEADING_ZEROS,
    "CL.0": CL_0,
    "pipelined": PIPELINED,
    "chunks": CHUNKS,
    "request lines": LINES,
    "fields": FIELDS,
    "Expect": EXPECT,
    "Upgrade": UPGRADES,
    "fake handshakes": FAKE_HANDSHAKES,
}
ANSWER_S = 10.0
#: Sent where a connection is still open after the last answer: it is whole and its answer is its own.
CANARY = request(b"Connection: close", line=b"GET /canary HTTP/1.1")


@pytest.fixture
async def house(house: House) -> House:
    house.settings["routes"] = ROUTES
    await house.credits(100_000)
    return house


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status of the next final answer, and whether the connection goes on. IncompleteReadError at the end."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split(b" ")[1])
        if status >= 200:
            break
    length = re.search(rb"\r\ncontent-length: *(\d+)", head)
    assert length is not None, head
    await reader.readexactly(int(length[1]))
    return status, b"\r\nconnection: close" not in head


async def statuses(address: str, key: str, data: bytes, expected: int, pieces: int = 0) -> tuple[list[int], bool]:
    """The statuses of the answers to `data`; True when behind them a canary got its own, or the connection ended as
    the last answer said.

    key: what stands for KEY. pieces: how many bytes are written at once; 0: all.
    """
    data, canary = (text.replace(KEY, key.encode()) for text in (data, CANARY))
    found: list[int] = []
    goes_on = expected > 0
    async with raw.connection(address) as (reader, writer), asyncio.timeout(ANSWER_S), asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(send(writer, data, pieces or len(data)))
        try:
            while goes_on and len(found) < expected:
                status, goes_on = await answer_of(reader)
                found.append(status)
            await sending
            if goes_on:
                writer.write(canary)
                status, goes_on = await answer_of(reader)
                if status != 200:
                    found.append(status)
            rest = await reader.read()
        except (asyncio.IncompleteReadError, ConnectionResetError):
            rest = b""
    return found, rest == b"" and not goes_on


async def send(writer: asyncio.StreamWriter, data: bytes, pieces: int) -> None:
    with contextlib.suppress(ConnectionResetError):  # the answer came first
        for at in range(0, len(data), pieces):
            writer.write(data[at : at + pieces])
            await writer.drain()
            await asyncio.sleep(0)


def complaints(payload: Payload, got: list[int], in_order: bool, recorder: Recorder) -> list[str]:
    strict = [seen for seen in recorder.seen if seen.target != b"/canary"]
    wrong = list(recorder.violations)
    if tuple(got) not in (payload.answers, payload.also):
        wrong.append(f"answers {got} instead of {list(payload.answers)}")
    if in_order == payload.ends_unsaid:
        wrong.append("the next request on the connection got no answer of its own")
    whole = tuple(seen.target for seen in strict if seen.complete)
    if whole != payload.expected:
        wrong.append(f"the upstream got {whole}, not {payload.expected}")
    for prefer in (b"transfer-encoding", b"content-length"):
        lenient = sorted((seen for seen in recorder.lenient(prefer) if seen.complete), key=repr)
        if lenient != sorted((seen for seen in recorder.seen if seen.complete), key=repr):
            wrong.append(f"read with {prefer!r} first it is {lenient}")
    return wrong


@pytest.mark.parametrize("family", FAMILIES)
async def test_each_payload_is_refused_or_means_one_thing(house: House, family: str, full: bool) -> None:
    forwarded, wrong = 0, []
    async with recording() as recorder:
        house.upstream_url = recorder.url
        async with in_process(house) as gateway:
            for payload in FAMILIES[family]:
                for pieces in (0, 1, 7) if full else (0,):
                    got, in_order = await statuses(
                        gateway.address, house.secret, payload.data, len(payload.answers), pieces
                    )
                    # An aborted upload ends when the gateway's side of it does.
                    await until(lambda: gateway.gateway.admission.open_count == 0)
                    found = complaints(payload, got, in_order, recorder)
                    wrong += [f"{payload.name}, {pieces or 'all'} bytes at once: {text}" for text in found]
                    forwarded += len(recorder.seen)
                    recorder.forget()
            await house.settled()
    assert not wrong, "\n".join(wrong)
    assert await house.charges() == [("settle", CREDIT)] * forwarded


async def test_a_request_hidden_in_a_body_is_neither_forwarded_nor_charged(house: House) -> None:
    async with recording() as recorder:
        house.upstream_url = recorder.url
        async with in_process(house) as gateway:
            hidden = HIDDEN.replace(KEY, house.secret.encode())
            async with house.client(gateway.address) as client:
                for _ in range(20):
                    assert (await client.post("/x", content=hidden)).status_code == 200
            await house.settled()
        assert [seen for seen in recorder.seen if seen.target != b"/x" or seen.body != hidden] == []
    assert await house.charges() == [("settle", CREDIT)] * 20


async def test_two_different_credentials_are_refused_and_two_of_a_kind_are_both_stripped(house: House) -> None:
    other = await house.add_key("globex")
    async with recording() as recorder:
        house.upstream_url = recorder.url
        async with in_process(house) as gateway:
            for second, status in (
                (b"Authorization: Bearer " + KEY, 200),
                (b"authorization: Basic dTpw", 200),
                (b"AUTHORIZATION: Bearer " + other.encode(), 401),
                (b"X-Api-Key: " + other.encode(), 401),
                (b"Authorization: Bearer " + KEY + b", Bearer " + KEY, 401),
                (b"X_Api_Key: " + KEY, 200),
            ):
                data = request(second, line=b"GET /x HTTP/1.1")
                assert await statuses(gateway.address, house.secret, data, 1) == ([status], True), second
    # `authorization` at the upstream is a violation.
    assert recorder.violations == []
    assert [seen.target for seen in recorder.seen].count(b"/x") == 3
    everything = b"".join(map(bytes, recorder.connections)).lower()
    assert b"basic" not in everything and other.encode().lower() not in everything


@pytest.mark.parametrize(
    "accept", [b"", b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n"], ids=["none", "wrong"]
)
async def test_an_upstream_that_did_not_take_the_handshake_opens_no_tunnel(house: House, accept: bytes) -> None:
    behind = bytearray()

    async def switch(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + accept + b"\r\n"
        )
        behind.extend(await visit.reader.read())

    async with raw.upstream(switch) as upstream:
        house.upstream_url = upstream.url
        async with in_process(house) as gateway:
            data = handshake(VERSION, SEC_KEY) + HIDDEN
            assert await statuses(gateway.address, house.secret, data, 1) == ([502], True)
            await until(lambda: gateway.gateway.admission.open_count == 0)
            await house.settled()
    assert behind == b""


@pytest.mark.parametrize(
    "path",
    [
        *(b"/%2d/metrics", b"/%2D/ready", b"/-%2fmetrics"),
        b"//-/metrics",
        b"/./-/metrics",
        b"/x/../-/metrics",
        b"/-;x/metrics",
    ],
)
async def test_own_pages_answer_to_their_own_spelling_alone(house: House, path: bytes) -> None:
    async with in_process(house) as gateway:
        data = request(b"Connection: close", line=b"GET " + path + b" HTTP/1.1")
        (status,), _ = await statuses(gateway.address, house.secret, data, 1)
    assert status in (400, 404)


# The proof proved: what the readers would say if something crossed


def test_lenient_readers_would_notice_what_was_smuggled() -> None:
    """Wherever a spelling means anything to one of them, it sees another request than the other."""
    body = b"0\r\n\r\n" + HIDDEN
    noticed = 0
    for spelling in (*OBFUSCATED, *UNKNOWN_CODINGS):
        data = request(b"Content-Length: %d" % len(body), spelling, body=body)
        te, cl = (read_leniently(data, prefer) for prefer in (b"transfer-encoding", b"content-length"))
        assert [seen.target for seen in cl][:1] == [b"/x"]
        assert te == cl or b"/smuggled" in [seen.target for seen in te], spelling
        noticed += te != cl
    assert noticed >= 40


def test_readers_agree_on_what_is_written_right() -> None:
    data = request(b"Content-Length: 5", body=b"hello") + request(
        b"Transfer-Encoding: chunked", body=b"2\r\nab\r\n0\r\n\r\n"
    )
    for prefer in (b"transfer-encoding", b"content-length"):
        assert read_leniently(data, prefer) == [Seen(b"POST", b"/x", b"hello"), Seen(b"POST", b"/x", b"ab")]

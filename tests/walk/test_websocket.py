"""WebSockets through the gateway: both ends get what they would have got from each other."""

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.frames import Close

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import CREDIT, House, in_process
from tests.walk.live import SWITCH, Open, handshake, live, routes
from tests.walk.raw import Visit
from tests.websocket.ends import BINARY, TEXT, close, frame

FROM_SERVER = None
LOOPS = {"uvloop": uvloop.new_event_loop}


@pytest.fixture
async def house(house: House) -> House:
    await house.credits(5)
    return house


# -- what passes -----------------------------------------------------------------------------------------------------


async def test_messages_of_every_kind_pass_both_ways(house: House) -> None:
    async with live(house) as door, door.connect() as client:
        for message in ("hello", "", "später €", b"", b"\x00\xff", b"x" * 125, b"x" * 126, b"x" * 65_536, "y" * 70_000):
            await client.send(message)
            assert await client.recv() == message
        await client.send(["frag", "men", "ted", ""])
        assert await client.recv() == "fragmented"
        await client.send([b"\x01" * 70_000, b"\x02"])
        assert await client.recv() == b"\x01" * 70_000 + b"\x02"


async def test_a_message_of_16_mib_passes_both_ways(house: House) -> None:
    large = bytes(range(256)) * 65_536
    async with live(house, compression=None) as door, door.connect(compression=None) as client:
        await client.send(large)
        assert await client.recv() == large


async def test_fragments_stay_fragments(house: House) -> None:
    fragments: list[list[str]] = []

    async def collect(websocket: ServerConnection) -> None:
        fragments.append([part async for part in websocket.recv_streaming(decode=True)])
        await websocket.send(["an", "sw", "er"])

    async with live(house, collect) as door, door.connect() as client:
        await client.send(["ques", "tion"])
        assert [part async for part in client.recv_streaming(decode=True)] == ["an", "sw", "er", ""]
    assert fragments == [["ques", "tion", ""]]


async def test_the_subprotocol_is_agreed_by_the_ends(house: House) -> None:
    async with live(house, subprotocols=["b", "a"]) as door:
        async with door.connect(subprotocols=["a", "b", "c"]) as client:
            assert client.subprotocol == door.served[0].subprotocol == "b"
        with pytest.raises(InvalidStatus) as refused:
            await door.connect()
        assert refused.value.response.status_code == 400
        assert b"missing subprotocol" in refused.value.response.body  # the server's own words


async def test_pings_and_pongs_are_answered_by_the_other_end(house: House) -> None:
    async with live(house) as door, door.connect() as client:
        await (await client.ping(b"from the client"))
        await until(lambda: door.served)
        await (await door.served[0].ping(b"from the server"))
        await client.pong(b"unsolicited")
        await door.served[0].pong(b"unsolicited")
        await client.send("still here")
        assert await client.recv() == "still here"


CLOSES = [(1000, ""), (1001, "moving on"), (1011, "f\u00fcr immer"), (3000, ""), (4999, "x" * 123)]


@pytest.mark.parametrize(("code", "reason"), CLOSES)
async def test_a_close_of_either_end_reaches_the_other_with_code_and_reason(
    house: House, code: int, reason: str
) -> None:
    async def close_first(websocket: ServerConnection) -> None:
        if await websocket.recv() == "you":
            await websocket.close(code, reason)
        else:
            await websocket.wait_closed()

    async with live(house, close_first) as door:
        async with door.connect() as client:
            await client.send("you")
            with pytest.raises(ConnectionClosed) as closed:
                await client.recv()
            assert closed.value.rcvd == closed.value.sent == Close(code, reason)
        async with door.connect() as client:
            await client.send("I")
            await client.close(code, reason)
            await door.served[1].wait_closed()
            assert (door.served[1].close_code, door.served[1].close_reason) == (code, reason)
        await house.settled()
    assert await house.charges() == [("settle", CREDIT), ("settle", CREDIT)]


async def test_compression_is_agreed_by_the_ends_and_stays_compressed(house: House) -> None:
    """Byte for byte: an upstream that never heard of compression echoes the compressed frame."""
    opened = Open(answer=SWITCH[:-2] + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret, "Sec-WebSocket-Extensions: permessage-deflate"))
            assert b"Sec-WebSocket-Extensions: permessage-deflate\r\n" in await reader.readuntil(b"\r\n\r\n")
            visit = await opened.visits.get()
            assert b"Sec-WebSocket-Extensions: permessage-deflate\r\n" in visit.head
            compressed = frame(TEXT, b"\xf2\x48\xcd\xc9\xc9\x07\x00", rsv=4)
            writer.write(compressed)
            assert await visit.reader.readexactly(len(compressed)) == compressed
            await visit.send(frame(TEXT, b"\xf2\x48\xcd\xc9\xc9\x07\x00", rsv=4, key=FROM_SERVER))
            assert (await reader.readexactly(9))[0] == 0xC1


async def test_the_library_at_both_ends_compresses(house: House) -> None:
    async with live(house) as door, door.connect() as client:
        (extension,) = client.protocol.extensions
        assert extension.name == "permessage-deflate"
        for number in range(20):
            message = f"compress me, number {number} " * 1000
            await client.send(message)
            assert await client.recv() == message


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upwards", [True, False], ids=["from the client", "from the upstream"])
async def test_a_message_over_the_bound_closes_both_ends_with_1009(house: House, upwards: bool) -> None:
    async def send_what_is_wanted(websocket: ServerConnection) -> None:
        async for message in websocket:
            await websocket.send(b"x" * int(message))

    async with live(house, send_what_is_wanted, "message_bytes_max: 64KiB", compression=None) as door:
        async with door.connect(compression=None) as client:
            await client.send("65536")
            assert len(await client.recv()) == 65_536
            await client.send("65537" if not upwards else "1" * 65_537)
            with pytest.raises(ConnectionClosedError) as closed:
                await client.recv()
            assert closed.value.rcvd == Close(1009, "message_too_big: more than 65536 bytes")
            await door.served[0].wait_closed()
            assert (door.served[0].close_code, door.served[0].close_reason) == (1009, "message_too_big")
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ("idle: 1s", "idle_timeout: nothing was sent for too long"),
        ("idle: 1s, lifetime: 1s", "lifetime_over: connect again"),
    ],
)
async def test_a_websocket_ends_when_it_is_silent_or_old(house: House, rules: str, why: str) -> None:
    async def talk(websocket: ServerConnection) -> None:
        while "lifetime" in why:
            await websocket.send("tick")
            await asyncio.sleep(0.05)
        await websocket.wait_closed()

    async with live(house, talk, rules) as door, door.connect() as client:
        with pytest.raises(ConnectionClosedOK) as closed:
            while True:
                await client.recv()
        assert closed.value.rcvd == Close(1001, why)
        await door.served[0].wait_closed()
        assert (door.served[0].close_code, door.served[0].close_reason) == (1001, why.partition(":")[0])


@pytest.mark.parametrize("upwards", [True, False], ids=["the upstream", "the client"])
async def test_an_end_that_does_not_read_stops_the_other_in_bounded_memory(
    house: House, upwards: bool, record_property: Callable[[str, object], None]
) -> None:
    opened = Open()
    piece = frame(BINARY, b"x" * 60_000, key=b"\0\0\0\0" if upwards else FROM_SERVER)
    limit_bytes, total = 24 << 20, 600
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret))
            await reader.readuntil(b"\r\n\r\n")
            visit = await opened.visits.get()
            source, sink = (writer, visit.reader) if upwards else (visit.writer, reader)
            sent = 0

            async def pour() -> None:
                nonlocal sent
                for _ in range(total):
                    source.write(piece)
                    await source.drain()
                    sent += len(piece)

            pouring = asyncio.create_task(pour())
            last = [0, 0]

            async def stands_still() -> bool:
                await asyncio.sleep(0.1)
                if sent != last[0]:
                    last[:] = [sent, 0]
                last[1] += 1
                return last[1] >= 5

            await until(stands_still)
            record_property("bytes_held_on_the_way", sent)
            assert sent < limit_bytes and not pouring.done()  # what the kernel and the bounded buffers hold
            received = 0
            while received < total * len(piece):
                received += len(await sink.read(1 << 20))
            await pouring


# -- ends that break -------------------------------------------------------------------------------------------------

HALF = frame(BINARY, b"x" * 1000, key=FROM_SERVER)[:500]


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_an_upstream_that_dies_within_a_frame_cuts_the_client(house: House, reset: bool) -> None:
    async def die(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(SWITCH + HALF)
        assert await visit.reader.readexactly(7) == frame(TEXT, b"!")
        if not reset:
            visit.writer.close()

    async with raw.upstream(die) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(HALF)) == HALF
            writer.write(frame(TEXT, b"!"))
            assert await reader.read() == b""  # and no close frame that the upstream never sent
            await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_a_client_that_dies_within_a_frame_cuts_the_upstream(house: House, reset: bool) -> None:
    opened = Open()
    half = frame(BINARY, b"x" * 1000)[:500]
    async with raw.upstream(opened) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway:
            async with raw.connection(gateway.address) as (reader, writer):
                writer.write(handshake(house.secret))
                await reader.readuntil(b"\r\n\r\n")
                visit = await opened.visits.get()
                writer.write(half)
                assert await visit.reader.readexactly(len(half)) == half
                if not reset:
                    writer.close()
            assert await visit.reader.read() == b""
            await house.settled()
            assert gateway.gateway.admission.open_count == 0
            assert all(stats.in_use == 0 for stats in gateway.gateway.upstreams.stats().values())
    assert await house.charges() == [("settle", CREDIT)]


async def test_after_a_websocket_its_connection_carries_no_more_requests(house: House) -> None:
    async def answer_close(visit: Visit) -> None:
        await visit.read_head()
        await visit.send(SWITCH)
        assert await visit.reader.readexactly(len(close())) == close()
        await visit.send(close(key=FROM_SERVER))

    async with raw.upstream(answer_close) as upstream:
        house.upstream_url = upstream.url
        house.settings["routes"] = routes()
        async with in_process(house) as gateway, raw.connection(gateway.address) as (reader, writer):
            writer.write(handshake(house.secret))
            await reader.readuntil(b"\r\n\r\n")
            writer.write(close() + raw.request(house.secret, "/smuggled"))
            assert await reader.read() == close(key=FROM_SERVER)
        assert len(upstream.visits) == 1
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]

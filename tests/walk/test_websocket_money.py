"""What a WebSocket takes, holds and costs: the connection, each message, and the end that a gateway makes of it."""

import asyncio
import signal

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.frames import Close

from tests.waiting import until
from tests.walk.house import CREDIT, House, Process
from tests.walk.live import Live, live, routes

COUNTED = "count_messages: true"
PARALLEL = [{"name": "parallel", "count": "concurrent", "limit": 1, "per": "org"}]


async def metas(house: House) -> list[tuple[str, int | None]]:
    """Of every charge: the hold, without the connection's own id, and the message."""
    rows = await house.postgres.rows(
        "SELECT request_id, meta ->> 'message' AS message FROM gateway.ledger WHERE kind = 'settle' ORDER BY request_id"
    )
    return [(row["request_id"].partition(":")[2], row["message"] and int(row["message"])) for row in rows]


async def test_credits_that_run_out_between_messages_close_with_1008_and_an_exact_ledger(house: House) -> None:
    house.per_message = 2
    await house.credits(5)  # 1 for the connection, held until its end, 2 for each of two messages
    async with live(house, rules=COUNTED) as door, door.connect() as client:
        for number in range(2):
            await client.send(f"message {number}")
            assert await client.recv() == f"message {number}"
        await client.send("one too many")
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
        assert closed.value.rcvd.reason.startswith("request_exceeds_balance: ")
        await door.served[0].wait_closed()
        assert (door.served[0].close_code, door.served[0].close_reason) == (1001, "request_exceeds_balance")
        await house.settled()
    assert await house.charges() == [("settle", 2 * CREDIT), ("settle", 2 * CREDIT), ("settle", CREDIT)]
    assert await metas(house) == [("", None), ("1", 1), ("2", 2)]
    assert await house.balance() == 0


async def test_messages_count_against_request_limits_and_say_when_to_come_back(house: House) -> None:
    house.price = 0
    house.limits = [{"name": "rph", "count": "requests", "limit": 3, "window": "1h", "per": "org"}]
    async with live(house, rules=COUNTED) as door, door.connect() as client:
        for _ in range(2):  # the connection itself is the first of the three
            await client.send("counted")
            await (await client.ping())  # control frames are not
            assert await client.recv() == "counted"
        await client.send("one too many")
        with pytest.raises(ConnectionClosedError) as closed:
            await client.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        code, _, advice = closed.value.rcvd.reason.partition("; retry-after-ms=")
        assert code == "rate_limit_exceeded"
        assert 3_500_000 < int(advice.partition(":")[0]) <= 3_600_000


async def test_without_counting_messages_are_free(house: House) -> None:
    house.limits = [{"name": "rph", "count": "requests", "limit": 1, "window": "1h", "per": "org"}]
    await house.credits(1)
    async with live(house) as door, door.connect() as client:
        for _ in range(10):
            await client.send("free")
            await client.recv()
    await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


async def test_the_place_of_a_connection_is_held_while_it_is_open_and_free_afterwards(house: House) -> None:
    house.limits = PARALLEL
    house.settings |= {"lease": "1s", "heartbeat": "100ms"}
    await house.credits(5)
    async with live(house) as door:

        async def taken(door: Live) -> bool:
            try:
                async with door.connect():
                    return False
            except InvalidStatus as exc:
                assert exc.response.status_code == 429
                return True

        async with door.connect() as client:
            over = asyncio.get_running_loop().time() + 1.5  # half again as long as the lease
            while asyncio.get_running_loop().time() < over:
                assert await taken(door)
                await asyncio.sleep(0.1)
            await client.send("still open")
            assert await client.recv() == "still open"
        await until(lambda: _is_free(taken, door))
        await house.settled()


async def _is_free(taken: object, door: Live) -> bool:
    assert callable(taken)
    return not await taken(door)


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_gateway_that_ends_says_1001_to_both_ends_and_settles(house: House, signals: int) -> None:
    house.settings["routes"] = routes()
    await house.credits(5)
    async with live(house) as door, Process(house) as gateway:
        door.gateway.address = gateway.address
        async with door.connect() as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            assert gateway.process is not None
            gateway.process.send_signal(signal.SIGTERM)
            if signals == 2:
                await until(gateway.drains)  # two at once would be one
                gateway.process.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosedOK) as closed:
                await client.recv()
            assert closed.value.rcvd == Close(1001, "shutting_down: connect again")
            await door.served[0].wait_closed()
            assert (door.served[0].close_code, door.served[0].close_reason) == (1001, "shutting_down")
            assert await asyncio.wait_for(gateway.process.wait(), 20) == 0
        (line,) = gateway.events("request")
        assert (line["outcome"], line["closed_for"], line["close_code"]) == ("cut", "shutting_down", 1001)
        await house.settled()
    assert await house.charges() == [("settle", CREDIT)]


async def test_one_log_line_tells_of_a_connection(house: House) -> None:
    async def echo_or_die(websocket: ServerConnection) -> None:
        async for message in websocket:
            if message == "die":
                websocket.transport.abort()
            await websocket.send(message)

    house.settings["routes"] = routes(f"{COUNTED}, message_bytes_max: 1KiB")
    house.per_message = 1
    await house.credits(20)
    async with live(house, echo_or_die) as door, Process(house) as gateway:
        door.gateway.address = gateway.address
        async with door.connect(compression=None) as client:
            for message in ("one", "two"):
                await client.send(message)
                await client.recv()
            await client.close(4000, "a reason that may be private")
        await until(lambda: len(gateway.events("request")) == 1)
        async with door.connect(compression=None) as client:
            client.transport.abort()
        await until(lambda: len(gateway.events("request")) == 2)
        for message in ("x" * 1025, "die"):
            async with door.connect(compression=None) as client:
                await client.send(message)
                await client.wait_closed()
            await until(lambda: len(gateway.events("request")) == len(door.served))
        lines = gateway.events("request")
    wanted = {
        "status": 101,
        "decision": "admitted",
        "outcome": "complete",
        "messages_in": 2,
        "messages_out": 2,
        "close_code": 4000,
        "charged_ucredits": 3 * CREDIT,
        "request_bytes": 2 * (2 + 4 + 3) + 2 + 4 + 2 + 28,
        "response_bytes": 2 * (2 + 3) + 2 + 2 + 28,
    }
    assert {name: lines[0].get(name) for name in wanted} == wanted
    assert "private" not in str(lines) and "closed_for" not in lines[0]
    told = [(line["outcome"], line.get("closed_for"), line.get("close_code"), line["status"]) for line in lines[1:]]
    assert told == [
        ("client_left", None, None, 101),
        ("cut", "message_too_big", 1009, 101),
        ("upstream_broke", None, None, 101),
    ]

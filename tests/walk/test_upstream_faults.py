"""An upstream that breaks at any byte: the client's answer, the charge, and nothing left behind.

Before the first byte of an answer has reached the client it gets a 502 or 504; afterwards its connection is cut,
and never does a broken answer come to a well-formed end. Every test ends with the proof of `scene`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import uvloop

from tests.walk.house import House
from tests.walk.storm.cases import ANSWERS, Case, due, every_byte, refused
from tests.walk.storm.reading import Reading
from tests.walk.storm.scene import scene

#: What the gateway is served with. The transport alone is tested on asyncio's own loop too (tests/upstream).
LOOPS = {"uvloop": uvloop.new_event_loop}

LARGE_BODY = b"x" * 8_000_000
KINDS = ("reset", "close", "half_close")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_breaks_at_any_byte(
    house: House, kind: str, full: bool, record_property: Callable[[str, object], None]
) -> None:
    cases = every_byte(kind, 1 if full or kind == "reset" else 7)
    record_property("cases", len(cases))
    async with scene(house) as current:
        for case, reading in (await current.ask_all(cases)).items():
            case.check(reading)
        assert await current.ledger() == due(cases)


async def test_an_answer_that_stalls_at_any_byte(house: House, full: bool) -> None:
    cases = every_byte("stall", 1 if full else 11)
    async with scene(house, first_byte="700ms", idle="700ms") as current:
        for case, reading in (await current.ask_all(cases, at_once=90)).items():
            case.check(reading)
        assert await current.ledger() == due(cases)


async def test_an_answer_that_drips_byte_by_byte_arrives_whole(house: House) -> None:
    cases = [Case(name, "drip", len(answer.wire)) for name, answer in ANSWERS.items()]
    async with scene(house) as current:
        for case, reading in (await current.ask_all(cases)).items():
            case.check(reading)
        assert await current.ledger() == due(cases)


async def test_an_answer_is_whole_even_if_the_connection_breaks_right_behind_it(house: House) -> None:
    cases = [Case(name, kind, len(answer.wire)) for name, answer in ANSWERS.items() for kind in KINDS]
    async with scene(house) as current:
        for case in cases:
            case.check(await current.ask(case))
            await current.disconnected()  # a request must not meet what the one before it left behind
        assert await current.ledger() == due(cases)


async def test_an_upstream_that_refuses_connections_and_comes_back(house: House) -> None:
    async with scene(house) as current:
        await current.proxy.refuse()
        for reading in (await current.ask_all(Case("length", "", 0, number=number) for number in range(10))).values():
            refused(reading, 502, "upstream_unreachable")
        current.proxy.open()
        assert (await current.ask(Case("length", "none", 0))).status == 200
        assert await current.ledger() == {}


async def test_an_upstream_that_refuses_after_some_good_ones(house: House) -> None:
    async with scene(house) as current:
        current.proxy.accept_max = current.proxy.accepted + 3
        cases = [Case("length", "close", len(ANSWERS["length"].wire), number=number) for number in range(6)]
        for case in cases[:3]:
            case.check(await current.ask(case))
            await current.disconnected()
        for case in cases[3:]:
            refused(await current.ask(case), 502, "upstream_unreachable")
        assert await current.ledger() == due(cases[:3])


async def test_an_upstream_that_accepts_and_closes(house: House) -> None:
    greetings: tuple[Literal["close", "reset"], ...] = ("close", "reset")
    async with scene(house) as current:
        for greeting in greetings:
            current.proxy.greeting = greeting
            readings = await current.ask_all(Case("length", greeting, 0, number=number) for number in range(40))
            assert {(reading.status, reading.complete) for reading in readings.values()} == {(502, True)}
        current.proxy.greeting = ""
        assert (await current.ask(Case("length", "none", 0))).status == 200
        assert await current.ledger() == {}


@pytest.mark.parametrize("kind", ["stale_close", "stale_reset"])
async def test_a_kept_connection_that_ends_as_the_next_request_is_written(house: House, kind: str) -> None:
    """Nobody can tell whether it was acted on, so only what may be done twice is sent again."""
    async with scene(house) as current:

        async def after_a_good_one(case: Case) -> Reading:
            assert (await current.ask(replace(case, kind="none"))).status == 200
            current.seen.clear()
            return await current.ask(case)

        refused(await after_a_good_one(Case("length", kind, 0)), 502, "upstream_broke")
        refused(await after_a_good_one(Case("length", kind, 1, path="/never/x", method="GET")), 502, "upstream_broke")
        assert current.seen == []
        repeated = (Case("length", kind, 2, method="GET"), Case("length", kind, 3, path="/again/x"))
        for case in repeated:
            assert (await after_a_good_one(case)).status == 200
            assert current.seen == [case.id]
        # This one the upstream has read, and perhaps done, before its connection broke.
        case = Case("length", "reset", 0)
        refused(await after_a_good_one(case), 502, "upstream_broke")
        assert current.seen == [case.id]
        assert set(await current.ledger()) == {case.id for case in repeated}


async def test_idle_connections_that_close_just_as_a_request_comes(house: House) -> None:
    """The gateway may not have heard of it yet: then it is a 502, and never a second try of what was perhaps done."""
    async with scene(house) as current:
        statuses: Counter[int] = Counter()
        for number in range(60):
            case = Case("length", "none", 0, number=number)
            current.seen.clear()
            asking = asyncio.create_task(current.ask(case))
            for _ in range(number % 12):
                await asyncio.sleep(0)
            current.proxy.close_idle()
            reading = await asking
            statuses[reading.status] += 1
            assert reading.status in (200, 502) and reading.complete
            assert len(current.seen) <= 1 if reading.status == 502 else current.seen == [case.id]
        assert statuses[200] > 0


def uploads(kind: str) -> list[Case]:
    """Requests that are met by `kind` while they are sent, under both framings."""
    return [
        Case("length", kind, at, body=LARGE_BODY, chunked=chunked)
        for at in (1, 65_537, 1_000_000)
        for chunked in (False, True)
    ]


async def test_an_upstream_that_breaks_while_it_is_sent_the_request(house: House) -> None:
    async with scene(house) as current:
        for reading in (await current.ask_all(uploads("upload_reset"))).values():
            refused(reading, 502, "upstream_broke")
        assert await current.ledger() == {}


async def test_an_upstream_that_takes_no_more_of_the_request(house: House) -> None:
    async with scene(house, write="300ms", first_byte="300ms") as current:
        for reading in (await current.ask_all(uploads("upload_stall"))).values():
            refused(reading, 504, "upstream_timeout")
        current.proxy.thaw()
        assert await current.ledger() == {}

"""What a stream may cost before more is asked for, and what happens when there is no more."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import Hold
from gateway.errors import StoreUnavailable
from gateway.meter import Meter
from gateway.proxy.boundary import Boundary
from gateway.proxy.spending import GRANTS_MAX, Spending, output_paid_for
from gateway.types import Peek, Price, Quote
from gateway.usage import READERS
from tests.waiting import until

#: A micro-credit for each token of output, of which a step has 100.
PRICE = Price(0, 0, 1_000_000)
QUOTE = Quote(PRICE, 1000, 16, 1000, step_ucredits=100)
PEEK = Peek(body_bytes=40, stream=True)


@dataclass
class Held:
    """As much of a Hold as matters here."""

    ucredits: int
    quote: Quote = QUOTE
    used_ucredits: int = 0


@dataclass
class Bank:
    """Grants what it has, when it is let."""

    held: Held
    money: int = 0
    asked: list[int] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    fails: bool = False

    async def __call__(self, hold: Hold, ucredits: int) -> int:
        self.asked.append(ucredits)
        await self.open.wait()
        if self.fails:
            raise StoreUnavailable
        granted = min(ucredits, self.money)
        self.money -= granted
        self.held.ucredits += granted
        return granted


class Stream:
    """A stream of a hold of 1000, whose text is told in tokens."""

    def __init__(self, quote: Quote = QUOTE, held_ucredits: int = 1000, money: int = 0) -> None:
        self.held = Held(held_ucredits, quote)
        self.bank = Bank(self.held, money)
        self.bank.open.set()
        self.meter = Meter(READERS["openai_chat"].reader("text/event-stream", ""), PEEK, 200)
        self.spending = Spending(
            cast(Hold, self.held), PEEK, self.meter, cast(Callable[[Hold, int], Awaitable[int]], self.bank)
        )

    def delivers(self, tokens: int) -> bool:
        text = b"abcd" * tokens
        self.meter.see(b'data: {"choices":[{"index":0,"delta":{"content":"' + text + b'"}}]}\n\n')
        return self.spending.covers()

    def ends(self) -> bool:
        self.meter.see(b"data: [DONE]\n\n")
        return self.spending.covers()


async def test_nothing_is_asked_for_before_a_quarter_of_a_step_is_left() -> None:
    stream = Stream(money=5000)

    assert stream.delivers(974)
    assert (stream.held.used_ucredits, stream.bank.asked, stream.spending._asking) == (974, [], None)
    assert stream.delivers(1)
    await until(lambda: stream.held.ucredits == 1100)
    assert stream.bank.asked == [100]
    assert stream.delivers(99) and stream.bank.asked == [100]


async def test_delivery_goes_on_while_more_is_asked_for() -> None:
    stream = Stream(money=5000)
    stream.bank.open.clear()

    assert stream.delivers(980) and stream.delivers(20)
    assert not stream.delivers(1)
    more = asyncio.create_task(stream.spending.more())
    await asyncio.sleep(0)
    assert not more.done()
    stream.bank.open.set()
    assert await more and stream.bank.asked == [100]


async def test_a_read_that_outruns_the_hold_asks_for_what_it_lacks_and_a_step() -> None:
    stream = Stream(money=5000)

    assert not stream.delivers(1700)
    assert await stream.spending.more()
    assert (stream.bank.asked, stream.held.ucredits) == ([800], 1800)


async def test_a_stream_that_has_run_dry_ends() -> None:
    stream = Stream()

    assert not stream.delivers(1001)
    assert not await stream.spending.more()
    assert stream.held.used_ucredits == 1001


async def test_the_last_token_that_the_hold_pays_for_is_not_too_much() -> None:
    stream = Stream()

    assert stream.delivers(1000)


async def test_an_answer_that_is_over_is_not_ended() -> None:
    stream = Stream()

    stream.meter.see(b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2000}}\n\n')
    assert stream.ends()
    assert (stream.held.used_ucredits, stream.bank.asked) == (2000, [])


async def test_money_that_comes_in_after_a_refusal_is_found() -> None:
    stream = Stream()

    assert stream.delivers(980)
    await until(lambda: bool(stream.spending._asking and stream.spending._asking.done()))
    assert stream.delivers(1)  # no is heard: half of the 19 that are left
    assert stream.delivers(8) and stream.bank.asked == [100]
    stream.bank.money = 5000
    assert stream.delivers(1)
    await until(lambda: stream.held.ucredits == 1100)


async def test_money_that_comes_in_at_the_very_end_is_found() -> None:
    stream = Stream()

    assert stream.delivers(980)
    await until(lambda: bool(stream.spending._asking and stream.spending._asking.done()))
    stream.bank.money = 5000
    assert not stream.delivers(500)
    assert await stream.spending.more()


async def test_what_is_granted_in_pieces_is_taken_in_pieces_but_not_for_ever() -> None:
    stream = Stream()

    async def a_little(hold: Hold, ucredits: int) -> int:
        stream.bank.asked.append(ucredits)
        stream.held.ucredits += 1
        return 1

    stream.spending._extend = a_little
    assert not stream.delivers(1004)
    assert await stream.spending.more() and len(stream.bank.asked) == 4
    assert not stream.delivers(1000)
    assert not await stream.spending.more() and len(stream.bank.asked) == 4 + GRANTS_MAX


async def test_stores_that_cannot_be_asked_mean_no() -> None:
    stream = Stream(money=5000)
    stream.bank.fails = True

    assert not stream.delivers(1001)
    assert not await stream.spending.more()


async def test_delivery_waits_for_its_bound_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.proxy.spending.WAIT_S", 0.01)
    stream = Stream(money=5000)
    stream.bank.open.clear()

    assert not stream.delivers(1001)
    assert not await stream.spending.more()
    stream.spending.stop()


async def test_nothing_is_left_running_behind_an_answer() -> None:
    stream = Stream(money=5000)
    stream.bank.open.clear()

    stream.delivers(980)
    asking = stream.spending._asking
    assert asking is not None
    stream.spending.stop()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_hold_that_does_not_grow_is_only_watched() -> None:
    stream = Stream(Quote(PRICE, 1000, 1000, 1000))

    assert stream.delivers(5000)
    assert (stream.held.used_ucredits, stream.bank.asked) == (5000, [])


async def test_a_plain_answer_has_used_its_input() -> None:
    held = Held(1000, Quote(Price(7, 2_000_000, 1_000_000), 1000, 16, 1000, 100))
    meter = Meter(READERS["openai_chat"].reader("application/json", ""), PEEK, 200)
    spending = Spending(cast(Hold, held), PEEK, meter, cast(Callable[[Hold, int], Awaitable[int]], Bank(held)))

    assert spending.covers()
    assert held.used_ucredits == 7 + 2 * 10


@pytest.mark.parametrize(
    ("price", "held", "peek", "expected"),
    [
        (PRICE, 500, Peek(40), 500),
        (PRICE, 500, Peek(40, max_output_tokens=501), 500),
        (PRICE, 500, Peek(40, max_output_tokens=500), None),
        (Price(100, 2_000_000, 3_000_000), 500, Peek(40), 126),  # (500 - 100 - 20) / 3
        (Price(0, 2_000_000, 0), 500, Peek(40), None),
        (Price(500, 0, 1_000_000), 500, Peek(40), 1),
    ],
)
def test_the_most_output_that_a_hold_pays_for(price: Price, held: int, peek: Peek, expected: int | None) -> None:
    assert output_paid_for(Quote(price, 1000, 16, 1000, 100), held, peek) == expected


def test_a_stream_whose_hold_grows_is_not_held_to_the_first_part_of_it() -> None:
    growing = Quote(PRICE, 512, 16, 1000, 100)

    assert output_paid_for(growing, 512, Peek(40, stream=True)) is None
    assert output_paid_for(growing, 512, Peek(40)) == 512


pieces = st.sampled_from([b"data: a", b"\n", b"\r\n", b"\r", b"\n\n", b": c", b"x"])
events = st.lists(pieces, max_size=12).map(b"".join)


@given(events, st.lists(st.integers(1, 5), max_size=20))
def test_a_boundary_is_found_wherever_the_bytes_were_cut(text: bytes, cuts: list[int]) -> None:
    boundary, at = Boundary(), 0
    assert boundary.here
    for cut in [*cuts, len(text)]:
        piece = text[at : at + cut]
        at += cut
        boundary.passed((piece,))
        seen = b"\n\n" + text[:at]
        assert boundary.here == seen.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))


@pytest.mark.parametrize(
    ("passed", "arrived", "rest"),
    [
        (b"data: a", b"b\n\ndata: c", b"b\n\n"),
        (b"data: a\n", b"\ndata: c\n\n", b"\n"),
        (b"data: a\r\n", b"\r\n", b"\r\n"),
        (b"x\n\nd", b"ata: c\n\n", b"ata: c\n\n"),
        (b"data: a", b"bc", b"bc"),
        (b"data: a", b"b\r\rc", b"b\r\r"),
    ],
)
def test_only_the_rest_of_an_event_is_taken(passed: bytes, arrived: bytes, rest: bytes) -> None:
    boundary = Boundary()
    boundary.passed((passed,))
    assert boundary.rest_of_event(arrived) == rest

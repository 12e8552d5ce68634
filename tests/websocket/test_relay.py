"""How a WebSocket ends: both ends are in memory, so that the order in which things happen is the test's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.config import WebSocket
from gateway.errors import ClientLeft, StoreUnavailable, UpstreamBroke
from gateway.types import Outcome, Refusal
from gateway.websocket import AdmitMessage, Ended, Message, Relay
from gateway.websocket.frames import close_code, parse
from tests.waiting import until
from tests.websocket.ends import BINARY, CONTINUATION, KEY, PING, TEXT, End, close, frame, free, masked

FROM_SERVER = None


def rules(**changed: Any) -> WebSocket:
    """Without the bounds of the configuration: some are too long for a test."""
    return WebSocket.model_construct(**changed)


SOON = rules(close_timeout_ms=100)


class Pair:
    """A client, an upstream, and the relay between them under way."""

    def __init__(self, rules: WebSocket, admit: AdmitMessage) -> None:
        self.client, self.upstream = End(), End()
        self.relay = Relay(self.client, self.upstream, rules, admit)
        self.task = asyncio.create_task(self.relay.run())

    async def over(self) -> Ended:
        await asyncio.wait_for(asyncio.shield(self.task), 5)
        assert self.client.aborted and self.upstream.aborted  # nothing happens to ends that were closed before
        return self.relay.ended()

    async def nothing_more(self) -> None:
        """Everything that could happen by itself has happened."""
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.fixture
async def pairing() -> AsyncIterator[Callable[..., Pair]]:
    pairs = []

    def make(rules: WebSocket = SOON, admit: AdmitMessage = free) -> Pair:
        pairs.append(Pair(rules, admit))
        return pairs[-1]

    yield make
    for pair in pairs:
        while not pair.task.done():
            pair.task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(pair.task, return_exceptions=True)


Pairing = Callable[..., Pair]


def closes(got: bytes | bytearray) -> tuple[int | None, str]:
    """The close frame that is all of `got`."""
    header = parse(bytes(got))
    assert header is not None and header.opcode == 8
    rest = bytes(got[header.header_bytes :])
    assert len(rest) == header.rest_bytes
    payload = masked(rest[4:], rest[:4]) if header.masked else rest
    return close_code(header, rest), payload[2:].decode()


# -- ended by an end -------------------------------------------------------------------------------------------------


async def test_a_closing_handshake_passes_and_both_connections_end_in_order(pairing: Pairing) -> None:
    pair = pairing()
    pair.client.sends(frame(TEXT, b"hello"), close(4000, b"done"))
    await until(lambda: pair.upstream.got.endswith(close(4000, b"done")))
    pair.upstream.sends(close(4000, b"done", key=FROM_SERVER), b"")
    ended = await pair.over()
    assert pair.upstream.got == frame(TEXT, b"hello") + close(4000, b"done")
    assert pair.client.got == close(4000, b"done", key=FROM_SERVER)
    assert pair.client.closed and pair.upstream.closed
    assert (ended.outcome, ended.close_code, ended.why) == (Outcome.COMPLETE, 4000, None)
    assert (ended.messages_in, ended.messages_out) == (1, 0)


async def test_a_server_that_closes_first_is_answered_by_the_client(pairing: Pairing) -> None:
    pair = pairing()
    pair.upstream.sends(frame(BINARY, b"x", key=FROM_SERVER), close(1001, key=FROM_SERVER))
    await until(lambda: pair.client.got)
    pair.client.sends(close(1001))
    await until(lambda: pair.upstream.got)
    pair.upstream.sends(b"")
    ended = await pair.over()
    assert (ended.outcome, ended.close_code, ended.messages_out) == (Outcome.COMPLETE, 1001, 1)


async def test_a_client_that_says_close_and_hangs_up_is_still_answered(pairing: Pairing) -> None:
    pair = pairing()
    pair.client.sends(close(), b"")
    await until(lambda: pair.upstream.got)
    await pair.nothing_more()
    assert not pair.task.done()
    pair.upstream.sends(close(key=FROM_SERVER), b"")
    assert (await pair.over()).outcome is Outcome.COMPLETE
    assert pair.client.got == close(key=FROM_SERVER)


async def test_ends_that_have_closed_but_keep_their_connections_lose_them(pairing: Pairing) -> None:
    pair = pairing()
    pair.client.sends(close())
    pair.upstream.sends(close(key=FROM_SERVER))
    assert (await pair.over()).outcome is Outcome.COMPLETE
    assert pair.client.closed and pair.upstream.closed


async def test_an_end_that_hangs_up_without_a_word_is_not_given_one(pairing: Pairing) -> None:
    pair = pairing()
    pair.client.sends(frame(TEXT, b"hello"), b"")
    ended = await pair.over()
    assert pair.upstream.got == frame(TEXT, b"hello")
    assert pair.upstream.closed
    assert (ended.outcome, ended.close_code) == (Outcome.CLIENT_LEFT, None)

    pair = pairing()
    pair.upstream.sends(frame(TEXT, b"hello", key=FROM_SERVER), b"")
    ended = await pair.over()
    assert pair.client.got == frame(TEXT, b"hello", key=FROM_SERVER)
    assert pair.client.closed
    assert (ended.outcome, ended.close_code) == (Outcome.UPSTREAM_BROKE, None)


@pytest.mark.parametrize("written", [frame(BINARY, b"x" * 500)[:300], b"\x82"], ids=["mid-payload", "mid-header"])
async def test_an_end_that_breaks_within_a_frame_cuts_the_other(pairing: Pairing, written: bytes) -> None:
    pair = pairing()
    pair.client.sends(written, ClientLeft())
    assert (await pair.over()).outcome is Outcome.CLIENT_LEFT
    assert not pair.upstream.closed
    assert bytes(pair.upstream.got) in (written, b"")

    pair = pairing()
    pair.upstream.sends(written, UpstreamBroke())
    assert (await pair.over()).outcome is Outcome.UPSTREAM_BROKE
    assert not pair.client.closed
    assert bytes(pair.client.got) in (written, b"")


async def test_what_an_upstream_said_before_it_stopped_listening_still_arrives(pairing: Pairing) -> None:
    pair = pairing()
    pair.upstream.failure = UpstreamBroke()
    pair.client.sends(frame(TEXT, b"hello"))
    await pair.nothing_more()
    pair.upstream.sends(close(1009, key=FROM_SERVER), b"")
    ended = await pair.over()
    assert pair.client.got == close(1009, key=FROM_SERVER)
    assert pair.client.closed
    assert (ended.outcome, ended.close_code) == (Outcome.COMPLETE, 1009)


# -- ended by the gateway --------------------------------------------------------------------------------------------


async def closed_by_the_gateway(pair: Pair, client: tuple[int, str], upstream: tuple[int, str]) -> Ended:
    """Both ends are told, answer, and are let go in order."""
    await until(lambda: pair.client.got and pair.upstream.got)
    assert (closes(pair.client.got), closes(pair.upstream.got)) == (client, upstream)
    assert not pair.task.done()
    pair.client.sends(frame(TEXT, b"too late"), close(client[0]))
    pair.upstream.sends(frame(TEXT, b"too late", key=FROM_SERVER), close(upstream[0], key=FROM_SERVER))
    ended = await pair.over()
    assert pair.client.closed and pair.upstream.closed
    assert b"too late" not in pair.client.got + pair.upstream.got
    assert (ended.outcome, ended.close_code) == (Outcome.CUT, client[0])
    return ended


async def test_silence_from_both_ends_ends_it(pairing: Pairing) -> None:
    pair = pairing(rules(idle_ms=50))
    ended = await closed_by_the_gateway(
        pair, (1001, "idle_timeout: nothing was sent for too long"), (1001, "idle_timeout")
    )
    assert ended.why == "idle_timeout"


async def test_any_byte_either_way_counts_against_silence(pairing: Pairing) -> None:
    pair = pairing(rules(idle_ms=300))
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    while loop.time() < began_at + 0.9:
        source, key = (pair.client, KEY) if len(pair.client.got) % 4 else (pair.upstream, FROM_SERVER)
        source.sends(frame(PING, key=key))
        paused_at = loop.time()
        await asyncio.sleep(0.05)
        if loop.time() - paused_at > 0.25:
            pytest.skip("this machine is too slow to tell")
    assert not pair.task.done() and pair.relay.ended().why is None


async def test_a_connection_has_a_lifetime(pairing: Pairing) -> None:
    pair = pairing(rules(lifetime_ms=50))
    ended = await closed_by_the_gateway(pair, (1001, "lifetime_over: connect again"), (1001, "lifetime_over"))
    assert ended.why == "lifetime_over"


async def test_cancelling_tells_both_ends_that_the_gateway_goes_away(pairing: Pairing) -> None:
    pair = pairing(WebSocket())
    await pair.nothing_more()
    pair.task.cancel()
    await until(lambda: pair.client.got and pair.upstream.got)
    assert closes(pair.client.got) == (1001, "shutting_down: connect again")
    assert closes(pair.upstream.got) == (1001, "shutting_down")
    pair.client.sends(close(1001))
    pair.upstream.sends(close(1001, key=FROM_SERVER))
    with pytest.raises(asyncio.CancelledError):
        await pair.over()
    assert pair.client.closed and pair.upstream.closed
    assert (pair.relay.ended().outcome, pair.relay.ended().why) == (Outcome.CUT, "shutting_down")


async def test_cancelling_twice_cuts(pairing: Pairing) -> None:
    pair = pairing(rules(close_timeout_ms=60_000))
    await pair.nothing_more()
    pair.task.cancel()
    await until(lambda: pair.client.got and pair.upstream.got)
    pair.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pair.over()
    assert pair.client.aborted and not pair.client.closed
    assert pair.relay.ended().outcome is Outcome.CUT


async def test_cancelling_because_the_client_is_gone_says_nothing(pairing: Pairing) -> None:
    pair = pairing(WebSocket())
    await pair.nothing_more()
    pair.client.gone = True
    pair.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pair.over()
    assert not pair.client.got and not pair.upstream.got
    assert pair.upstream.aborted and not pair.upstream.closed
    assert pair.relay.ended().outcome is Outcome.CLIENT_LEFT


async def test_ends_that_do_not_answer_are_cut(pairing: Pairing) -> None:
    pair = pairing(rules(idle_ms=20, close_timeout_ms=50))
    ended = await pair.over()
    assert not pair.client.closed and not pair.upstream.closed
    assert ended.outcome is Outcome.CUT


async def test_our_close_waits_for_the_end_of_a_frame(pairing: Pairing) -> None:
    pair = pairing(rules(idle_ms=50, close_timeout_ms=60_000))
    long = frame(BINARY, b"x" * 500, key=FROM_SERVER)
    pair.upstream.sends(long[:100])
    await until(lambda: pair.upstream.got)
    assert pair.client.got == long[:100]
    pair.client.sends(close(1001))
    pair.upstream.sends(long[100:] + frame(TEXT, b"too late", key=FROM_SERVER))
    await until(lambda: len(pair.client.got) > len(long))
    assert pair.client.got.startswith(long)
    assert closes(pair.client.got[len(long) :])[0] == 1001
    pair.upstream.sends(close(1001, key=FROM_SERVER))
    assert (await pair.over()).outcome is Outcome.CUT
    assert pair.client.closed


async def test_an_end_that_has_said_close_is_not_contradicted(pairing: Pairing) -> None:
    """The client's own Close is on its way; a second one from us would follow it on the same connection."""
    pair = pairing(rules(idle_ms=50, close_timeout_ms=60_000))
    pair.client.sends(close(4000))
    await until(lambda: pair.client.got)
    await pair.nothing_more()
    assert pair.upstream.got == close(4000)
    assert closes(pair.client.got)[0] == 1001
    pair.upstream.sends(close(4000, key=FROM_SERVER))
    ended = await pair.over()
    assert (ended.outcome, ended.close_code, ended.why) == (Outcome.CUT, 4000, "idle_timeout")
    assert closes(pair.client.got)[0] == 1001  # and nothing behind it


async def test_a_client_that_vanishes_within_a_frame_does_not_hold_up_the_closing(pairing: Pairing) -> None:
    pair = pairing(rules(idle_ms=50, close_timeout_ms=60_000))
    pair.client.sends(frame(BINARY, b"x" * 100)[:50])
    await until(lambda: pair.client.got)
    pair.client.sends(b"")
    await pair.over()
    assert pair.upstream.aborted and not pair.upstream.closed


# -- size ------------------------------------------------------------------------------------------------------------

BIG = (1009, "message_too_big: more than 1000 bytes")
SMALL = rules(message_bytes_max=1000, close_timeout_ms=60_000)


@pytest.mark.parametrize(
    ("passing", "refused"),
    [
        (b"", frame(BINARY, b"x" * 1001)),
        (frame(BINARY, b"x" * 1000), frame(TEXT, b"x" * 1001)),
        (frame(BINARY, b"x" * 600, fin=False) + frame(PING, b"!" * 125), frame(CONTINUATION, b"x" * 401, fin=False)),
        (frame(BINARY, b"x" * 600, fin=False) + frame(CONTINUATION, b"x" * 400), frame(CONTINUATION, b"x" * 1001)),
        (b"", frame(BINARY, length=2**64 - 1, wide=8)),
        (b"", frame(PING, length=1001)),
    ],
    ids=["one frame", "the second", "over fragments", "a continuation of nothing", "overflow", "a control frame"],
)
@pytest.mark.parametrize("upwards", [True, False], ids=["of the client", "of the upstream"])
async def test_a_message_too_big_ends_it_before_a_byte_of_it_passes(
    pairing: Pairing, passing: bytes, refused: bytes, upwards: bool
) -> None:
    pair = pairing(SMALL)
    source, sink = (pair.client, pair.upstream) if upwards else (pair.upstream, pair.client)
    source.sends(passing + refused[:20], refused[20:])
    await until(lambda: len(sink.got) > len(passing) and source.got)
    assert sink.got.startswith(passing)
    del sink.got[: len(passing)]
    assert (closes(pair.client.got), closes(pair.upstream.got)) == (BIG, (1009, "message_too_big"))
    pair.client.sends(b"")
    pair.upstream.sends(b"")
    ended = await pair.over()
    assert (ended.outcome, ended.why) == (Outcome.CUT, "message_too_big")


async def test_a_message_of_exactly_the_bound_passes(pairing: Pairing) -> None:
    pair = pairing(SMALL)
    parts = frame(BINARY, b"x" * 999, fin=False) + frame(CONTINUATION, b"x") + frame(TEXT, b"y" * 1000)
    pair.client.sends(parts + close())
    await until(lambda: len(pair.upstream.got) >= len(parts) + 8)
    assert pair.upstream.got == parts + close()


# -- admission -------------------------------------------------------------------------------------------------------

COUNTED = rules(count_messages=True, close_timeout_ms=60_000)
NO_CREDITS = Refusal(402, "insufficient_credits", "No credits are left.", should_retry=False)
TOO_MANY = Refusal(429, "rate_limit_exceeded", "x" * 200, retry_after_ms=1500)


class Desk:
    """Admits until it does not; knows what became of each message."""

    def __init__(self, *verdicts: Refusal | Exception | None) -> None:
        self.verdicts = list(verdicts)
        self.asked: list[int] = []
        self.settled: list[tuple[int, bool]] = []
        self.answers = asyncio.Event()
        self.answers.set()

    @asynccontextmanager
    async def admit(self, message: Message) -> AsyncIterator[Refusal | None]:
        self.asked.append(message.number)
        await self.answers.wait()
        verdict = self.verdicts.pop(0) if self.verdicts else None
        if isinstance(verdict, Exception):
            raise verdict
        try:
            yield verdict
        finally:
            self.settled.append((message.number, message.forwarded))


async def test_each_message_is_admitted_once_and_settled_in_order(pairing: Pairing) -> None:
    desk = Desk()
    pair = pairing(COUNTED, desk.admit)
    stream = (
        frame(TEXT, b"one")
        + frame(PING, b"free")
        + frame(BINARY, b"two", fin=False)
        + frame(CONTINUATION, b"two", fin=False)
        + frame(PING)
        + frame(CONTINUATION)
        + frame(TEXT)
    )
    pair.upstream.sends(frame(TEXT, b"answers are free", key=FROM_SERVER))
    pair.client.sends(stream)
    await until(lambda: pair.upstream.got == stream)
    await until(lambda: len(desk.settled) == 3)
    assert desk.asked == [1, 2, 3]
    assert desk.settled == [(1, True), (2, True), (3, True)]
    pair.client.sends(b"")
    assert (await pair.over()).messages_in == 3


async def test_no_byte_of_a_message_passes_before_it_is_admitted(pairing: Pairing) -> None:
    desk = Desk()
    desk.answers.clear()
    pair = pairing(COUNTED, desk.admit)
    pair.client.sends(frame(PING) + frame(TEXT, b"hello"))
    await until(lambda: desk.asked)
    await pair.nothing_more()
    assert pair.upstream.got == frame(PING)
    desk.answers.set()
    await until(lambda: pair.upstream.got == frame(PING) + frame(TEXT, b"hello"))


@pytest.mark.parametrize(
    ("verdict", "client"),
    [
        (NO_CREDITS, (1008, "insufficient_credits: No credits are left.")),
        (TOO_MANY, (1013, ("rate_limit_exceeded; retry-after-ms=1500: " + "x" * 200)[:123])),
        (
            StoreUnavailable("Away."),
            (1013, "store_unavailable; retry-after-ms=1000: Away."),
        ),
    ],
    ids=["for good", "for now", "stores away"],
)
async def test_a_message_that_is_not_admitted_ends_the_connection(
    pairing: Pairing, verdict: Refusal | Exception, client: tuple[int, str]
) -> None:
    desk = Desk(None, verdict)
    pair = pairing(COUNTED, desk.admit)
    pair.client.sends(frame(TEXT, b"paid"))
    await until(lambda: desk.settled == [(1, True)])
    assert pair.upstream.got == frame(TEXT, b"paid")
    pair.upstream.got.clear()
    pair.client.sends(frame(TEXT, b"refused", fin=False) + frame(CONTINUATION, b"refused") + frame(TEXT, b"next"))
    ended = await closed_by_the_gateway(pair, client, (1001, client[1].partition(":")[0].partition(";")[0]))
    assert ended.messages_in == 1
    assert desk.asked == [1, 2]
    assert all(number == 1 or not forwarded for number, forwarded in desk.settled)


async def test_a_message_admitted_after_the_end_is_given_back(pairing: Pairing) -> None:
    desk = Desk()
    desk.answers.clear()
    pair = pairing(rules(count_messages=True, idle_ms=50, close_timeout_ms=60_000), desk.admit)
    pair.client.sends(frame(TEXT, b"late"))
    await until(lambda: pair.client.got)  # idle: the client is told, the upstream waits for the admission
    desk.answers.set()
    await until(lambda: pair.upstream.got)
    assert closes(pair.upstream.got)[0] == 1001
    assert desk.settled == [(1, False)]


async def test_a_message_that_waits_for_admission_is_given_back_when_the_upstream_leaves(pairing: Pairing) -> None:
    desk = Desk()
    desk.answers.clear()
    pair = pairing(COUNTED, desk.admit)
    pair.client.sends(frame(TEXT, b"late"))
    await until(lambda: desk.asked)
    pair.upstream.sends(b"")
    await pair.over()
    assert desk.settled == []
    assert pair.upstream.got == b""


async def test_without_counting_nobody_is_asked(pairing: Pairing) -> None:
    desk = Desk(NO_CREDITS)
    pair = pairing(WebSocket(), desk.admit)
    pair.client.sends(frame(TEXT, b"hello"))
    await until(lambda: pair.upstream.got)
    assert desk.asked == []


# -- back-pressure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upwards", [True, False])
async def test_an_end_that_takes_nothing_stops_the_other_after_one_read(pairing: Pairing, upwards: bool) -> None:
    pair = pairing(WebSocket())
    source, sink = (pair.client, pair.upstream) if upwards else (pair.upstream, pair.client)
    sink.takes.clear()
    source.sends(*[frame(BINARY, b"x" * 1000)] * 10)
    await until(lambda: sink.writes)
    await pair.nothing_more()
    assert (len(sink.writes), source.sent.qsize()) == (1, 9)
    # The other direction does not mind.
    sink.sends(frame(TEXT, b"hello"))
    await until(lambda: source.got == frame(TEXT, b"hello"))
    sink.takes.set()
    await until(lambda: len(sink.writes) == 10)


async def test_what_came_in_one_read_leaves_in_one_write(pairing: Pairing) -> None:
    pair = pairing(WebSocket())
    stream = b"".join(frame(TEXT, b"%d" % number) for number in range(100))
    pair.client.sends(stream[:-3], stream[-3:])
    await until(lambda: pair.upstream.got == stream)
    assert len(pair.upstream.writes) == 2

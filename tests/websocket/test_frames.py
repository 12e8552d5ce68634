"""Where frames end and messages begin, however the stream is cut up."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, Frame, Opcode

from gateway.config import WebSocket
from gateway.websocket import Relay
from gateway.websocket.frames import Header, Messages, close_code, close_frame, parse
from tests.websocket.ends import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, End, close, frame, free


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536])
def test_a_header_is_read_when_it_is_whole_and_not_before(size: int, masked: bool) -> None:
    written = Frame(Opcode.BINARY, b"x" * size, fin=False).serialize(mask=masked)
    header = parse(b"ab" + written, 2)
    assert header is not None
    assert (header.fin, header.opcode, header.masked, header.payload_bytes) == (False, BINARY, masked, size)
    assert header.header_bytes + header.rest_bytes == len(written)
    assert [parse(written[:cut]) for cut in range(header.header_bytes)] == [None] * header.header_bytes
    assert parse(written[: header.header_bytes]) == header


def test_a_length_that_no_frame_may_have_is_read_as_it_stands() -> None:
    header = parse(b"\x82\x7f" + b"\xff" * 8)
    assert header is not None and header.payload_bytes == 2**64 - 1


@given(st.binary(max_size=20), st.integers(0, 10))
def test_no_bytes_are_too_strange_to_be_a_header(data: bytes, at: int) -> None:
    header = parse(data, at)
    assert header is None or 2 <= header.header_bytes <= len(data) - at


def header(opcode: int, payload_bytes: int = 0, fin: bool = True) -> Header:
    return Header(fin, opcode, True, payload_bytes, 2)


def test_messages_are_counted_by_their_first_frame_and_measured_over_all() -> None:
    messages = Messages()
    totals = []
    for passing in (
        header(TEXT, 5),
        header(BINARY, 10, fin=False),
        header(PING, 100),
        header(CONTINUATION, 20, fin=False),
        header(CLOSE, 2),
        header(CONTINUATION, 30),
        header(TEXT, 7),
    ):
        totals.append(messages.bytes_with(passing))
        messages.add(passing)
    assert totals == [5, 10, 100, 30, 2, 60, 7]
    assert messages.count == 3


def test_frames_that_no_valid_stream_has_still_count() -> None:
    messages = Messages()
    for passing in (
        header(CONTINUATION, 5),
        header(TEXT, 1, fin=False),
        header(TEXT, 2, fin=False),
        header(CONTINUATION, 3),
        header(CONTINUATION, 4),
        header(5, 1),
    ):
        messages.add(passing)
    assert messages.count == 5


@pytest.mark.parametrize("masked", [False, True])
def test_our_close_frames_are_what_the_library_reads(masked: bool) -> None:
    written = close_frame(1013, "später" * 30, masked=masked)
    head = parse(written)
    assert head is not None and head.masked == masked and head.payload_bytes <= 125
    assert close_code(head, written[head.header_bytes :][:6]) == 1013
    if not masked:
        assert Close.parse(written[2:]).reason == ("später" * 30).encode()[:123].decode(errors="ignore")


@pytest.mark.parametrize("code", [None, 1000, 4999])
def test_a_close_code_is_read_through_its_mask(code: int | None) -> None:
    for key in (None, b"\x12\x34\x56\x78"):
        written = close(code, b"why", key=key) if code is not None else close(None, key=key)
        head = parse(written)
        assert head is not None
        assert close_code(head, written[2:8]) == code


# -- cut up ----------------------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.builds(
        frame,
        st.sampled_from([TEXT, BINARY, CONTINUATION, PING, PONG, 3, 11]),
        st.binary(max_size=300),
        fin=st.booleans(),
        rsv=st.integers(0, 7),
        key=st.one_of(st.none(), st.binary(min_size=4, max_size=4)),
        wide=st.sampled_from([2, 8]),
    ),
    max_size=12,
)


async def relayed(client_sends: list[bytes], upstream_sends: list[bytes]) -> tuple[bytes, bytes, tuple[int, ...]]:
    """What each end got of what the other sent in these reads, and the counts."""
    client, upstream = End(), End()
    client.sends(*client_sends, b"")
    upstream.sends(*upstream_sends, b"")
    relay = Relay(client, upstream, WebSocket(count_messages=True), free)
    await relay.run()
    ended = relay.ended()
    counts = (ended.messages_in, ended.messages_out, ended.bytes_in, ended.bytes_out, ended.close_code or 0)
    return bytes(upstream.got), bytes(client.got), counts


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(edge % (len(stream) + 1) for edge in at)})
    return [stream[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]


@given(FRAMES, st.lists(st.integers(0, 10_000), max_size=40), st.integers(1000, 4999))
def test_however_a_stream_is_cut_up_the_same_bytes_pass_and_the_same_messages_count(
    frames: list[bytes], at: list[int], code: int
) -> None:
    # Both close, so that neither end is thought to have left before everything has passed.
    stream = b"".join(frames) + close(code)
    whole = asyncio.run(relayed([stream], [close(code)]))
    pieces = asyncio.run(relayed(cut(stream, at), [close(code)]))
    octets = asyncio.run(relayed([bytes([byte]) for byte in stream[:500]] + [stream[500:]], [close(code)]))
    assert whole == pieces == octets
    assert whole[0] == stream
    messages = Messages()
    for written in frames:
        head = parse(written)
        assert head is not None
        messages.add(head)
    assert whole[2][0] == messages.count


@pytest.mark.parametrize("seed", range(20))
async def test_random_streams_both_ways_arrive_byte_for_byte(seed: int) -> None:
    chosen = random.Random(seed)

    def stream(key: bytes | None) -> bytes:
        frames = bytearray()
        for _ in range(chosen.randrange(200)):
            if chosen.random() < 0.3:
                frames += frame(chosen.choice([PING, PONG]), chosen.randbytes(chosen.randrange(126)), key=key)
                continue
            parts = chosen.randrange(1, 5)
            for part in range(parts):
                payload = chosen.randbytes(chosen.choice([0, 1, 125, 126, 5_000, 70_000]))
                opcode = CONTINUATION if part else chosen.choice([TEXT, BINARY])
                frames += frame(opcode, payload, fin=part == parts - 1, rsv=chosen.choice([0, 4]), key=key)
                if chosen.random() < 0.3:
                    frames += frame(PING, chosen.randbytes(4), key=key)
        return bytes(frames) + close(key=key)

    up, down = stream(chosen.randbytes(4)), stream(None)
    reads = [cut(data, [chosen.randrange(len(data) + 1) for _ in range(300)]) for data in (up, down)]
    to_upstream, to_client, _ = await relayed(*reads)
    assert (to_upstream, to_client) == (up, down)

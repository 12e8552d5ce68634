"""Events come out the same wherever the network cut the bytes."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage.sse import EVENT_BYTES_MAX, EventSplitter


def events_of(*chunks: bytes) -> list[bytes]:
    splitter = EventSplitter()
    return [event for chunk in chunks for event in splitter.feed(chunk)]


def by_the_standard(stream: bytes) -> list[bytes]:
    """The event stream algorithm of the HTML standard, over the whole stream at once."""
    *lines, _ = re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))
    events: list[bytes] = []
    data: list[bytes] = []
    for line in lines:
        if line == b"":
            if data:
                events.append(b"\n".join(data))
            data = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
    return events


pieces = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"data",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b":",
        b" ",
        b"x",
        b"\xc3\xa9",
        b"event: y",
        b"\xef\xbb\xbf",
    ]
)
streams = st.lists(pieces, max_size=30).map(b"".join)


@given(streams, st.lists(st.integers(1, 5), max_size=60))
def test_any_stream_cut_anywhere_gives_the_events_of_the_standard(stream: bytes, sizes: list[int]) -> None:
    chunks = []
    rest = stream
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]

    assert events_of(*chunks, rest) == by_the_standard(stream)


def test_a_cut_inside_crlf_is_one_line_end() -> None:
    assert events_of(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


def test_a_carriage_return_alone_ends_lines_at_once() -> None:
    assert events_of(b"data: a\r\r") == [b"a"]


def test_comments_alone_never_fill_the_buffer() -> None:
    splitter = EventSplitter()
    for _ in range(300):
        assert splitter.feed(b": " + b"k" * 8000 + b"\n") == []

    assert splitter.feed(b"data: a\n\n") == [b"a"] and splitter.dropped == 0


@pytest.mark.parametrize("size_bytes", [1000, 65_536, EVENT_BYTES_MAX * 2])
@pytest.mark.parametrize("lines", [1, 40])
def test_an_event_over_the_bound_is_dropped_and_the_next_one_is_not(size_bytes: int, lines: int) -> None:
    line = b"data: " + b"y" * (EVENT_BYTES_MAX // lines + 100) + b"\n"
    stream = b"data: before\n\n" + line * lines + b"data: same event\n\ndata: after\n\n"
    splitter = EventSplitter()

    events = [
        event
        for start in range(0, len(stream), size_bytes)
        for event in splitter.feed(stream[start : start + size_bytes])
    ]

    assert (events, splitter.dropped) == ([b"before", b"after"], 1)


def test_an_endless_line_is_not_kept() -> None:
    splitter = EventSplitter()
    for _ in range(64):
        splitter.feed(b"z" * 65_536)

    assert splitter.pending() is None and splitter.dropped == 1
    assert len(splitter._line) == 1


def test_an_event_of_exactly_the_bound_is_kept() -> None:
    line = b"data:" + b"y" * (EVENT_BYTES_MAX - 5)

    assert events_of(line[:10], line[10:], b"\n\n") == [line[5:]]
    assert events_of(line + b"y\n\n") == []


def test_what_is_pending_can_be_looked_at_without_taking_it() -> None:
    splitter = EventSplitter()
    splitter.feed(b"\xef\xbb\xbfdata: a\ndata: b")

    assert splitter.pending() == splitter.pending() == b"a\nb"
    assert splitter.feed(b"c\n\n") == [b"a\nbc"]
    assert splitter.pending() is None

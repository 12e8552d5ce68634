"""Cases in which each side waits for the other: interim answers, streams, early answers, connections kept."""

import gzip
import zlib
from collections.abc import Iterator, Sequence

from tests.walk.wire.answers import EVENTS, JSON, USAGE
from tests.walk.wire.case import (
    ALL,
    BUFFERED,
    CHAT,
    HELLO,
    METERED,
    PLAIN,
    Case,
    answer,
    answer_chunked,
    ask,
    chat,
    chunk,
    chunked,
    once,
)
from tests.walk.wire.stage import Answers, Arrives, Asks, Closes, Directly, Gets, Line

GET = ask()
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\nlink: </b.js>\r\n\r\n"
PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"
STREAM = answer(EVENTS, b"Cache-Control: no-cache", b"Transfer-Encoding: chunked", body=None)
TOKENS = tuple(
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"}}]}\n\n' % word
    for word in (b"one", b"two", b"three")
)
LAST_EVENTS = (b"data: " + USAGE + b"\n\n", b"data: [DONE]\n\n")


def cases() -> Iterator[Case]:
    yield from _expecting()
    yield from _interim()
    yield from _streams()
    yield from _chunks()
    yield from _early()
    yield from _kept()


def _expecting() -> Iterator[Case]:
    """A client that waits for 100 before it sends its body (RFC 9110 §10.1.1)."""
    head = ask(b"POST", b"/chat", b"Content-Type: application/json", b"Expect: 100-continue", body=CHAT)[: -len(CHAT)]
    ended: tuple[Line, ...] = (Arrives(), Answers(answer()), Gets())
    asked_for = (Asks(head), Arrives(b"\r\n\r\n"), Answers(CONTINUE), Gets(b"100 Continue\r\n\r\n"))
    yield Case("expect: the upstream asks for the body", (*asked_for, Asks(CHAT), *ended), (PLAIN, METERED))
    asked_for = (
        Asks(head),
        Arrives(b"\r\n\r\n"),
        Answers(b"HTTP/1.1 100 Go on\r\nX-Odd: 1\r\n\r\n"),
        Gets(b"Odd: 1\r\n\r\n"),
    )
    yield Case("expect: in words of its own", (*asked_for, Asks(CHAT), *ended))
    chunked_head = ask(b"POST", b"/x", b"expect: 100-Continue", b"Transfer-Encoding: chunked")
    asked_for = (Asks(chunked_head), Arrives(b"\r\n\r\n"), Answers(CONTINUE), Gets(b"100 Continue\r\n\r\n"))
    yield Case("expect: a body in chunks", (*asked_for, Asks(chunked(b"hello")), *ended))
    yield Case("expect: the client does not wait", (Asks(head + CHAT), Arrives(), Answers(CONTINUE), *ended[1:]))
    refused = answer(JSON, status=413, reason=b"Too much", body=b"{}")
    yield Case(
        "expect: the upstream answers instead", (Asks(head), Arrives(b"\r\n\r\n"), Answers(refused), Closes(), Gets())
    )
    yield Case("expect: no body after all", once(ask(b"GET", b"/x", b"Expect: 100-continue")))
    # Where the gateway must know the body before it may forward anything, it asks for it itself.
    by_itself = (Asks(head), Directly((Arrives(b"\r\n\r\n"), Answers(CONTINUE))), Gets(b"100 Continue\r\n\r\n"))
    yield Case("expect: the gateway asks for the body", (*by_itself, Asks(CHAT), *ended), (BUFFERED,))


def _interim() -> Iterator[Case]:
    """1xx answers before the final one."""
    for name, said in {
        "102": PROCESSING,
        "103": HINTS,
        "110 of its own": b"HTTP/1.1 110 Soon\r\nX-A: \xe9\r\n\r\n",
    }.items():
        marker = said[-12:]
        lines = (Asks(chat()), Arrives(), Answers(said), Gets(marker), Answers(answer()), Gets())
        yield Case(f"interim: {name}", lines, ALL)
    several = (HINTS, PROCESSING, HINTS)
    steps = tuple(line for said in several for line in (Answers(said), Gets(said[-8:])))
    yield Case(
        "interim: several, one by one", (Asks(GET), Arrives(), *steps, Answers(answer()), Gets()), (PLAIN, METERED)
    )
    yield Case(
        "interim: several and the answer in one packet", once(GET, b"".join(several) + answer()), (PLAIN, METERED)
    )
    yield Case("interim: before a stream", once(GET, HINTS + answer_chunked(b"a", b"b")))
    yield Case("interim: before HEAD's answer", once(ask(b"HEAD"), HINTS + answer(b"Content-Length: 9", body=None)))
    yield Case("interim: before 304", once(GET, HINTS + answer(status=304, reason=b"Not Modified", body=None)))
    odd = b"HTTP/1.1 103\r\nX-Odd:1\r\nConnection: x-gone\r\nX-Gone: 1\r\nX-Request-Id: theirs\r\n\r\n"
    yield Case("interim: with odd fields", once(GET, odd + answer()))


def _in_lock_step(request: bytes, head: bytes, events: Sequence[bytes], markers: Sequence[bytes]) -> tuple[Line, ...]:
    """No event is sent before the client has the one before it."""
    steps = tuple(
        line for event, marker in zip(events, markers, strict=True) for line in (Answers(chunk(event)), Gets(marker))
    )
    return (Asks(request), Arrives(), Answers(head), Gets(b"\r\n\r\n"), *steps, Answers(chunked()), Gets())


def _streams() -> Iterator[Case]:
    """Event streams: each event reaches the client before the next one is sent."""
    events = (*TOKENS, *LAST_EVENTS)
    stream = chat(b"Accept: text/event-stream")
    yield Case("events: one by one", _in_lock_step(stream, STREAM, events, events), ALL)
    odd = (
        b": keepalive\n\n",
        b"event: ping\r\ndata: {}\r\n\r\n",
        b"data: a\rdata: b\r\r",
        b"id: 1\nretry: 5\ndata\n\n",
        b"\n",
    )
    yield Case("events: comments, line breaks, fields", _in_lock_step(stream, STREAM, odd, odd), ALL)
    halves = (b"data: ha", b"lf\n", b"\n", b"da", b"ta: \xe2", b"\x82\xac\n\n")
    yield Case("events: cut anywhere", _in_lock_step(stream, STREAM, halves, halves), ALL)
    several = (TOKENS[0] + TOKENS[1], TOKENS[2] + LAST_EVENTS[0] + LAST_EVENTS[1])
    yield Case("events: several in a chunk", _in_lock_step(stream, STREAM, several, several), ALL)
    yield Case("events: all in one packet", once(stream, STREAM + chunked(*events)), ALL)
    yield Case("events: many", _in_lock_step(stream, STREAM, TOKENS * 20, TOKENS * 20), (METERED,))
    for name, pack in {
        "gzip": zlib.compressobj(9, zlib.DEFLATED, 31),
        "deflate": zlib.compressobj(),
    }.items():
        packed = tuple(pack.compress(event) + pack.flush(zlib.Z_SYNC_FLUSH) for event in events)
        head = STREAM[:-2] + b"Content-Encoding: " + name.encode() + b"\r\n\r\n"
        yield Case(f"events: {name}, one by one", _in_lock_step(stream, head, packed, packed), ALL)
    head = STREAM[:-2] + b"Content-Encoding: br\r\n\r\n"
    yield Case(
        "events: a coding nobody here reads",
        _in_lock_step(stream, head, (b"\x8b", b"\x00\x01"), (b"\x8b", b"\x00\x01")),
        ALL,
    )
    yield Case(
        "events: gzip in one packet",
        once(
            stream, STREAM[:-2] + b"Content-Encoding: gzip\r\n\r\n" + chunked(gzip.compress(b"".join(events), mtime=0))
        ),
        ALL,
    )
    until_closed = answer(EVENTS, body=None)
    steps = tuple(line for event in events for line in (Answers(event), Gets(event)))
    yield Case(
        "events: until closed",
        (Asks(stream), Arrives(), Answers(until_closed), Gets(b"\r\n\r\n"), *steps, Closes(), Gets()),
        ALL,
        in_parts=True,
    )
    failing = (TOKENS[0], b'data: {"error":{"message":"overloaded"}}\n\n')
    yield Case("events: an error in the stream", _in_lock_step(stream, STREAM, failing, failing), ALL)
    refused = answer(EVENTS, b"Transfer-Encoding: chunked", status=400, reason=b"No", body=None)
    yield Case("events: with a status of 400", _in_lock_step(stream, refused, events[:2], events[:2]), ALL)


def _chunks() -> Iterator[Case]:
    """Where a chunk is not what arrives."""
    head = answer(b"Transfer-Encoding: chunked", body=None)
    asked: tuple[Line, ...] = (Asks(chat()), Arrives())
    said: tuple[Line, ...]
    yield Case("chunks: one by one", _in_lock_step(chat(), head, (b"a", b"bc", b"d"), (b"\r\na", b"bc", b"d")), ALL)
    said = (Answers(head + b"6\r\nab"), Gets(b"ab"), Answers(b"cd"), Gets(b"cd"), Answers(b"ef\r\n0\r\n\r\n"), Gets())
    yield Case("chunks: one in several packets", (*asked, *said), ALL, in_parts=True)
    said = (Answers(head + b"2\r\nab\r\n3\r\nc"), Gets(b"c"), Answers(b"de\r\n1\r\nf\r\n0\r\n\r\n"), Gets())
    yield Case("chunks: packets across chunks", (*asked, *said), ALL, in_parts=True)
    split = (Answers(head), Gets(b"\r\n\r\n"), Answers(b"5"), Answers(b"\r"), Answers(b"\nhello"), Gets(b"hello"))
    ended = (Answers(b"\r"), Answers(b"\n0\r\n"), Answers(b"\r\n"), Gets())
    yield Case("chunks: framing in pieces", (*asked, *split, *ended), ALL)
    yield Case("chunks: one of 300 KiB", once(GET, answer_chunked(b"c" * 300_000)), (PLAIN, METERED), in_parts=True)
    two = (b"c" * 100_000, b"d" * 100_000, b"e")
    yield Case("chunks: several of 100 KiB", once(GET, answer_chunked(*two)), (PLAIN, METERED), in_parts=True)
    tail = (Answers(b"0\r\nX-A: 1\r\n"), Answers(b"X-B: 2\r\n\r\n"), Gets())
    yield Case("chunks: trailers in steps", (*asked, Answers(head + chunk(b"a")), Gets(b"\r\na"), *tail), ALL)


def _early() -> Iterator[Case]:
    """The upstream answers while the request is still being sent."""
    head = ask(b"POST", b"/x", b"Content-Length: 1000000")
    refusal = answer(status=413, reason=b"Enough", body=b"enough")
    yield Case(
        "early: an error, then closed",
        (Asks(head + b"part"), Arrives(b"part"), Answers(refusal), Closes(), Gets()),
        (PLAIN, METERED),
    )
    in_chunks = ask(b"POST", b"/x", b"Transfer-Encoding: chunked") + chunk(b"part")
    yield Case(
        "early: an error to a body in chunks",
        (Asks(in_chunks), Arrives(b"part\r\n"), Answers(refusal), Closes(), Gets()),
    )
    head = ask(b"POST", b"/x", b"Content-Length: 6")
    begun = answer(b"Transfer-Encoding: chunked", body=None)
    yield Case(
        "early: an answer beside the request",
        (
            *(Asks(head), Asks(b"ab"), Arrives(b"ab"), Answers(begun + chunk(b"AB")), Gets(b"AB")),
            *(Asks(b"cd"), Arrives(b"cd"), Answers(chunk(b"CD")), Gets(b"CD")),
            *(Asks(b"ef"), Arrives(), Answers(chunk(b"EF") + chunked()), Gets()),
        ),
        (PLAIN, METERED),
    )
    in_chunks = ask(b"POST", b"/x", b"Transfer-Encoding: chunked")
    yield Case(
        "early: an answer beside a body in chunks",
        (
            *(Asks(in_chunks + chunk(b"ab")), Arrives(b"ab\r\n"), Answers(begun + chunk(b"AB")), Gets(b"AB")),
            *(Asks(chunk(b"cd")), Arrives(b"cd\r\n"), Answers(chunk(b"CD")), Gets(b"CD")),
            *(Asks(chunked()), Arrives(), Answers(chunked()), Gets()),
        ),
    )


def _kept() -> Iterator[Case]:
    """Several requests on one connection."""
    three = tuple(
        line for at in range(3) for line in once(ask(b"GET", b"/x", b"X-Number: %d" % at), answer(b"X-Number: %d" % at))
    )
    yield Case("kept: three requests", three, (PLAIN, METERED))
    mixed = (
        *once(chat(b"X-First: 1"), answer_chunked(b"a", b"b")),
        *once(ask(b"HEAD"), answer(b"Content-Length: 7", body=None)),
        *once(ask(b"GET", b"/x"), answer(status=304, reason=b"Not Modified", body=None)),
        *once(ask_put := ask(b"PUT", b"/x", body=b"p"), answer(status=204, reason=b"No Content", body=None)),
        *once(chat(), STREAM + chunked(*TOKENS)),
        *once(ask_put, HINTS + answer()),
    )
    yield Case("kept: six requests of many kinds", mixed, (PLAIN,))
    chats = tuple(line for at in range(3) for line in once(chat(b"X-Number: %d" % at), answer(JSON, body=USAGE)))
    yield Case("kept: three chats", chats, ALL)
    closing = (*once(GET), Asks(ask(b"GET", b"/y", b"Connection: close")), Arrives(), Answers(HELLO), Closes(), Gets())
    yield Case("kept: the second closes", closing)
    two = (ask(b"GET", b"/first"), ask(b"GET", b"/second", b"X-Second: 1"))
    yield Case(
        "pipelined: two",
        (
            Asks(b"".join(two)),
            Arrives(),
            Answers(answer(body=b"1")),
            Gets(),
            Arrives(),
            Answers(answer(body=b"2")),
            Gets(),
        ),
        (PLAIN, METERED),
    )
    many = b"".join(ask(b"GET", b"/%d" % at) for at in range(8))
    answered = tuple(line for at in range(8) for line in (Arrives(), Answers(answer(body=b"%d" % at)), Gets()))
    yield Case("pipelined: eight", (Asks(many), *answered))
    posts = chat(b"X-First: 1") + chat(b"X-Second: 1") + GET
    answered = (
        *(Arrives(), Answers(answer_chunked(b"a")), Gets(), Arrives(), Answers(answer(body=b"b")), Gets()),
        *(Arrives(), Answers(answer(body=b"c")), Gets()),
    )
    yield Case("pipelined: with bodies", (Asks(posts), *answered), (PLAIN, METERED))
    unneeded = b"\r\n" + GET
    yield Case("kept: an empty line between requests", (*once(GET), *once(unneeded)))

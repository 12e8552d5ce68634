"""The reading of answers, in memory: against a reader written down from the grammar, and however the bytes arrive.

`strictly` below is RFC 9112 as regular expressions. Whatever it refuses has to be refused; whatever both accept has to
mean the same: status, fields, content, trailers, where it ends and whether another answer may follow.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import pytest

from gateway.upstream.framing import Fields
from gateway.upstream.request import Outgoing
from gateway.upstream.response import Incoming

HEAD_BYTES_MAX = 4_096
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@dataclass
class Reading:
    """What came of an answer."""

    broken: bool = False
    #: The bytes are not all of it yet.
    unfinished: bool = False
    status: int = 0
    reason: bytes = b""
    headers: Fields = field(default_factory=list)
    interims: list[tuple[int, bytes, Fields]] = field(default_factory=list)
    framing: str = ""
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    keep_alive: bool = False
    after_switch: bytes | None = None


def read(data: bytes, cuts: Sequence[int] = (), *, head_only: bool = False, upgrade: bytes = b"websocket") -> Reading:
    """`data` as `Incoming` reads it when it arrives in reads that end at `cuts`, and then the end of the stream."""
    incoming = Incoming(Outgoing(b"", b"", None, True, head_only, False, upgrade, ()), HEAD_BYTES_MAX)
    reading = Reading()
    ends = [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    start = 0
    try:
        for end in ends:
            if start == end:
                continue
            if incoming.switched:
                incoming.early += data[start:end]  # the tunnel's business
            else:
                incoming.feed(data[start:end])
            start = end
        reading.unfinished = not incoming.switched and not incoming.end()
    except httpx.RemoteProtocolError:
        reading.broken = True
    reading.interims = incoming.interims
    if incoming.answered:
        reading.status, reading.reason, reading.headers = incoming.status, incoming.reason, incoming.headers
        reading.framing, reading.body = incoming.framing, b"".join(incoming.parts)
    if not reading.broken and not reading.unfinished:
        reading.trailers, reading.keep_alive = incoming.trailers, incoming.keep_alive
        reading.after_switch = incoming.early if incoming.switched else None
    return reading


# -- the reader written down from the grammar --------------------------------------------------------------------

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: ([\t \x21-\x7e\x80-\xff]*))?\r\n")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t \x21-\x7e\x80-\xff]*)\r\n")
#: Extensions go no further, so all that matters of them is where they end.
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)(?:;[\t \x21-\x7e\x80-\xff]*)?\r\n")


class Refused(Exception):
    pass


class Short(Exception):
    pass


def _matched(pattern: re.Pattern[bytes], data: bytes, at: int) -> re.Match[bytes]:
    match = pattern.match(data, at)
    if match is None:
        raise Refused if b"\r\n" in data[at:] else Short
    return match


def _fields(data: bytes, at: int) -> tuple[Fields, int]:
    fields: Fields = []
    while not data.startswith(b"\r\n", at):
        match = _matched(_FIELD, data, at)
        fields.append((match[1], match[2]))
        at = match.end()
    return fields, at + 2


def _values(fields: Fields, name: bytes) -> list[bytes]:
    return [value.strip(b" \t").lower() for key, value in fields if key.lower() == name]


def _members(fields: Fields, name: bytes) -> set[bytes]:
    return {member.strip() for value in _values(fields, name) for member in value.split(b",")} - {b""}


def strictly(data: bytes, *, head_only: bool = False, upgrade: bytes = b"websocket") -> Reading:
    reading = Reading()
    try:
        _strictly(data, reading, head_only, upgrade)
    except Refused:
        reading.broken = True
    except Short:
        reading.unfinished = True
        reading.keep_alive = False
    return reading


def _strictly(data: bytes, reading: Reading, head_only: bool, upgrade: bytes) -> None:
    at = 0
    while True:
        match = _matched(_STATUS_LINE, data, at)
        fields, at = _fields(data, match.end())
        status, reason, old = int(match[2]), match[3] or b"", match[1] == b"0"
        lengths, codings = _values(fields, b"content-length"), _values(fields, b"transfer-encoding")
        options = _members(fields, b"connection")
        if status < 100 or (lengths and codings) or len(lengths) > 1 or len(codings) > 1:
            raise Refused
        if any(not re.fullmatch(rb"[0-9]{1,18}", length) for length in lengths):
            raise Refused
        if codings and (codings != [b"chunked"] or old):
            raise Refused
        if status == 101 or status > 199:
            break
        if codings or lengths not in ([], [b"0"]):
            raise Refused
        reading.interims.append((status, reason, [pair for pair in fields if pair[0].lower() != b"content-length"]))
    reading.status, reading.reason, reading.headers = status, reason, fields
    if status == 101:
        chosen = _members(fields, b"upgrade")
        if lengths or codings or b"upgrade" not in options or not chosen or chosen - {upgrade}:
            raise Refused
        reading.after_switch = data[at:]
        reading.framing = "none"
        return
    reading.keep_alive = b"close" not in options and (not old or b"keep-alive" in options)
    length = int(lengths[0]) if lengths else 0
    if head_only or status in (204, 304):
        reading.framing = "none"
        if status == 204 and (length or codings):
            reading.keep_alive = False
    elif codings:
        reading.framing = "chunked"
        at = _chunks(data, at, reading)
    elif lengths:
        reading.framing = "length"
        reading.body = data[at : at + length]
        at += length
        if at > len(data):
            raise Short
    else:
        reading.framing = "close"
        reading.body = data[at:]
        reading.keep_alive = False
        return
    if at != len(data):
        reading.keep_alive = False


def _chunks(data: bytes, at: int, reading: Reading) -> int:
    while True:
        match = _matched(_CHUNK, data, at)
        size, at = int(match[1], 16), match.end()
        if size >= 1 << 64:
            raise Refused
        if size == 0:
            break
        reading.body += data[at : at + size]
        at += size
        if len(data) < at + 2:
            if data[at:] not in (b"", b"\r"):
                raise Refused
            raise Short
        if data[at : at + 2] != b"\r\n":
            raise Refused
        at += 2
    trailers, at = _fields(data, at)
    if _values(trailers, b"content-length") or _values(trailers, b"transfer-encoding"):
        raise Refused
    reading.trailers = trailers
    return at


# -- what is compared --------------------------------------------------------------------------------------------

ANSWERS = [
    OK,
    b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nold",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil close",
    b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK,
    CHUNKS + b'5\r\nhello\r\n6;x=y;z="q\\""\r\n world\r\n0\r\n\r\n',
    CHUNKS + b"1\r\na\r\n000\r\nX-Trailer: t\r\nY: u\r\n\r\n",
    SWITCH + b"\x81\x02hi",
]
#: Bytes and runs of bytes that parsers have disagreed about.
TRICKS = [
    *(bytes([byte]) for byte in b'\r\n\0\t\x0b\x0c\x1f\x7f\x80\xff :;,"\\0xX-+_aA9f'),
    *(
        b"\r\n",
        b"\n\r",
        b"\r\r\n",
        b"\r\n\r\n",
        b"\r\n ",
        b"\r\n\t",
        b"0\r\n\r\n",
        b"Content-Length: 1\r\n",
        b"HTTP/1.1 ",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Connection: close\r\n",
        b", chunked",
        b"1.0",
    ),
]


def edited(data: bytes, edits: Sequence[tuple[float, int, bytes]]) -> bytes:
    """`data` with tricks in the place of some of its bytes."""
    for place, removed, trick in edits:
        at = round(place * len(data))
        data = data[:at] + trick + data[at + removed :]
    return data


def same(ours: Reading, strict: Reading, answer: bytes) -> None:
    """We are never more lenient than the grammar, and never understand something else."""
    if ours.broken or (ours.unfinished and strict.broken):
        return  # both are errors in the end
    assert not strict.broken, f"accepted what the grammar refuses: {answer!r}"
    assert ours == strict, answer


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_mean_what_the_grammar_says(answer: bytes) -> None:
    assert read(answer) == strictly(answer)
    assert not read(answer).broken
    for end in range(len(answer)):
        same(read(answer[:end]), strictly(answer[:end]), answer[:end])


def tampered(rng: random.Random) -> bytes:
    edits = [(rng.random(), rng.randrange(4), rng.choice(TRICKS)) for _ in range(rng.randint(1, 3))]
    return edited(rng.choice(ANSWERS), edits)


def test_tampered_answers_are_refused_or_mean_what_the_grammar_says(full: bool) -> None:
    rng = random.Random(1)
    accepted = 0
    for _ in range(300_000 if full else 6_000):
        answer, head_only = tampered(rng), rng.random() < 0.2
        ours = read(answer, head_only=head_only)
        same(ours, strictly(answer, head_only=head_only), answer)
        accepted += not ours.broken
    assert accepted > 500, "hardly anything was compared"


def test_how_the_bytes_arrive_changes_nothing(full: bool) -> None:
    rng = random.Random(2)
    for _ in range(100_000 if full else 2_000):
        answer = tampered(rng)
        whole = read(answer)
        cuts = [rng.randrange(1, 160) for _ in range(rng.randrange(8))]
        assert read(answer, cuts) == whole, (answer, cuts)
        assert read(answer, range(len(answer))) == whole, answer


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_single_cut_reads_the_same(answer: bytes) -> None:
    whole = read(answer)
    for cut in range(1, len(answer)):
        assert read(answer, [cut]) == whole


# -- refusals, each for its own reason ---------------------------------------------------------------------------

HEADS = {
    "HTTP/0.9": b"<html>hello</html>",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 settings": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "version 0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "version 1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "version 2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "another protocol": b"RTSP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "icecast": b"ICE/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "lower case": b"http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "empty line first": b"\r\n" + OK,
    "line feed first": b"\n" + OK,
    "status 000": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "status 099": b"HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
    "two spaces": b"HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok",
    "NUL in the reason": b"HTTP/1.1 200 O\0K\r\nContent-Length: 2\r\n\r\nok",
    "escape in the reason": b"HTTP/1.1 200 \x1b[2J\r\nContent-Length: 2\r\n\r\nok",
    "bare LF after the status": b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok",
    "bare LF after a field": b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 2\r\n\r\nok",
    "bare LF at the end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nok",
    "only bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "bare CR in a value": b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\nok",
    "NUL in a value": b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\nok",
    "obs-fold": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    "space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok",
    "space before the name": b"HTTP/1.1 200 OK\r\n Content-Length: 2\r\n\r\nok",
    "no colon": b"HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nok",
    "no name": b"HTTP/1.1 200 OK\r\n: 2\r\n\r\nok",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "the same length twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    "signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
    "length in hex": b"HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\nok",
    "no length": b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\nok",
    "length of 2^64": b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551618\r\n\r\nok",
    "length beyond signed 64 bits": b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\nok",
    "length, then coding": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
    "coding, then length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok",
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
    "identity": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok",
    "coded, then chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, then coded": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "chunked twice": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two fields": CHUNKS[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then nothing": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "almost chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "quoted": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "chunked and a tab": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\t\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "interim with chunks": b"HTTP/1.1 103 Hints\r\nTransfer-Encoding: chunked\r\n\r\n" + OK,
    "interim with content": b"HTTP/1.1 103 Hints\r\nContent-Length: 40\r\n\r\n" + OK,
    "switch without nomination": b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n",
    "switch to nothing": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\n\r\n",
    "switch to something else": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    "switch with content": SWITCH[:-2] + b"Content-Length: 2\r\n\r\nok",
    "too large": b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES_MAX + b"\r\nContent-Length: 2\r\n\r\nok",
    "too large and unfinished": b"HTTP/1.1 200 OK\r\nX: " + b"x" * HEAD_BYTES_MAX,
    "too many interims": b"HTTP/1.1 100 Continue\r\n\r\n" * (HEAD_BYTES_MAX // 25 + 1) + OK,
}
BODIES = {
    "no number": b"zz\r\nok\r\n0\r\n\r\n",
    "nothing": b"\r\nok\r\n0\r\n\r\n",
    "0x": b"0x2\r\nok\r\n0\r\n\r\n",
    "sign": b"+2\r\nok\r\n0\r\n\r\n",
    "minus": b"-2\r\nok\r\n0\r\n\r\n",
    "underscore": b"0_2\r\nok\r\n0\r\n\r\n",
    "space before": b" 2\r\nok\r\n0\r\n\r\n",
    "space after": b"2 \r\nok\r\n0\r\n\r\n",
    "tab after": b"2\t\r\nok\r\n0\r\n\r\n",
    "size of 2^64": b"10000000000000002\r\nok\r\n0\r\n\r\n",
    "bare LF after the size": b"2\nok\r\n0\r\n\r\n",
    "bare LF after the data": b"2\r\nok\n0\r\n\r\n",
    "nothing after the data": b"2\r\nok0\r\n\r\n",
    "data longer than its size": b"2\r\nokay\r\n0\r\n\r\n",
    "bare LF in an extension": b"2;a\nok\r\n0\r\n\r\n",
    "bare CR in an extension": b"2;a\rb\r\nok\r\n0\r\n\r\n",
    "line break in quotes": b'2;a="\r\n"\r\nok\r\n0\r\n\r\n',
    "huge extension": b"2;" + b"x" * 2 * HEAD_BYTES_MAX + b"\r\nok\r\n0\r\n\r\n",
    "bare LF at the end": b"2\r\nok\r\n0\r\n\n",
    "folded trailer": b"0\r\nX: a\r\n b\r\n\r\n",
    "length in the trailers": b"0\r\nContent-Length: 2\r\n\r\n",
    "coding in the trailers": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "huge trailer": b"2\r\nok\r\n0\r\nX: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
    "too many trailers": b"2\r\nok\r\n0\r\n" + b"X: y\r\n" * (HEAD_BYTES_MAX // 6 + 1) + b"\r\n",
}


@pytest.mark.parametrize("arriving", ["at once", "in bytes"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_lies_is_refused(name: str, arriving: str) -> None:
    answer = HEADS[name]
    reading = read(answer, range(len(answer)) if arriving == "in bytes" else ())
    assert reading.broken
    assert reading.status == 0


@pytest.mark.parametrize("arriving", ["at once", "in bytes"])
@pytest.mark.parametrize("name", BODIES)
def test_chunks_that_lie_are_refused(name: str, arriving: str) -> None:
    answer = CHUNKS + BODIES[name]
    reading = read(answer, range(len(answer)) if arriving == "in bytes" else ())
    assert reading.broken or name == "huge extension" and arriving == "at once"
    assert reading.body in (b"", b"ok")


@pytest.mark.parametrize(
    "answer",
    [OK, CHUNKS + b"2\r\nok\r\n0\r\n\r\n", CHUNKS + b"0\r\nX: y\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n"],
)
@pytest.mark.parametrize(
    "after",
    [b"x", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\r\r\n\r\n", b"0\r\n\r\n", OK, OK[:9], b"HTTP/1.1 200\r\n\r\n"],
)
def test_nothing_follows_an_answer_with_bytes_behind_it(answer: bytes, after: bytes) -> None:
    clean = read(answer)
    assert clean.keep_alive
    for cuts in ([], [len(answer)], [len(answer) - 1], [len(answer) + 1], range(len(answer + after))):
        reading = read(answer + after, cuts)
        assert not reading.keep_alive, "the bytes behind it would be taken for the next answer"
        reading.keep_alive = True
        assert reading == clean

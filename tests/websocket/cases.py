"""The case families of the Autobahn testsuite as streams of bytes: what a client sends, valid or not.

    1 framing   2 pings and pongs   3 reserved bits   4 opcodes   5 fragmentation   6 UTF-8
    7 closing   9 limits   10 fragments by the hundred   12, 13 compression

A transcript is everything a server says to such a stream, and how its connection ends.
"""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame, Opcode

from tests.websocket.ends import BINARY, CONTINUATION, PING, PONG, TEXT, close, frame

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
STAR = b"*"
SIZES = (0, 125, 126, 127, 128, 65_535, 65_536)


@dataclass(frozen=True)
class Case:
    name: str
    #: Written one after the other.
    stream: Sequence[bytes]
    #: Each write is cut into pieces of this size; 0 leaves it whole.
    chop: int = 0
    extensions: str = ""


@dataclass(frozen=True)
class Transcript:
    head: bytes
    frames: bytes
    #: `end`, or `reset`.
    ended: str

    def differs_from(self, other: "Transcript") -> str:
        """Where, in few words; empty when they are the same."""
        if self.head != other.head:
            return f"{self.head!r} is not {other.head!r}"
        return self.body_differs_from(other)

    def body_differs_from(self, other: "Transcript") -> str:
        """The same for what comes behind the heads."""
        if (self.frames, self.ended) == (other.frames, other.ended):
            return ""
        pairs = enumerate(zip(self.frames, other.frames, strict=False))
        at = next((at for at, (mine, its) in pairs if mine != its), min(len(self.frames), len(other.frames)))
        mine, its = self.frames[at : at + 40], other.frames[at : at + 40]
        return (
            f"at {at} of {len(self.frames)}, {len(other.frames)}: {mine!r} is not {its!r}, {self.ended}, {other.ended}"
        )


async def play(case: Case, address: str, path: str, fields: Mapping[str, str]) -> Transcript:
    """What the server at `address` says to the case."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        more = {"Sec-WebSocket-Extensions": case.extensions} if case.extensions else {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in {**fields, **more}.items())
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n{lines}\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        hearing = asyncio.create_task(_hear(reader))
        try:
            for data in case.stream:
                for begin in range(0, len(data), case.chop or max(1, len(data))):
                    writer.write(data[begin : begin + case.chop] if case.chop else data)
                    await writer.drain()
        except ConnectionError:
            pass  # it has heard enough; what it said is in the transcript
        frames, ended = await asyncio.wait_for(hearing, 60)
        return Transcript(head, frames, ended)
    finally:
        writer.transport.abort()


async def _hear(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    heard = bytearray()
    try:
        while data := await reader.read(65536):
            heard += data
    except ConnectionError:
        return bytes(heard), "reset"
    return bytes(heard), "end"


def cases(full: bool) -> Iterator[Case]:
    """Every stream ends with a Close, so that its transcript does. full: also those that take their time."""
    yield from _framing()
    yield from _pings()
    yield from _reserved()
    yield from _fragmentation()
    yield from _utf8()
    yield from _closing()
    yield from _limits(full)
    yield from _compression(full)


def _framing() -> Iterator[Case]:
    for opcode, size in itertools.product((TEXT, BINARY), SIZES):
        yield Case(f"1.{opcode}-{size}", [frame(opcode, STAR * size), close()])
    for opcode in (TEXT, BINARY):
        yield Case(f"1.{opcode}-chopped", [frame(opcode, STAR * 65_536) + close()], chop=997)
        yield Case(f"1.{opcode}-wide", [frame(opcode, b"x" * 5, wide=8), frame(opcode, b"y" * 5, wide=2), close()])


def _pings() -> Iterator[Case]:
    for name, payload in {"empty": b"", "text": b"Hello", "binary": b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff"}.items():
        yield Case(f"2-ping-{name}", [frame(PING, payload), close()])
    for size in (125, 126):
        yield Case(f"2-ping-{size}", [frame(PING, b"\xfe" * size), close()])
        yield Case(f"2-ping-{size}-octets", [frame(PING, b"\xfe" * size), close()], chop=1)
    yield Case("2-pong", [frame(PONG), close()])
    yield Case("2-pong-unsolicited", [frame(PONG, b"unsolicited"), frame(PING, b"ping"), close()])
    pings = [frame(PING, b"payload-%d" % number) for number in range(10)]
    yield Case("2-ten-pings", [*pings, close()])
    yield Case("2-ten-pings-octets", [*pings, close()], chop=1)


def _reserved() -> Iterator[Case]:
    for rsv in range(1, 8):
        yield Case(f"3-text-rsv{rsv}", [frame(TEXT, b"Hello", rsv=rsv), close()])
        yield Case(f"3-second-rsv{rsv}", [frame(TEXT, b"Hello"), frame(TEXT, b"Hello", rsv=rsv), frame(PING), close()])
        yield Case(f"3-octets-rsv{rsv}", [frame(BINARY, b"Hello", rsv=rsv), frame(PING), close()], chop=1)
        yield Case(f"3-ping-rsv{rsv}", [frame(PING, b"Hello", rsv=rsv), close()])
        yield Case(f"3-close-rsv{rsv}", [frame(8, b"\x03\xe8", rsv=rsv), close()])
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield Case(f"4-{opcode}", [frame(opcode), close()])
        yield Case(f"4-{opcode}-payload", [frame(opcode, b"reserved"), close()])
        yield Case(f"4-{opcode}-second", [frame(TEXT, b"Hello"), frame(opcode, b"reserved"), frame(PING), close()])
        yield Case(f"4-{opcode}-octets", [frame(TEXT, b"Hello"), frame(opcode), frame(PING), close()], chop=1)
    yield Case("4-unmasked", [frame(TEXT, b"Hello", key=None), close()])


def _fragmentation() -> Iterator[Case]:
    begin = frame(TEXT, b"fragment1", fin=False)
    more, last = frame(CONTINUATION, b"fragment2", fin=False), frame(CONTINUATION, b"fragment3")
    ping = frame(PING, b"between")
    streams = {
        "ping": [frame(PING, b"a", fin=False), frame(CONTINUATION, b"b")],
        "pong": [frame(PONG, b"a", fin=False), frame(CONTINUATION, b"b")],
        "text": [begin, last],
        "text-3": [begin, more, last],
        "text-empty": [frame(TEXT, fin=False), frame(CONTINUATION, fin=False), frame(CONTINUATION)],
        "text-middle": [frame(TEXT, fin=False), more, frame(CONTINUATION)],
        "ping-between": [begin, ping, last],
        "pings-between": [begin, ping, more, ping, ping, last, ping],
        "pong-between": [begin, frame(PONG, b"unsolicited"), last],
        "continuation-first": [last, frame(TEXT, b"Hello")],
        "continuation-first-open": [more, frame(TEXT, b"Hello")],
        "continuation-after-whole": [frame(TEXT, b"Hello"), last],
        "continuation-after-whole-open": [frame(TEXT, b"Hello"), more, last],
        "two-begun": [begin, frame(TEXT, b"another")],
        "two-begun-open": [begin, frame(BINARY, b"another", fin=False), last],
        "binary-then-text": [frame(BINARY, b"\x00", fin=False), last, begin, last],
        "close-between": [begin, close(1000), last],
        "begun-only": [begin],
    }
    for name, stream in streams.items():
        yield Case(f"5-{name}", [*stream, close()])
        yield Case(f"5-{name}-at-once", [b"".join([*stream, close()])])
        yield Case(f"5-{name}-octets", [*stream, close()], chop=1)


VALID = (
    "Hello-µ@ßöäüàá-UTF-8!!", "κόσμε", "\x00", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff",
    "\U00010000", "\U0010ffff", "\ufffd", "\ufeff", "日本語", "\u200b\u2060", "",
)  # fmt: skip
INVALID = (
    b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited", b"\x80", b"\xbf", b"\x80\xbf\x80\xbf",
    b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf", b"\xfc\x80\x80\x80\x80\xaf",
    b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80",
    b"\xf4\x90\x80\x80", b"\xf7\xbf\xbf\xbf", b"\xfe", b"\xff",
    b"\xfe\xfe\xff\xff", b"\xce", b"\xe1\xbd", b"\xf0\x90\x80",
    b"\xc3\x28", b"\xe2\x28\xa1", b"\xf0\x28\x8c\xbc", b"ok\xc0", b"\xc0\x80", b"\xf0\x80\x80\x80",
)  # fmt: skip


def _utf8() -> Iterator[Case]:
    texts = [*(text.encode("utf-8") for text in VALID), *INVALID]
    for number, text in enumerate(texts):
        yield Case(f"6-{number}", [frame(TEXT, text), close()])
        yield Case(f"6-{number}-binary", [frame(BINARY, text), close()])
        octets = [frame(CONTINUATION if at else TEXT, text[at : at + 1], fin=False) for at in range(len(text))]
        if octets:
            yield Case(f"6-{number}-fragments", [*octets, frame(CONTINUATION), close()])
        halves = [frame(TEXT, text[: len(text) // 2], fin=False), frame(CONTINUATION, text[len(text) // 2 :])]
        yield Case(f"6-{number}-halves-octets", [*halves, close()], chop=1)


def _closing() -> Iterator[Case]:
    yield Case("7-after-message", [frame(TEXT, b"Hello"), close()])
    yield Case("7-twice", [close(), close()])
    yield Case("7-then-ping", [close(), frame(PING)])
    yield Case("7-then-text", [close(), frame(TEXT, b"late")])
    yield Case("7-within-message", [frame(TEXT, b"begun", fin=False), close(), frame(CONTINUATION, b"late")])
    yield Case("7-within-large", [frame(TEXT, b"x" * 262_144) + close() + frame(PING)])
    yield Case("7-empty", [close(None)])
    yield Case("7-one-octet", [frame(8, b"\x03")])
    yield Case("7-reason", [close(1000, b"Hello World!")])
    yield Case("7-reason-123", [close(1000, STAR * 123)])
    yield Case("7-reason-124", [close(1000, STAR * 124)])
    yield Case("7-reason-not-utf8", [close(1000, INVALID[0])])
    yield Case("7-fragmented", [frame(8, b"\x03\xe8", fin=False), frame(CONTINUATION, b"x")])
    valid = (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)
    invalid = (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65_535)
    for code in (*valid, *invalid):
        yield Case(f"7-code-{code}", [close(code)])
        yield Case(f"7-code-{code}-octets", [close(code, b"why")], chop=1)


def _limits(full: bool) -> Iterator[Case]:
    for opcode, kib in itertools.product((TEXT, BINARY), (64, 256, *((1024, 4096, 8192, 16_384) if full else ()))):
        yield Case(f"9-{opcode}-{kib}k", [frame(opcode, STAR * (kib << 10)), close()])
    yield Case("10-1300", _fragments(TEXT, 65_536, 1_300))
    yield Case("10-by-7", _fragments(BINARY, 7_000, 7))
    if not full:
        return
    for opcode, size in itertools.product((TEXT, BINARY), (64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)):
        yield Case(f"9-{opcode}-4m-by-{size}", _fragments(opcode, 4 << 20, size))
    for opcode, chop in itertools.product((TEXT, BINARY), (64, 128, 256, 512, 1024, 2048)):
        yield Case(f"9-{opcode}-1m-chopped-{chop}", [frame(opcode, STAR * (1 << 20)), close()], chop=chop)


def _fragments(opcode: int, total: int, size: int) -> list[bytes]:
    edges = range(0, total, size)
    return [
        b"".join(
            frame(CONTINUATION if at else opcode, STAR * min(size, total - at), fin=at + size >= total) for at in edges
        ),
        close(),
    ]


def _compression(full: bool) -> Iterator[Case]:
    """12 and 13: every combination of parameters that a client may ask for, and messages one after the other."""
    offers = {
        "default": ClientPerMessageDeflateFactory(),
        "no-context": ClientPerMessageDeflateFactory(True, True),
        "small-window": ClientPerMessageDeflateFactory(False, False, 9, 9),
        "small-no-context": ClientPerMessageDeflateFactory(True, True, 9, 9),
        "server-no-context": ClientPerMessageDeflateFactory(True, False, None, 12),
    }
    text = "".join(f"{number}: the quick brown fox, die schnelle Füchsin, " for number in range(4_000)).encode()
    binary = bytes((at * at + at // 7) % 251 for at in range(131_072))
    plans = [(size, 20) for size in (16, 64, 256, 1024, 4096, 8192)]
    if full:
        plans += [(size, 300) for size in (16, 64, 256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072)]
    for (name, factory), (size, count) in itertools.product(offers.items(), plans):
        offered = factory.get_request_params()
        line = "; ".join(
            ["permessage-deflate", *(key if value is None else f"{key}={value}" for key, value in offered)]
        )
        for kind, source in (("text", text), ("binary", binary)):
            messages = (_cut(source, number * 37, size, kind == "text") for number in range(count))
            stream = list(_deflated(factory, messages, Opcode.TEXT if kind == "text" else Opcode.BINARY))
            yield Case(f"12-{name}-{kind}-{size}x{count}", [*stream, close()], extensions=line)
    yield Case("12-rsv1-uncompressed", [frame(TEXT, b"Hello", rsv=4), close()], extensions="permessage-deflate")
    yield Case("12-plain", [frame(TEXT, b"Hello"), close()], extensions="permessage-deflate")


def _cut(source: bytes, at: int, size: int, text: bool) -> bytes:
    piece = (source[at % len(source) :] + source)[:size]
    return piece.decode("utf-8", "ignore").encode() if text else piece


def _deflated(factory: ClientPerMessageDeflateFactory, messages: Iterator[bytes], opcode: Opcode) -> Iterator[bytes]:
    window = factory.client_max_window_bits
    deflate = PerMessageDeflate(
        remote_no_context_takeover=False,
        local_no_context_takeover=bool(factory.client_no_context_takeover),
        remote_max_window_bits=15,
        local_max_window_bits=window if isinstance(window, int) and not isinstance(window, bool) else 15,
        compress_settings={"memLevel": 5},
    )
    for message in messages:
        packed = deflate.encode(Frame(opcode, message))
        yield frame(opcode, bytes(packed.data), rsv=4 if packed.rsv1 else 0)

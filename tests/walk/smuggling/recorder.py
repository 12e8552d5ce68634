"""An upstream that keeps every byte it gets, answers what it reads strictly, and reads it all again leniently."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.walk import raw
from tests.walk.raw import Visit

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Z-]+) (/[^\x00-\x20\x7f]*) HTTP/1\.1")
VALUE = re.compile(rb"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")

#: Fields that stand once in a head, and in no trailer.
ONCE = frozenset(
    {b"host", b"content-length", b"transfer-encoding", b"expect", b"x-org-id", b"x-user-id", b"x-request-id"}
)
NEVER = (
    b"upgrade",
    b"http2-settings",
    b"keep-alive",
    b"proxy-connection",
    b"authorization",
    b"x-original-url",
    b"forwarded",
)


class Violation(Exception):
    """What reached the upstream is no HTTP/1.1 of one meaning."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as somebody read it."""

    method: bytes
    target: bytes
    body: bytes
    #: False when the connection ended before the request did.
    complete: bool = True


@dataclass
class Recorder:
    url: str
    #: Every byte of each connection, in the order of the connections.
    connections: list[bytearray] = field(default_factory=list)
    #: What was read strictly, in the order of the requests' heads.
    seen: list[Seen] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def lenient(self, prefer: bytes) -> list[Seen]:
        return [seen for data in self.connections for seen in read_leniently(bytes(data), prefer)]

    def forget(self) -> None:
        """As if nothing had come yet; connections that are kept stay known."""
        for data in self.connections:
            data.clear()
        self.seen.clear()
        self.violations.clear()


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    """Answers every request with 200 and its target; closes where it reads anything that is not strictly right."""
    recorder = Recorder("")

    async def serve(visit: Visit) -> None:
        kept = bytearray()
        recorder.connections.append(kept)
        try:
            while await _exchange(visit, kept, recorder):
                pass
        except Violation as exc:
            recorder.violations.append(f"{exc} in {bytes(kept)!r}")

    async with raw.upstream(serve) as scripted:
        recorder.url = scripted.url
        yield recorder


async def _exchange(visit: Visit, kept: bytearray, recorder: Recorder) -> bool:
    """One request was read strictly and answered. False when the connection ended instead."""

    async def read(size: int) -> bytes:
        data = await visit.reader.readexactly(size)
        kept.extend(data)
        return data

    async def line() -> bytes:
        data = await visit.reader.readuntil(b"\n")
        kept.extend(data)
        if not data.endswith(b"\r\n"):
            raise Violation("a line that ends with a bare LF")
        return data[:-2]

    try:
        lines = [await line()]
        while lines[-1]:
            lines.append(await line())
    except asyncio.IncompleteReadError as exc:
        kept.extend(exc.partial)
        if exc.partial:
            raise Violation("an unfinished head") from exc
        return False
    method, target, fields = _strict_head(lines[:-1])
    place = len(recorder.seen)
    recorder.seen.append(Seen(method, target, b"", complete=False))
    if b"expect" in fields:
        await visit.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    try:
        body = await _strict_body(fields, read, line)
    except asyncio.IncompleteReadError as exc:
        kept.extend(exc.partial)
        return False
    recorder.seen[place] = Seen(method, target, body)
    content = b"" if method == b"HEAD" else b"ok"
    await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Target: %b\r\n\r\n%b" % (len(b"ok"), target, content))
    return True


def _strict_head(lines: list[bytes]) -> tuple[bytes, bytes, dict[bytes, bytes]]:
    """Method, target and fields by their lower-case names. Raises Violation for whatever RFC 9112 does not allow."""
    first = REQUEST_LINE.fullmatch(lines[0])
    if first is None:
        raise Violation(f"the request line {lines[0]!r}")
    fields: dict[bytes, bytes] = {}
    for text in lines[1:]:
        name, colon, value = text.partition(b":")
        value = value.removeprefix(b" ")
        if not colon or TOKEN.fullmatch(name) is None or VALUE.fullmatch(value) is None:
            raise Violation(f"the field line {text!r}")
        # As servers see it that turn names into variables.
        lower = name.lower().replace(b"_", b"-")
        if lower in fields and lower in ONCE:
            raise Violation(f"{lower!r} twice")
        fields[lower] = value
    if b"content-length" in fields and b"transfer-encoding" in fields:
        raise Violation("two framings")
    if b"host" not in fields or fields.get(b"x-org-id") != b"acme":
        raise Violation("no Host, or not the org that was verified")
    for name in NEVER:
        if name in fields and not (name == b"upgrade" and first[2] == b"/ws"):
            raise Violation(f"{name!r} crossed")
    return first[1], first[2], fields


async def _strict_body(
    fields: dict[bytes, bytes], read: Callable[[int], Awaitable[bytes]], line: Callable[[], Awaitable[bytes]]
) -> bytes:
    coding = fields.get(b"transfer-encoding")
    if coding is None:
        length = fields.get(b"content-length", b"0")
        if not re.fullmatch(rb"0|[1-9][0-9]*", length):
            raise Violation(f"the length {length!r}")
        return await read(int(length))
    if coding.lower() != b"chunked":
        raise Violation(f"the coding {coding!r}")
    body = b""
    while True:
        size = await line()
        if not re.fullmatch(rb"[0-9A-Fa-f]+", size):
            raise Violation(f"the chunk size {size!r}")
        if int(size, 16) == 0:
            while text := await line():
                name = text.partition(b":")[0]
                if TOKEN.fullmatch(name) is None or name.lower().replace(b"_", b"-") in ONCE:
                    raise Violation(f"the trailer {text!r}")
            return body
        body += await read(int(size, 16))
        if await read(2) != b"\r\n":
            raise Violation("a chunk longer than its size")


def read_leniently(data: bytes, prefer: bytes) -> list[Seen]:
    """The requests in `data` as a server reads them that takes anything: bare LF and CR end lines, names are compared
    by their letters alone, any value with `chunked` in it means so, any digits are a length.

    prefer: `transfer-encoding` or `content-length`, where both are there.
    """
    found = []
    while True:
        data = data.lstrip(b"\r\n")
        end = re.search(rb"\r*\n\r*\n", data)
        if end is None:
            if data:
                found.append(Seen(b"?", data, b"", complete=False))
            return found
        lines = re.split(rb"\r*\n|\r", data[: end.start()])
        words = lines[0].split()
        rest = data[end.end() :]
        lengths, chunked = [], False
        for text in lines[1:]:
            name, _, value = text.partition(b":")
            letters = re.sub(rb"[^a-z]", b"", name.lower())
            if letters.endswith(b"transferencoding") and b"chunk" in value.lower():
                chunked = True
            elif letters.endswith(b"contentlength") and (digits := re.search(rb"[0-9]+", value)):
                lengths.append(int(digits[0]))
        if chunked and not (lengths and prefer == b"content-length"):
            body, rest, complete = _lenient_chunks(rest)
        else:
            size = lengths[-1] if lengths else 0
            body, rest, complete = rest[:size], rest[size:], len(rest) >= size
        found.append(Seen(words[0], words[1] if len(words) > 1 else b"", body, complete))
        data = rest


def _lenient_chunks(data: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while True:
        text, newline, data = data.partition(b"\n")
        digits = re.match(rb"\s*(?:0[xX])?([0-9A-Fa-f]+)", text)
        if not newline or digits is None:
            return body, b"", False
        size = int(digits[1], 16)
        if size == 0:
            while True:
                text, newline, data = data.partition(b"\n")
                if not newline:
                    return body, b"", False
                if not text.strip():
                    return body, data, True
        body += data[:size]
        if len(data) < size:
            return body, b"", False
        data = re.sub(rb"\A\r?\n", b"", data[size:])

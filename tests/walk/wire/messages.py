"""A transcript cut into messages, without losing a byte: what the differences work on.

Owns a reading of HTTP/1.1 framing (RFC 9112 §6) of its own, so that the proof does not lean on the parser it is about.
It expects well-formed messages; whatever it cannot read is an error of the test.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

CRLF = b"\r\n"
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One request or answer, byte for byte: `raw` puts it together again as it was."""

    #: Request line or status line.
    start: bytes
    #: Field lines as they stood, without their line breaks.
    lines: tuple[bytes, ...]
    #: Everything behind the empty line: body, chunk framing and trailers included.
    body: bytes
    #: An empty line before the start line.
    before: bytes = b""

    @property
    def raw(self) -> bytes:
        return self.before + CRLF.join((self.start, *self.lines, b"", b"")) + self.body

    @property
    def is_answer(self) -> bool:
        return self.start.startswith(b"HTTP/")

    @property
    def status(self) -> int:
        return int(self.start[9:12])

    @property
    def is_interim(self) -> bool:
        return self.is_answer and self.status < 200

    @property
    def method(self) -> bytes:
        return self.start.partition(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.start.partition(b" ")[2].rpartition(b" ")[0]

    @property
    def is_http_1_0(self) -> bool:
        return (self.start[:8] if self.is_answer else self.start[-8:]) == b"HTTP/1.0"

    def values(self, name: bytes) -> list[bytes]:
        """The values of the fields called `name` (lower case), in order."""
        return [value_of(line) for line in self.lines if name_of(line) == name]

    def options(self, name: bytes) -> list[bytes]:
        """The members of a list field, in lower case."""
        return [option.strip().lower() for value in self.values(name) for option in value.split(b",")]

    @property
    def is_chunked(self) -> bool:
        return self.options(b"transfer-encoding")[-1:] == [b"chunked"]

    def keeping(self, keep: Callable[[bytes], bool]) -> "Message":
        """Without the fields whose name (lower case) `keep` does not want."""
        return replace(self, lines=tuple(line for line in self.lines if keep(name_of(line))))

    def adding(self, *lines: bytes) -> "Message":
        return replace(self, lines=(*self.lines, *lines))


def name_of(line: bytes) -> bytes:
    return line.partition(b":")[0].lower()


def value_of(line: bytes) -> bytes:
    return line.partition(b":")[2].strip(b" \t")


@dataclass(frozen=True, slots=True)
class Chunked:
    """A chunked body, taken apart."""

    #: (chunk-size as spelled, chunk-ext with its `;`, data), without the last chunk.
    chunks: tuple[tuple[bytes, bytes, bytes], ...]
    #: Size line of the last chunk, extension included.
    last: bytes
    trailers: tuple[bytes, ...]

    @property
    def raw(self) -> bytes:
        body = b"".join(size + extension + CRLF + data + CRLF for size, extension, data in self.chunks)
        return CRLF.join((body + self.last, *self.trailers, b"", b""))

    @property
    def content(self) -> bytes:
        return b"".join(data for _, _, data in self.chunks)


def chunks_of(body: bytes) -> Chunked:
    found = _chunked(body, 0)
    assert found is not None and found[1] == len(body), body[:200]
    return found[0]


def _chunked(data: bytes | bytearray, at: int) -> tuple[Chunked, int] | None:
    """The chunked body that begins at `at` and where it ends; None while it is not complete."""
    chunks = []
    while True:
        line_end = data.find(CRLF, at)
        if line_end < 0:
            return None
        size, semicolon, rest = bytes(data[at:line_end]).partition(b";")
        length = int(size, 16)
        if not length:
            break
        begin, end = line_end + 2, line_end + 2 + length
        if len(data) < end + 2:
            return None
        chunks.append((size, semicolon + rest, bytes(data[begin:end])))
        at = end + 2
    last, at = bytes(data[at:line_end]), line_end + 2
    trailers: list[bytes] = []
    while True:
        line_end = data.find(CRLF, at)
        if line_end < 0:
            return None
        if line_end == at:
            return Chunked(tuple(chunks), last, tuple(trailers)), at + 2
        trailers.append(bytes(data[at:line_end]))
        at = line_end + 2


def cut(
    data: bytes | bytearray, at: int, *, head_only: bool = False, ended: bool = False
) -> tuple[Message, int] | None:
    """The message that begins at `at` and where it ends; None while it is not complete.

    head_only: it answers HEAD. ended: nothing follows `data`, so an answer without framing is complete.
    """
    before = CRLF if data.startswith(CRLF, at) else b""
    at += len(before)
    head_end = data.find(HEAD_END, at)
    if head_end < 0:
        return None
    start, *lines = bytes(data[at:head_end]).split(CRLF)
    message = Message(start, tuple(lines), b"", before)
    begin = head_end + 4
    end = _end(message, data, begin, head_only, ended)
    return None if end is None else (replace(message, body=bytes(data[begin:end])), end)


def _end(message: Message, data: bytes | bytearray, begin: int, head_only: bool, ended: bool) -> int | None:
    """Where the body that begins at `begin` ends (RFC 9112 §6.3); None while it has not."""
    if message.is_answer and (head_only or message.status < 200 or message.status in (204, 304)):
        return begin
    if message.values(b"transfer-encoding"):
        found = _chunked(data, begin)
        return None if found is None else found[1]
    if lengths := message.values(b"content-length"):
        end = begin + int(lengths[0])
        return end if end <= len(data) else None
    if message.is_answer:
        return len(data) if ended else None
    return begin


def _unfinished(data: bytes) -> Message:
    head, found, body = data.partition(HEAD_END)
    assert found and not head.startswith(b"HTTP/"), f"not a whole message: {data[:300]!r}"
    start, *lines = head.split(CRLF)
    return Message(start, tuple(lines), body)


def messages(data: bytes, methods: Iterable[bytes] = ()) -> list[Message]:
    """All of a whole transcript. methods: those that the answers answer, in order; empty for requests.

    A last request that was never sent to its end is there as far as it came.
    """
    asked = iter(methods)
    found: list[Message] = []
    at = 0
    head_only = next(asked, b"") == b"HEAD"
    while at < len(data):
        one = cut(data, at, head_only=head_only, ended=True)
        message, at = one or (_unfinished(data[at:]), len(data))
        found.append(message)
        if message.is_answer and not message.is_interim:
            head_only = next(asked, b"") == b"HEAD"
    return found

"""What a case of the proof is made of, and the few words that the tables of cases are written in."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.walk.wire.stage import Answers, Arrives, Asks, Closes, Gets, Line

PLAIN, METERED, BUFFERED, CONFIGURED, CAPPED = "plain", "metered", "buffered", "configured", "capped"
#: A request body that the metered and the buffered route can read.
CHAT = b'{"model":"demo-small","messages":[{"role":"user","content":"hello"}]}'
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    dialogue: tuple[Line, ...]
    #: The routes it is played through.
    ways: tuple[str, ...] = (PLAIN,)
    #: Something arrives in parts that the gateway may pass on in parts of its own.
    in_parts: bool = False

    @property
    def closed_directly(self) -> bool:
        """Without a gateway the client's connection ends with the dialogue, because the upstream closes it."""
        return any(isinstance(line, Closes) for line in self.dialogue)

    @property
    def asked(self) -> bytes:
        return b"".join(line.text for line in self.dialogue if isinstance(line, Asks))


def ask(
    method: bytes = b"GET", path: bytes = b"/x", *lines: bytes, body: bytes | None = None, version: bytes = b"1.1"
) -> bytes:
    """A request as most clients write it; with Content-Length when there is a body."""
    head = [b"%b {at}%b HTTP/%b" % (method, path, version), b"Host: shop.example", b"Authorization: Bearer {key}"]
    head += lines
    if body is not None:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join((*head, b"", body or b""))


def ask_chunked(*chunks: bytes, lines: Sequence[bytes] = (), trailers: Sequence[bytes] = ()) -> bytes:
    return ask(b"POST", b"/x", *lines, b"Transfer-Encoding: chunked") + chunked(*chunks, trailers=trailers)


def answer(
    *lines: bytes, status: int = 200, reason: bytes = b"OK", body: bytes | None = b"hello", version: bytes = b"1.1"
) -> bytes:
    """An answer, with Content-Length when there is a body."""
    head = [b"HTTP/%b %d %b" % (version, status, reason), *lines]
    if body is not None:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join((*head, b"", body or b""))


def answer_chunked(*chunks: bytes, lines: Sequence[bytes] = (), trailers: Sequence[bytes] = ()) -> bytes:
    return answer(*lines, b"Transfer-Encoding: chunked", body=None) + chunked(*chunks, trailers=trailers)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def chunked(*chunks: bytes, trailers: Sequence[bytes] = ()) -> bytes:
    return b"".join(map(chunk, chunks)) + b"\r\n".join((b"0", *trailers, b"", b""))


def once(request: bytes, said: bytes = HELLO) -> tuple[Line, ...]:
    """The whole request, then the whole answer."""
    return (Asks(request), Arrives(), Answers(said), Gets())


def once_closed(request: bytes, said: bytes) -> tuple[Line, ...]:
    """The whole request, then the whole answer, whose end is that of the upstream's connection."""
    return (Asks(request), Arrives(), Answers(said), Closes(), Gets())


ALL = (PLAIN, METERED, BUFFERED)


def chat(*lines: bytes, body: bytes = CHAT) -> bytes:
    """A request that every route can read."""
    return ask(b"POST", b"/chat", b"Content-Type: application/json", *lines, body=body)

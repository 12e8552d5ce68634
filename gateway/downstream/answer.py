"""The bytes of an answer: its head, its framing, what stands between the pieces of its body. Pure.

Fields stand as they were given: order, case and duplicates. Added are only `Transfer-Encoding: chunked` when nothing
frames the body and the client speaks HTTP/1.1, and `Connection: close` before a connection that ends. Left out are
Transfer-Encoding towards HTTP/1.0, in 204 and in switching (RFC 9112 §6.1). Nothing given can break out of its line.
"""

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from http import HTTPStatus

from gateway.downstream.request import Field

LAST_CHUNK = b"0\r\n\r\n"

_CRLF = b"\r\n"
_TEXT = bytes(byte for byte in range(256) if byte >= 0x20 and byte != 0x7F) + b"\t"
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STANDARD_LINES = {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode("ascii")) for status in HTTPStatus
}
_FRAMING = frozenset({b"connection", b"content-length", b"transfer-encoding"})


class Framing(Enum):
    """How the client knows where the body ends."""

    LENGTH = auto()
    CHUNKED = auto()
    #: With the connection: HTTP/1.0, and no Content-Length.
    CLOSE = auto()
    #: Nobody does any more: HTTP has ended, and bytes pass as they are.
    RAW = auto()
    #: There is none: HEAD, 204, 304. What the application gives as body is not written.
    NONE = auto()


#: A head without its empty line, how the body is framed, the body's length if that frames it, and whether the head
#: says `Connection: close`. The end of the head is left open: that the connection ends may become known later.
Start = tuple[bytes, Framing, int, bool]


def start(
    status: int, reason: bytes | None, fields: Sequence[Field], *, to_head: bool, chunks_understood: bool
) -> Start:
    """to_head: the request was HEAD. Raises ValueError for what cannot be written as one unambiguous answer."""
    if not 200 <= status <= 999:
        raise ValueError(f"an answer cannot have the status {status}")
    names = [name.lower() for name, _ in fields]
    body_bytes: int | None = None
    is_chunked = says_close = False
    if not _FRAMING.isdisjoint(names):
        body_bytes, is_chunked, says_close = _read_framing(names, fields)
        if is_chunked and (status == 204 or not chunks_understood):
            fields = [field for field in fields if field[0].lower() != b"transfer-encoding"]
    head = _status_line(status, reason) + _field_lines(fields, names)
    if to_head or status == 204 or status == 304:
        return head, Framing.NONE, 0, says_close
    if body_bytes is not None:
        return head, Framing.LENGTH, body_bytes, says_close
    if not chunks_understood:
        return head, Framing.CLOSE, 0, says_close
    if not is_chunked:
        head += b"Transfer-Encoding: chunked\r\n"
    return head, Framing.CHUNKED, 0, says_close


def interim(status: int, reason: bytes | None, fields: Sequence[Field]) -> bytes:
    """A whole 1xx answer. Raises ValueError."""
    if not 100 <= status <= 199 or status == 101:
        raise ValueError(f"an interim answer cannot have the status {status}")
    return _lines(status, reason, fields)


def switch(reason: bytes | None, fields: Sequence[Field]) -> bytes:
    """A whole 101 answer, with exactly these fields. Raises ValueError."""
    return _lines(101, reason, fields)


def refusal(status: int, says: str, *, to_head: bool = False, more: bytes = b"") -> bytes:
    """A whole answer of our own, the last on its connection. more: further fields, each with its CR LF."""
    body = b"" if to_head else says.encode() + b"\n"
    return b"%bContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n%bConnection: close\r\n\r\n%b" % (
        _status_line(status, None),
        len(body),
        more,
        body,
    )


def chunks(pieces: Iterable[bytes]) -> bytes:
    """Each piece as a chunk; empty ones are none, since an empty chunk would be the last."""
    return b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece])


def trailers(fields: Sequence[Field]) -> bytes:
    """The end of a chunked body. Raises ValueError."""
    return b"0\r\n" + _field_lines(fields, [name for name, _ in fields]) + _CRLF


def _read_framing(names: Sequence[bytes], fields: Sequence[Field]) -> tuple[int | None, bool, bool]:
    """The body's length, whether it is chunked, whether the connection closes. names: of `fields`, in lower case."""
    body_bytes: int | None = None
    is_chunked = says_close = False
    for at, name in enumerate(names):
        if name not in _FRAMING:
            continue
        value = fields[at][1]
        if name == b"connection":
            says_close = says_close or b"close" in _options(value)
        elif body_bytes is not None or is_chunked:
            raise ValueError("an answer can be framed in one way only")
        elif name == b"transfer-encoding":
            is_chunked = True
            if value.lower() != b"chunked":
                raise ValueError("the only transfer coding that can be written is chunked")
        else:
            if not value.isdigit() or len(value) > 18:
                raise ValueError("the Content-Length of an answer is not a number")
            body_bytes = int(value)
    return body_bytes, is_chunked, says_close


def _lines(status: int, reason: bytes | None, fields: Sequence[Field]) -> bytes:
    """A whole head without a body."""
    return _status_line(status, reason) + _field_lines(fields, [name for name, _ in fields]) + _CRLF


def _status_line(status: int, reason: bytes | None) -> bytes:
    if reason is None:
        known = _STANDARD_LINES.get(status)
        if known is not None:
            return known
        reason = b""
    elif reason.translate(None, _TEXT):
        raise ValueError("the reason of an answer holds line breaks or control characters")
    return b"HTTP/1.1 %d %b\r\n" % (status, reason)


def _options(value: bytes) -> list[bytes]:
    return [option.strip(b" \t") for option in value.lower().split(b",")]


def _field_lines(fields: Sequence[Field], names: Sequence[bytes]) -> bytes:
    """names: at least those of `fields`, in any case. Raises ValueError when one, or a value, would not stay within
    its line."""
    if b"".join(names).translate(None, _TOKEN) or b"" in names:
        raise ValueError("the name of a field in an answer is not a token")
    lines = b"".join([b"%b: %b\r\n" % (name, value) for name, value in fields])
    if lines.translate(None, _TEXT) != _CRLF * len(fields):
        raise ValueError("the value of a field in an answer holds line breaks or control characters")
    return lines

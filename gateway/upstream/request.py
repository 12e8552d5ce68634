"""An `httpx.Request` as bytes for the wire. Owns framing and what may not be sent; does no I/O.

Header fields go out as given: order, case, duplicates. The only field ever added is the framing of a body that has
none: Content-Length for bytes, Transfer-Encoding for a stream.
"""

from collections.abc import AsyncIterable, Sequence
from typing import NamedTuple

import httpx

#: RFC 9110 §5.6.2; anything else in a name or method would let one request be read as another.
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Bytes that end or split a request line.
_NOT_IN_TARGET = bytes(range(0x21)) + b"\x7f"
#: 10^18 bytes fit an unsigned 64-bit integer with room to spare; a longer number is an attack.
LENGTH_DIGITS_MAX = 18
#: Lengths of the names that matter here: most others are told apart by it, without lower-casing.
_TELLING = frozenset(
    {len("expect"), len("upgrade"), len("connection"), len("content-length"), len("transfer-encoding")}
)


class Outgoing(NamedTuple):
    """A request ready to be written.

    A tuple because a frozen dataclass of eight fields takes 1.4 us longer to make, a twentieth of a whole exchange.
    """

    head: bytes
    #: Bytes to write as they are, or a stream to frame.
    body: bytes | AsyncIterable[bytes]
    #: Exact size a streamed body must have; None sends it in chunks.
    length_bytes: int | None
    #: False when the request itself asks for the connection to be closed.
    keep_alive: bool
    #: The answer has no body whatever its header says.
    head_only: bool
    #: The upstream is to say whether it wants the body (RFC 9110 §10.1.1).
    expects_continue: bool = False
    #: The protocols that a 101 may switch to, as a lower-case list; empty for none.
    upgrade: bytes = b""
    #: The caller's list of fields to send behind a streamed body in chunks; looked at when that has ended.
    trailers: Sequence[tuple[bytes, bytes]] = ()


def compose(request: httpx.Request) -> Outgoing:
    """The bytes of `request`.

    Extensions: `target` (bytes) replaces the URL's path and query; `trailers` are sent behind a body in chunks.
    Raises httpx.LocalProtocolError for a request that would be framed ambiguously or read as more than one.
    """
    method = request.method.encode("latin-1", "replace")
    target: bytes = request.extensions.get("target") or request.url.raw_path
    if not method or method.translate(None, _TOKEN) or method == b"CONNECT":
        raise httpx.LocalProtocolError("This method cannot be sent.")
    if len(target.translate(None, _NOT_IN_TARGET)) != len(target):
        raise httpx.LocalProtocolError("The request target holds a space or a control character.")
    lines = [b"%b %b HTTP/1.1" % (method, target)]
    names = []
    length: int | None = None
    chunked = expects_continue = False
    options = upgrade = b""
    for name, value in request.headers.raw:
        lines.append(name + b": " + value)
        names.append(name)
        if len(name) not in _TELLING:
            continue
        match name.lower():
            case b"content-length":
                length = _length(value, length)
            case b"transfer-encoding":
                if chunked or value.strip().lower() != b"chunked":
                    raise httpx.LocalProtocolError("Only the transfer coding 'chunked' can be sent, once.")
                chunked = True
            case b"connection":
                options += b"," + value.lower().replace(b" ", b"").replace(b"\t", b"")
            case b"upgrade":
                upgrade += b"," + value.lower()
            case b"expect":
                expects_continue = value.strip().lower() == b"100-continue"
    if b"" in names or b"".join(names).translate(None, _TOKEN):
        raise httpx.LocalProtocolError("A header name holds a character that is not allowed there.")
    if chunked and length is not None:
        raise httpx.LocalProtocolError("A request cannot have both Content-Length and Transfer-Encoding.")
    trailers: Sequence[tuple[bytes, bytes]] = request.extensions.get("trailers", ())
    body = _body(request, lines, length, chunked, trailers)
    lines.append(b"\r\n")
    head = b"\r\n".join(lines)
    # One line break per line and the empty one: a break inside a value would be a second request.
    if len(head) - len(head.translate(None, b"\r\n\0")) != 2 * len(lines):
        raise httpx.LocalProtocolError("A header value holds a line break or NUL.")
    nominated = options.split(b",") if options else ()
    return Outgoing(
        head,
        body,
        length,
        b"close" not in nominated,
        method == b"HEAD",
        expects_continue,
        upgrade if b"upgrade" in nominated else b"",
        trailers,
    )


def last_chunk(trailers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The end of a body in chunks. Raises httpx.LocalProtocolError for fields that would be read as something else."""
    if not trailers:
        return b"0\r\n\r\n"
    for name, value in trailers:
        if not name or name.translate(None, _TOKEN) or len(value.translate(None, b"\r\n\0")) != len(value):
            raise httpx.LocalProtocolError("A trailer field holds a character that is not allowed there.")
    return b"0\r\n%b\r\n" % b"".join([name + b": " + value + b"\r\n" for name, value in trailers])


def _length(value: bytes, earlier: int | None) -> int:
    digits = value.strip()
    if earlier is not None or not digits.isdigit() or len(digits) > LENGTH_DIGITS_MAX:
        raise httpx.LocalProtocolError("Content-Length must be one number, given once.")
    return int(digits)


def _body(
    request: httpx.Request,
    lines: list[bytes],
    length: int | None,
    chunked: bool,
    trailers: Sequence[tuple[bytes, bytes]],
) -> bytes | AsyncIterable[bytes]:
    """The body to send; adds to `lines` the framing that was not given."""
    stream = request.stream
    if isinstance(stream, httpx.ByteStream):
        body = b"".join(stream)
        if chunked:
            return (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + last_chunk(trailers)
        if length is None:
            if body:
                lines.append(b"Content-Length: %d" % len(body))
        elif length != len(body):
            raise httpx.LocalProtocolError(f"The body has {len(body)} bytes but Content-Length says {length}.")
        return body
    if not isinstance(stream, httpx.AsyncByteStream):
        raise httpx.LocalProtocolError("The body must be bytes or an asynchronous stream.")
    if length is None and not chunked:
        lines.append(b"Transfer-Encoding: chunked")
    return stream

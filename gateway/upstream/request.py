"""An `httpx.Request` as bytes for the wire. Owns framing and what may not be sent; does no I/O.

Header fields go out as given: order, case, duplicates. The only field ever added is the framing of a body that has
none: Content-Length for bytes, Transfer-Encoding for a stream.
"""

from collections.abc import AsyncIterable
from dataclasses import dataclass

import httpx

#: RFC 9110 §5.6.2; anything else in a name or method would let one request be read as another.
_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Bytes that end or split a request line.
_NOT_IN_TARGET = bytes(range(0x21)) + b"\x7f"
#: 10^18 bytes fit an unsigned 64-bit integer with room to spare; a longer number is an attack.
_LENGTH_DIGITS_MAX = 18


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request ready to be written."""

    head: bytes
    #: Bytes to write as they are, or a stream to frame.
    body: bytes | AsyncIterable[bytes]
    #: Exact size a streamed body must have; None sends it in chunks.
    length_bytes: int | None
    #: False when the request itself asks for the connection to be closed.
    keep_alive: bool
    #: The answer has no body whatever its header says.
    head_only: bool


def compose(request: httpx.Request) -> Outgoing:
    """The bytes of `request`. `extensions["target"]` (bytes) replaces the URL's path and query.

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
    chunked = False
    keep_alive = True
    for name, value in request.headers.raw:
        lines.append(name + b": " + value)
        names.append(name)
        # Only three fields concern the connection; their lengths tell most others apart without lower-casing.
        size = len(name)
        if size == 14 and name.lower() == b"content-length":
            length = _length(value, length)
        elif size == 17 and name.lower() == b"transfer-encoding":
            if chunked or value.strip().lower() != b"chunked":
                raise httpx.LocalProtocolError("Only the transfer coding 'chunked' can be sent, once.")
            chunked = True
        elif size == 10 and name.lower() == b"connection":
            keep_alive = keep_alive and b"close" not in value.lower().replace(b" ", b"").split(b",")
    if b"" in names or b"".join(names).translate(None, _TOKEN):
        raise httpx.LocalProtocolError("A header name holds a character that is not allowed there.")
    if chunked and length is not None:
        raise httpx.LocalProtocolError("A request cannot have both Content-Length and Transfer-Encoding.")
    body = _body(request, lines, length, chunked)
    lines.append(b"\r\n")
    head = b"\r\n".join(lines)
    # One line break per line and the empty one: a break inside a value would be a second request.
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
        raise httpx.LocalProtocolError("A header value holds a line break or NUL.")
    return Outgoing(head, body, length, keep_alive, method == b"HEAD")


def _length(value: bytes, earlier: int | None) -> int:
    digits = value.strip()
    if earlier is not None or not digits.isdigit() or len(digits) > _LENGTH_DIGITS_MAX:
        raise httpx.LocalProtocolError("Content-Length must be one number, given once.")
    return int(digits)


def _body(
    request: httpx.Request, lines: list[bytes], length: int | None, chunked: bool
) -> bytes | AsyncIterable[bytes]:
    """The body to send; adds to `lines` the framing that was not given."""
    stream = request.stream
    if isinstance(stream, httpx.ByteStream):
        body = b"".join(stream)
        if chunked:
            return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
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

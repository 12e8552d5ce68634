"""The opening handshake (RFC 6455 §4): what a request must be to be forwarded as one, and what proves the answer.

Pure. The handshake itself is between the two ends: the client's Sec-WebSocket fields cross untouched, and so does what
the upstream makes of them. Checked here is what a proxy must know before it stops reading HTTP: that both sides do.
A proxy that tunnels on less can be talked into forwarding requests that it never saw.
"""

import binascii
from collections.abc import Iterable, Sequence

from websockets.utils import accept_key

from gateway.types import HeaderList, Refusal

#: As `Upgrade` names it.
PROTOCOL = b"websocket"
VERSION = b"13"
KEY_BYTES = 16


def is_handshake(headers: HeaderList) -> bool:
    """Whether a request asks for a WebSocket, and so must not be forwarded as anything else. headers: as in Facts."""
    return PROTOCOL in _tokens(headers, b"upgrade") and b"upgrade" in _tokens(headers, b"connection")


def refused(method: str, http_version: str, headers: HeaderList, *, allowed: bool) -> Refusal | None:
    """Why this handshake cannot be forwarded; None when it can. allowed: the route takes WebSockets."""
    if not allowed:
        return Refusal(403, "websocket_not_allowed", "This path does not take WebSockets.", should_retry=False)
    if method != "GET" or http_version != "1.1":
        return _malformed("is a GET of HTTP/1.1")
    if _values(headers, b"transfer-encoding") or _values(headers, b"content-length") not in ([], [b"0"]):
        return _malformed("has no body")
    if _values(headers, b"sec-websocket-version") != [VERSION]:
        message = "This gateway speaks version 13 of the WebSocket protocol (RFC 6455)."
        return Refusal(426, "websocket_version", message, should_retry=False)
    keys = _values(headers, b"sec-websocket-key")
    if len(keys) != 1 or not _is_key(keys[0]):
        return _malformed("has one Sec-WebSocket-Key of 16 bytes")
    return None


def proven(status: int, fields: Sequence[tuple[bytes, bytes]], request_headers: HeaderList) -> bool:
    """Whether the upstream has taken this very handshake (§4.1, steps 1 to 4). Nothing less may open a tunnel.

    fields: of the answer, names in any case. request_headers: of a handshake that was not refused, as in Facts.
    """
    answer = [(name.lower(), value) for name, value in fields]
    (key,) = _values(request_headers, b"sec-websocket-key")
    return (
        status == 101
        and _tokens(answer, b"upgrade") == {PROTOCOL}
        and b"upgrade" in _tokens(answer, b"connection")
        and not _values(answer, b"transfer-encoding")
        and _values(answer, b"sec-websocket-accept") == [accept_key(key.decode("ascii")).encode()]
    )


def _malformed(what: str) -> Refusal:
    return Refusal(400, "bad_websocket_handshake", f"A WebSocket handshake {what}.", should_retry=False)


def _is_key(value: bytes) -> bool:
    try:
        return len(binascii.a2b_base64(value, strict_mode=True)) == KEY_BYTES
    except binascii.Error:
        return False


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value.strip(b" \t") for name, value in headers if name == wanted]


def _tokens(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> set[bytes]:
    """The elements of a list field, in lower case."""
    listed = b",".join(_values(headers, wanted)).lower().split(b",")
    return {token.strip(b" \t") for token in listed} - {b""}

"""What the head of an answer says about its content: whether there is any, where it ends, what may follow. Pure.

Stricter than RFC 9112 demands of a recipient: what two readers could understand differently is refused here.
"""

from typing import Literal

import httpx

from gateway.upstream.request import LENGTH_DIGITS_MAX

#: How the end of a body is told; "none": an answer that has no body whatever its fields say.
Framing = Literal["length", "chunked", "close", "none"]
Fields = list[tuple[bytes, bytes]]


def framed(status: int, version: bytes, fields: Fields, head_only: bool) -> tuple[Framing, int, bool]:
    """Where an answer ends (RFC 9112 §6.3), the length of its body in bytes for "length", and whether another answer
    may follow (§9.3). Raises httpx.RemoteProtocolError.
    """
    length: bytes | None = None
    chunked = False
    options = b""
    for name, value in fields:
        # Lengths tell the fields that matter from most others, without lower-casing.
        size = len(name)
        if size == 14 and name.lower() == b"content-length":
            if length is not None:
                raise malformed("more than one Content-Length")
            length = value.strip()
        elif size == 17 and name.lower() == b"transfer-encoding":
            # Without a TE field, which is ours to send and is not sent, no other coding may be used.
            # llhttp takes spaces behind the word, but would not know it with a tab there and read to the end.
            if chunked or value.rstrip(b" ").lower() != b"chunked" or version != b"HTTP/1.1":
                raise malformed("a transfer coding other than 'chunked', once, in HTTP/1.1")
            chunked = True
        elif size == 10 and name.lower() == b"connection":
            options += b"," + value
    persistent = True
    if options or version != b"HTTP/1.1":
        members = _members(options)
        persistent = b"close" not in members and (version == b"HTTP/1.1" or b"keep-alive" in members)
    left = 0
    if length is not None:
        if chunked or not length.isdigit() or len(length) > LENGTH_DIGITS_MAX:
            raise malformed("Content-Length beside Transfer-Encoding, or no number")
        left = int(length)
    if head_only or status in (204, 304):
        # Content that must not be there may follow a 204 that promises some.
        return "none", 0, persistent and (status != 204 or not (chunked or left))
    if chunked:
        return "chunked", 0, persistent
    if length is not None:
        return "length", left, persistent
    return "close", 0, False


def interim_fields(status: int, fields: Fields) -> Fields:
    """The fields of an interim answer without Content-Length. Raises httpx.RemoteProtocolError.

    RFC 9110 §15.2: it has no content, so a field that promises some is a trap for whoever believes it; but
    `Content-Length: 0` is said by real servers.
    """
    kept = []
    for name, value in fields:
        lowered = name.lower()
        if lowered == b"transfer-encoding" or (lowered == b"content-length" and value.strip() != b"0"):
            raise malformed(f"status {status} with content")
        if lowered != b"content-length":
            kept.append((name, value))
    return kept


def check_switch(offered: bytes, fields: Fields) -> None:
    """The fields of a 101 switch to protocols of the list `offered` only, and promise no content (RFC 9110 §7.8).

    Raises httpx.RemoteProtocolError.
    """
    chosen: set[bytes] = set()
    for name, value in fields:
        lowered = name.lower()
        if lowered == b"upgrade":
            chosen |= _members(value)
        elif lowered in (b"content-length", b"transfer-encoding"):
            raise malformed("status 101 with content")
    # llhttp has refused a 101 whose Connection does not nominate Upgrade.
    if not chosen or not chosen <= _members(offered):
        raise malformed("a switch of protocols that was not asked for")


def _members(value: bytes) -> set[bytes]:
    """The elements of a list field, lower-case."""
    return {member.strip() for member in value.lower().split(b",")} - {b""}


def malformed(why: str) -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError(f"The answer is malformed: {why}.")

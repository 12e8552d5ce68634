"""What every dialect shares: the rendered answer, and the header fields that mean the same to every client.

A dialect owns the shape of a refusal's body, its media type and what it calls the request's id. The status and the
code come from the refusal, and the retry fields are written here, once, because SDKs of every dialect read the same
ones (wire.md, "What clients do"). How limits are spelled is ratelimit.py's to know.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.dialects import ratelimit
from gateway.types import Refusal

#: A client told to wait longer than this is told not to retry by itself: some SDKs sleep without a cap.
RETRY_WAIT_MS_MAX = 60_000

#: Bytes that may not stand in a field value (RFC 9110 §5.5): all controls but the tab.
_CONTROLS = bytes(code for code in (*range(0x20), 0x7F) if code != 0x09)

# A refusal must always render: a value JSON does not know becomes its text instead of an error.
_encoder = msgspec.json.Encoder(enc_hook=str)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A refusal as bytes: what goes on the wire, in this order."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Manner:
    """What of an answer's head is a dialect's own."""

    content_type: bytes
    #: Whose limit fields stand beside the draft's: a family of ratelimit.py.
    family: str
    #: The fields its clients read the request's id from.
    id_fields: tuple[bytes, ...] = (b"x-request-id",)


class Dialect(Protocol):
    """One client family's way of being told no. The modules of this package are such objects."""

    def render(self, refusal: Refusal, request_id: str, now_s: float | None = None) -> Rendered:
        """The whole answer, for when no byte of an answer was sent yet. now_s: Unix time; None asks the clock."""
        ...

    def stream_error(self, refusal: Refusal) -> bytes:
        """The event that ends a stream in mid-flight; empty when the dialect has no word for it.

        It is a complete event of its own, so it must follow a complete event.
        """
        ...


def answer(manner: Manner, refusal: Refusal, request_id: str, body: bytes, now_s: float | None) -> Rendered:
    """`body` with the header fields that tell every client what happened and whether to come back."""
    shown_id = field_value(request_id)
    headers = [
        (b"content-type", manner.content_type),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *((name, shown_id) for name in manner.id_fields),
        *_retry_headers(refusal),
    ]
    if refusal.limits:
        headers += ratelimit.fields(refusal.limits, manner.family, time.time() if now_s is None else now_s)
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))  # RFC 9110 §15.5.2 demands a challenge.
    if refusal.status == 405:
        headers.append((b"allow", _allow(refusal)))  # RFC 9110 §15.5.6 demands the list, even an empty one.
    if refusal.status == 426:  # RFC 9110 §15.5.22 and RFC 6455 §4.4: what to switch to; only WebSockets ask for it.
        headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-version", b"13")]
    return Rendered(refusal.status, tuple(headers), body)


def encode(document: Mapping[str, object]) -> bytes:
    """JSON in UTF-8 on one line, members in the order given."""
    try:
        return _encoder.encode(document)
    except UnicodeEncodeError:
        # A lone surrogate, from text that was not UTF-8 to begin with: spoil that character, not the answer.
        return _encoder.encode(_printable(document))


def with_details(members: dict[str, object], refusal: Refusal) -> dict[str, object]:
    """`members` followed by the refusal's details; a detail never replaces a member the dialect defines."""
    for name, value in refusal.details.items():
        members.setdefault(name, value)
    return members


def field_value(text: str) -> bytes:
    """`text` as a field value that can neither end its line nor be refused by a strict parser."""
    return text.encode("latin-1", "replace").translate(None, _CONTROLS)


def _retry_headers(refusal: Refusal) -> list[tuple[bytes, bytes]]:
    headers = []
    should_retry = refusal.should_retry
    wait_ms = refusal.retry_after_ms
    if wait_ms is not None:
        # SDKs take zero for "no advice" and fall back to their own guess, so the least wait is said as 1.
        wait_ms = max(wait_ms, 1)
        headers.append((b"retry-after", b"%d" % -(-wait_ms // 1000)))
        headers.append((b"retry-after-ms", b"%d" % wait_ms))
        if wait_ms > RETRY_WAIT_MS_MAX:
            should_retry = False
    if should_retry is not None:
        headers.append((b"x-should-retry", b"true" if should_retry else b"false"))
    return headers


def _allow(refusal: Refusal) -> bytes:
    methods = refusal.details.get("allow", ())
    return field_value(methods if isinstance(methods, str) else ", ".join(str(method) for method in methods))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_printable(key): _printable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(member) for member in value]
    return value

"""From a transcript without a gateway to the one that there must be with one, and how the two are compared."""

import difflib
import re
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

from tests.walk.wire.case import Case
from tests.walk.wire.differences import DIFFERENCES, SEPARATE_CONNECTIONS
from tests.walk.wire.exchange import Exchange, Learned, Setting, closes
from tests.walk.wire.messages import Message, chunks_of, cut, messages
from tests.walk.wire.stage import Transcript

_REQUEST_ID = re.compile(rb"\r\nx-request-id: ([A-Za-z0-9._:-]{1,128})\r\n")
_CONTEXT = re.compile(rb"\r\nx-session-context: ([A-Za-z0-9_-]+)\r\n")
_SIGNED = re.compile(rb"\r\nx-session-signature: v1;t=([0-9]{10});")
_CREATED = re.compile(rb'"created_ms":([0-9]{13})')


@dataclass(frozen=True, slots=True)
class Expected:
    to_upstream: bytes
    to_client: bytes
    connection: str
    #: The differences that changed anything.
    used: frozenset[str]


def connection_through(asked: bytes) -> str:
    """What is to become of the client's connection behind a gateway; it does not depend on what the gateway chooses."""
    last = messages(asked)[-1]
    return "closed" if closes(last, not _is_complete(last)) else "open"


def expected(case: Case, direct: Transcript, setting: Setting, learned: list[Learned]) -> Expected:
    """What `direct` becomes behind a gateway of this setting."""
    requests = messages(direct.asked)
    assert b"".join(request.raw for request in requests) == direct.asked == direct.to_upstream
    answers = messages(direct.to_client, [request.method for request in requests])
    assert b"".join(said.raw for said in answers) == direct.to_client
    exchanges = list(_exchanges(case, direct, setting, requests, learned))
    used: set[str] = set()
    to_upstream = [
        _changed(request, exchange, "request", used) for request, exchange in zip(requests, exchanges, strict=True)
    ]
    to_client = [_changed(said, exchanges[at], "answer", used) for said, at in _numbered(answers)]
    connection = connection_through(direct.asked)
    if connection != direct.connection:
        used.add(SEPARATE_CONNECTIONS)
    return Expected(b"".join(to_upstream), b"".join(to_client), connection, frozenset(used))


def _exchanges(
    case: Case, direct: Transcript, setting: Setting, requests: list[Message], learned: list[Learned]
) -> Iterator[Exchange]:
    at = 0
    for request, chosen in zip_longest(requests, learned[: len(requests)]):
        begin, at = at, at + len(request.raw)
        early = not _is_complete(request)
        in_one_packet = not early and not any(begin < packet < at for packet in direct.packets)
        yield Exchange(setting, chosen or Learned(), request, early, in_one_packet, case.in_parts)


def _changed(message: Message, exchange: Exchange, direction: str, used: set[str]) -> bytes:
    for difference in DIFFERENCES:
        if difference.direction != direction:
            continue
        changed = difference.apply(message, exchange)
        if changed != message:
            used.add(difference.name)
        if changed is None:
            return b""
        message = changed
    return message.raw


def _numbered(answers: list[Message]) -> Iterator[tuple[Message, int]]:
    """Each answer with the number of the request it belongs to."""
    number = 0
    for said in answers:
        yield said, number
        number += not said.is_interim


def _is_complete(request: Message) -> bool:
    return cut(request.raw, 0) is not None


def learned(through: Transcript, methods: list[bytes]) -> list[Learned]:
    """What the gateway chose for each request, from its own words."""
    heard = through.to_upstream
    ids = _REQUEST_ID.findall(heard)
    created = [_created_ms(context) for context in _CONTEXT.findall(heard)]
    signed = [int(seconds) for seconds in _SIGNED.findall(heard)]
    requests = _sizes(heard, None)
    answers = _sizes(through.to_client, methods)
    rows = zip_longest(ids, created, signed, requests[: len(ids)], answers[: len(ids)])
    return [
        Learned(request_id or b"", created_ms or 0, signed_s or 0, up or (), down or ())
        for request_id, created_ms, signed_s, up, down in rows
    ]


def _created_ms(context: bytes) -> int:
    found = _CREATED.search(urlsafe_b64decode(context + b"=="))
    return int(found[1]) if found else 0


def _sizes(heard: bytes, methods: list[bytes] | None) -> list[tuple[int, ...]]:
    """The chunk sizes of each message; nothing when what was heard cannot be read, which the comparison will show."""
    try:
        found = messages(heard, methods or ())
        return [
            tuple(len(data) for _, _, data in chunks_of(message.body).chunks)
            if message.is_chunked and message.body
            else ()
            for message in found
            if not message.is_interim
        ]
    except (AssertionError, ValueError, IndexError):
        return []


def compare(what: str, expects: bytes, got: bytes) -> str:
    """Empty when both are the same bytes; else where they differ, readable."""
    if expects == got:
        return ""
    wanted, found = (_readable(side) for side in (expects, got))
    diff = difflib.unified_diff(wanted, found, f"{what}, expected", f"{what}, got", lineterm="", n=2)
    return "\n".join(diff)[:6_000] or f"{what}: {len(expects)} bytes expected, {len(got)} got"


def _readable(data: bytes) -> list[str]:
    lines = (repr(line)[2:-1] for line in data.splitlines(keepends=True))
    return [line if len(line) < 200 else f"{line[:120]} ... {len(line)} characters ... {line[-40:]}" for line in lines]

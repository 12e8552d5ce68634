"""The journal's lines. Pure: values to bytes, and back as far as the bytes are whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias
from zlib import crc32

import msgspec

from gateway.types import Entry


@dataclass(frozen=True, slots=True)
class Held:
    """A hold that was taken. owed: what it costs already, should nobody learn more."""

    org_id: str
    request_id: str
    held_ucredits: int
    owed_ucredits: int


Line: TypeAlias = Held | Entry


def encode(line: Line) -> bytes:
    """`line` as it is written, with its line break."""
    match line:
        case Held():
            text = ["held", line.org_id, line.request_id, line.held_ucredits, line.owed_ucredits]
        case Entry():
            text = ["settled", line.org_id, line.request_id, line.kind, line.amount_ucredits, line.meta]
    encoded = msgspec.json.encode(text)
    return b"%08x %b\n" % (crc32(encoded), encoded)


def decode(data: bytes) -> Iterator[Line | None]:
    """Every line of a segment; None for one that is not whole: the last one of a process that died writing it."""
    for raw in data.split(b"\n"):
        if raw:
            yield _decode(raw)


def _decode(raw: bytes) -> Line | None:
    checksum, _, encoded = raw.partition(b" ")
    if not encoded or checksum != b"%08x" % crc32(encoded):
        return None
    match msgspec.json.decode(encoded):
        case ["held", str(org_id), str(request_id), int(held), int(owed)]:
            return Held(org_id, request_id, held, owed)
        case ["settled", str(org_id), str(request_id), str(kind), int(amount), dict(meta)]:
            return Entry(org_id, request_id, kind, amount, meta)
    return None

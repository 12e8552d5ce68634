"""Which part of a cluster a key belongs to, and which server which part. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from redis.crc import key_slot

from gateway.redis_address import Place
from gateway.stores.link import Command, Reply

SLOTS = 16384

#: Commands without a key: any server may answer.
KEYLESS = frozenset("PING TIME INFO SCRIPT CONFIG CLUSTER ACL CLIENT COMMAND ROLE KEYS SCAN DBSIZE FLUSHALL".split())


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots `first` to `last`, and who serves them: the primary, then its replicas."""

    first: int
    last: int
    places: tuple[Place, ...]


def slot_of(key: bytes | str | int) -> int:
    """The slot of a key, or of the part of it between the first { and the next }, if there is something between."""
    return key_slot(key if isinstance(key, bytes) else str(key).encode(), SLOTS)


def slot_of_command(args: Command) -> int | None:
    """The slot of its first key; None for a command without one."""
    name = args[0]
    if name in ("EVALSHA", "EVAL"):
        return slot_of(args[3]) if args[2] else None
    return None if name in KEYLESS else slot_of(args[1])


def read_slots(reply: Reply, asked: str) -> list[SlotRange]:
    """What CLUSTER SLOTS replied. asked: the host that did; a server may leave out its own name."""
    return [
        SlotRange(first, last, tuple((_text(server[0]) or asked, server[1]) for server in servers))
        for first, last, *servers in reply
    ]


def read_redirect(error: str, asked: str) -> tuple[int, Place]:
    """The slot and the server that a MOVED or ASK names."""
    _, slot, place = error.split()[:3]
    host, _, port = place.rpartition(":")
    return int(slot), (host or asked, int(port))


def count_slots(ranges: Sequence[SlotRange]) -> int:
    return sum(part.last - part.first + 1 for part in ranges)


def _text(name: bytes | None) -> str:
    # "?": the server has been told to announce a name and has none.
    return "" if name in (None, b"?") else name.decode()

"""Lines of any number of logs in the order in which Redis judged them, in bounded memory.

A line is written when its request has ended, so it may stand hours behind others that were judged later. Lines are
sorted in parts of PART_BYTES, which are put down in temporary files and merged; a log of one part needs no file.
"""

import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway.insight.logline import Line

#: Of log text held at once, a few times as much in memory.
PART_BYTES = 64 << 20
_HEAD = struct.Struct(">qqI")

#: When it was judged, in us; its place in the logs, which decides between lines of one time; the line.
Placed = tuple[int, int, bytes]


def in_order(lines: Iterable[tuple[bytes, Line]], part_bytes: int = PART_BYTES) -> Iterator[Placed]:
    """The lines by the time at which each was judged first. All are read before the first is given."""
    with tempfile.TemporaryDirectory(prefix="gateway-replay-") as folder:
        parts: list[Path] = []
        held: list[Placed] = []
        held_bytes = 0
        for place, (text, line) in enumerate(lines):
            held.append((judged_first_us(line), place, text))
            held_bytes += len(text)
            if held_bytes >= part_bytes:
                parts.append(_put_down(held, Path(folder) / f"{len(parts)}"))
                held, held_bytes = [], 0
        held.sort()
        yield from heapq.merge(*map(_taken_up, parts), held) if parts else held


def judged_first_us(line: Line) -> int:
    """When Redis was asked for the request first, or had judged the denial that it was answered with; of one that Redis
    never judged, when it had arrived."""
    if line.limits and line.limits[0].denied_at_us:
        return min(judged.denied_at_us for judged in line.limits if judged.denied_at_us)
    return line.shared_judged_at_us or line.judged_at_us or line.begun_at_us


def _put_down(held: list[Placed], path: Path) -> Path:
    held.sort()
    with path.open("wb") as file:
        for at_us, place, text in held:
            file.write(_HEAD.pack(at_us, place, len(text)))
            file.write(text)
    return path


def _taken_up(path: Path) -> Iterator[Placed]:
    with path.open("rb") as file:
        while head := file.read(_HEAD.size):
            at_us, place, length = _HEAD.unpack(head)
            yield at_us, place, file.read(length)

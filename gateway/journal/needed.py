"""Which lines of which segment are needed still. Pure: no file is touched here."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from gateway.journal.files import Segment

#: With no more of them than that nothing is written anew.
SEGMENTS_MAX = 8
#: Written anew in one go, so that nobody who waits beside it waits long.
CARRIED_BYTES_MAX = 256 * 1024

#: Org and request.
Name: TypeAlias = tuple[str, str]


class Written(NamedTuple):
    """A line as it is written. needed: until its request has ended, or its charge is confirmed."""

    name: Name
    data: bytes
    needed: bool


class Needed:
    """Segments are in the order in which they were begun; of each request only the last line is needed."""

    def __init__(self, segment_bytes: int) -> None:
        self._segment_bytes = segment_bytes
        self._segments: deque[tuple[Segment, dict[Name, Written]]] = deque()
        #: The segment that each line is in.
        self._where: dict[Name, dict[Name, Written]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._where)

    @property
    def segments_count(self) -> int:
        return len(self._segments)

    def add(self, segment: Segment, lines: Iterable[Written]) -> None:
        """`lines` are in `segment`, the newest; what was said of their requests before is not needed any more."""
        if not self._segments or self._segments[-1][0] is not segment:
            self._segments.append((segment, {}))
        here = self._segments[-1][1]
        for line in lines:
            self.drop(line.name)
            if line.needed:
                here[line.name] = line
                self._where[line.name] = here
                self._bytes += len(line.data)

    def drop(self, name: Name) -> None:
        """Nothing of this request is needed any more."""
        if (lines := self._where.pop(name, None)) is not None:
            self._bytes -= len(lines.pop(name).data)

    @property
    def unneeded(self) -> Segment | None:
        """The oldest segment, when it can go. The newest is still written to."""
        return self._segments[0][0] if len(self._segments) > 1 and not self._segments[0][1] else None

    def forget_oldest(self) -> None:
        """It is gone."""
        self._segments.popleft()

    def carried(self) -> list[Written]:
        """Lines of the oldest segment that are to be written anew so that it can go: some at a time, as long as there
        are many segments and most of what is in them is needed no more. So the segments never come to more than
        SEGMENTS_MAX and twice what is needed."""
        carried: list[Written] = []
        size = 0
        if len(self._segments) * self._segment_bytes > SEGMENTS_MAX * self._segment_bytes + 2 * self._bytes:
            for line in self._segments[0][1].values():
                if size >= CARRIED_BYTES_MAX:
                    break
                carried.append(line)
                size += len(line.data)
        return carried

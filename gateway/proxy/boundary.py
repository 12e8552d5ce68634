"""Where one event of a stream ends and the next may begin (WHATWG HTML §9.2.5), in the bytes as they pass."""

import re
from collections.abc import Iterable

_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
_END = re.compile(rb"\n\n|\r\n\r\n|\r\r")
#: The longest of them may be cut anywhere.
_TAIL_BYTES = 4


class Boundary:
    """One stream's. State: its last bytes; before the first event, what would stand there."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\n\n"

    @property
    def here(self) -> bool:
        """An event has just ended, so that another may follow."""
        return self._tail.endswith(_ENDS)

    def passed(self, pieces: Iterable[bytes]) -> None:
        self._tail = (self._tail + b"".join(pieces))[-_TAIL_BYTES:]

    def rest_of_event(self, arrived: bytes) -> bytes:
        """What of the next bytes still belongs to the event under way: all of them, unless it ends among them."""
        known_bytes = len(self._tail)
        ends = (found.end() - known_bytes for found in _END.finditer(self._tail + arrived))
        return arrived[: next((end for end in ends if end > 0), None)]

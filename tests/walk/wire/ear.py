"""What one side of a dialogue has got so far, and waiting for more of it."""

import asyncio
from collections.abc import Callable

from tests.walk.wire.messages import cut

#: A line that was not heard after so long never will be.
STALL_S = 5.0


class Ear:
    """What one side got: all of it, and how far the dialogue has taken note of it."""

    def __init__(self) -> None:
        self.heard = bytearray()
        #: Where the message begins that was not taken whole yet, and where to look for the next marker.
        self.message_at = self.sight = 0
        #: How the connection ended: `closed` in order, or `reset`; empty while it stands.
        self.ended = ""
        self._changed = asyncio.Event()

    def hear(self, data: bytes) -> None:
        self.heard += data
        self._changed.set()

    def end(self, how: str) -> None:
        self.ended = self.ended or how
        self._changed.set()

    async def until(self, holds: Callable[[], bool], line: object) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            heard = bytes(self.heard[-2000:])
            raise AssertionError(f"stalled at {line}; heard until then ({self.ended or 'open'}): {heard!r}") from None

    def has(self, marker: bytes) -> bool:
        found = self.heard.find(marker, self.sight)
        if found >= 0:
            self.sight = found + len(marker)
        return found >= 0

    def has_message(self, *, head_only: bool = False, interim: bool = False) -> bool:
        """One more whole message is there; interim answers are passed over unless `interim`."""
        while True:
            found = cut(self.heard, self.message_at, head_only=head_only, ended=bool(self.ended))
            if found is None:
                return False
            message, self.message_at = found
            self.sight = max(self.sight, self.message_at)
            if interim or not message.is_interim:
                return True

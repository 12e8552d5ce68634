"""How many requests an upstream has at once, and who goes next. Owns the line of those that wait, not where they go.

    asks ──► inside ──► leaves, and the first in line is inside in its place
      └────► in line ──► inside
                └──────► turned away (queue_timeout), or its request is cancelled

A place passes from hand to hand and is never free while somebody is in line. One that was handed to a request that is
being cancelled goes on to the next.
"""

import asyncio
from collections import OrderedDict

from gateway.errors import UpstreamBusy


class Gate:
    """At most `requests_max` inside and `queue_max` in line, in order of asking. Every `enter` needs its `leave`."""

    __slots__ = ("_line", "_queue_max", "_queue_timeout_s", "_requests_max", "inside")

    def __init__(self, requests_max: int, queue_max: int, queue_timeout_ms: int) -> None:
        self._requests_max = requests_max
        self._queue_max = queue_max if queue_timeout_ms > 0 else 0
        self._queue_timeout_s = queue_timeout_ms / 1000
        #: A result of False turns its request away.
        self._line: OrderedDict[asyncio.Future[bool], None] = OrderedDict()
        #: Requests that have entered and not left.
        self.inside = 0

    @property
    def queued(self) -> int:
        """Requests in line."""
        return len(self._line)

    def enter_at_once(self) -> bool:
        """Inside, if there is room; False means: use `enter`."""
        if self.inside >= self._requests_max:
            return False
        self.inside += 1
        return True

    async def enter(self) -> None:
        """Inside. Raises UpstreamBusy when the line is full, or was too slow."""
        if self.enter_at_once():
            return
        if len(self._line) >= self._queue_max:
            raise UpstreamBusy
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        self._line[turn] = None
        timer = loop.call_later(self._queue_timeout_s, _turn_away, turn)
        try:
            inside = await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self.leave()
            raise
        finally:
            self._line.pop(turn, None)
            timer.cancel()
        if not inside:
            raise UpstreamBusy

    def leave(self) -> None:
        """The place is the next one's in line, or free."""
        while self._line:
            turn, _ = self._line.popitem(last=False)
            if not turn.done():
                turn.set_result(True)
                return
        self.inside -= 1


def _turn_away(turn: "asyncio.Future[bool]") -> None:
    if not turn.done():
        turn.set_result(False)

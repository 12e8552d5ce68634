"""A deadline that moves with every request, and the one timer behind it.

Setting a timer costs more than a request may; moving a number does not. The timer is armed for the nearest deadline
it knew and, when it rings too early, for the next. Requests that come faster than their deadlines arm no timers.
"""

import asyncio
from collections.abc import Callable
from math import inf


class Alarm:
    """Calls `expired` when the deadline set last has passed, unless it was cleared."""

    __slots__ = ("_at", "_due", "_expired", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._due = self._at = inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, timeout_s: float) -> None:
        self._due = due = self._loop.time() + timeout_s
        if due < self._at:
            self._arm(due)

    def clear(self) -> None:
        self._due = inf

    def close(self) -> None:
        """It never rings again."""
        self._due = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._at = -inf

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at = at
        self._timer = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._at = inf
        # Both loops read sockets before they run timers, so bytes that waited while the loop was busy came in time.
        if self._due == inf:
            return
        if self._due > self._loop.time():
            self._arm(self._due)
        else:
            self._due = inf
            self._expired()

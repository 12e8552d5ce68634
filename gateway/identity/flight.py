"""One piece of work that several callers wait for."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from gateway.errors import StoreUnavailable

T = TypeVar("T")


class Flight(Generic[T]):
    """Runs `work` once, in its own task. A waiter that is cancelled leaves the work and the other waiters alone.

    Must be made inside a running event loop. Whoever makes a flight keeps it until it is `done` or ends it with
    `close`.
    """

    __slots__ = ("_task",)

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.ensure_future(work)
        # Without a waiter (all were cancelled, or nobody waited) an error would be reported as never retrieved.
        self._task.add_done_callback(_retrieve)

    @property
    def done(self) -> bool:
        return self._task.done()

    async def landed(self) -> T:
        """The result, once there is one. Raises what the work raised, StoreUnavailable after `close`."""
        # wait(), unlike awaiting the task, does not pass the caller's cancellation on to the task.
        await asyncio.wait({self._task})
        if self._task.cancelled():
            raise StoreUnavailable("The gateway is stopping; try again shortly.")
        return self._task.result()

    async def close(self) -> None:
        """The work has ended, by cancellation if it was still running."""
        self._task.cancel()
        await asyncio.wait({self._task})


def _retrieve(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()

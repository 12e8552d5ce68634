"""Work by name, one piece of a name at a time, shared by all who want it done."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

from gateway.errors import StoreUnavailable

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Rounds(Generic[K, T]):
    """What `work(name)` returned or raised, for everybody who asked. A caller that is cancelled leaves it to the
    others; after `close` StoreUnavailable.

    State: by name the piece that runs, and the one that begins when it has ended."""

    def __init__(self, work: Callable[[K], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._running: dict[K, asyncio.Task[T]] = {}
        self._next: dict[K, asyncio.Task[T]] = {}

    async def join(self, name: K) -> T:
        """Of a piece that begins from now on, so that it sees whatever its callers saw."""
        task = self._next.get(name)
        if task is None:
            task = self._next[name] = asyncio.create_task(self._run(name, self._running.get(name)))
            task.add_done_callback(lambda task: self._ended(name, task))
        return await _result(task)

    async def share(self, name: K) -> T:
        """Of the piece that is under way, if there is one."""
        running = self._running.get(name)
        return await (self.join(name) if running is None else _result(running))

    async def _run(self, name: K, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait({before})
        self._running[name] = self._next.pop(name)
        return await self._work(name)

    def _ended(self, name: K, task: asyncio.Task[T]) -> None:
        for tasks in (self._running, self._next):
            if tasks.get(name) is task:
                del tasks[name]
        if not task.cancelled():
            task.exception()  # those who waited were told; when all have left, nobody is there to be

    async def close(self) -> None:
        """Nothing runs any more."""
        tasks = {*self._running.values(), *self._next.values()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _result(task: asyncio.Task[T]) -> T:
    # wait(), unlike awaiting the task, does not pass the caller's cancellation on to it.
    await asyncio.wait({task})
    if task.cancelled():
        raise StoreUnavailable("The gateway is stopping; try again shortly.")
    return task.result()

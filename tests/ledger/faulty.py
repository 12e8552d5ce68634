"""Stores that fail where a test says, behind the interface of the real ones; and cancellation at any wait."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from typing import Any

from gateway.errors import StoreUnavailable
from gateway.stores import Postgres, Redis, Reply, Row
from gateway.stores.link import LinkLost, LinkTimeout


class FaultyRedis(Redis):
    """The `fault_at`-th command from now on meets `fault`; all others are as ever."""

    sent = 0
    fault_at = 0
    fault = ""
    #: As if there were no connection at all.
    away = False
    #: Commands that are still on their way: they arrive when the test lets them.
    late: list[tuple[bytes | str | int, ...]]

    def arm(self, fault_at: int, fault: str) -> None:
        self.sent, self.fault_at, self.fault, self.late = 0, fault_at, fault, []

    @property
    def usable(self) -> bool:
        return not self.away and super().usable

    async def connected(self) -> None:
        if self.away:
            raise StoreUnavailable(detail="away")
        await super().connected()

    def send(self, *args: bytes | str | int) -> asyncio.Future[Reply]:
        self.sent += 1
        if self.away:
            raise StoreUnavailable(detail="away")
        if self.sent != self.fault_at:
            return super().send(*args)
        if self.fault == "away":
            raise StoreUnavailable(detail="no connection")
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if self.fault == "reply lost":
            super().send(*args).add_done_callback(lambda _: _lose(answer))
        elif self.fault == "arrives late":
            self.late.append(args)
            answer.set_exception(LinkTimeout("late"))
        else:
            answer.set_exception(LinkLost("reset"))
        return answer

    async def let_late_ones_arrive(self) -> None:
        for args in self.late:
            await super().send(*args)
        self.late = []


class FaultyPostgres(Postgres):
    """The `fault_at`-th statement from now on meets `fault`: it fails before it reached the server or after its commit,
    or arrives later, when the test lets it."""

    asked = 0
    fault_at = 0
    fault = ""
    late: list[tuple[str, tuple[Any, ...]]]

    def arm(self, fault_at: int, fault: str) -> None:
        self.asked, self.fault_at, self.fault, self.late = 0, fault_at, fault, []

    async def rows(self, sql: str, *args: Any, timeout_ms: int | None = None) -> list[Row]:
        self.asked += 1
        if self.asked != self.fault_at:
            return await super().rows(sql, *args, timeout_ms=timeout_ms)
        if self.fault == "before":
            raise StoreUnavailable(detail="no connection")
        if self.fault == "after":
            await super().rows(sql, *args, timeout_ms=timeout_ms)
        else:
            self.late.append((sql, args))
        raise StoreUnavailable(detail="connection lost", ambiguous=True)

    async def row(self, sql: str, *args: Any, timeout_ms: int | None = None) -> Row | None:
        found = await self.rows(sql, *args, timeout_ms=timeout_ms)
        return found[0] if found else None

    async def let_late_ones_arrive(self) -> None:
        late, self.late = self.late, []
        for sql, args in late:
            await super().rows(sql, *args)


def _lose(answer: asyncio.Future[Reply]) -> None:
    if not answer.done():
        answer.set_exception(LinkTimeout("late"))


@asynccontextmanager
async def refusing_writes(redis: Redis) -> AsyncIterator[None]:
    """Inside the block the server refuses every write, as a replica or one whose disk is full does."""
    await redis.call("CONFIG", "SET", "min-replicas-to-write", "1")
    try:
        yield
    finally:
        await redis.call("CONFIG", "SET", "min-replicas-to-write", "0")


class Interrupted:
    """Runs `work` in a task and cancels it in its k-th wait: at once, or `turns` of the loop into it, once or twice."""

    def __init__(self, work: Coroutine[Any, Any, Any], at: int, turns: int = 0, times: int = 1) -> None:
        self._work, self._at, self._turns, self._times = work, at, turns, times
        self.waits = 0
        self._cancels: list[asyncio.Task[None]] = []

    async def run(self) -> bool:
        """Whether there was a k-th wait. `work` and all that was started here has ended."""
        task = asyncio.create_task(self._watched())
        await asyncio.wait({task}, timeout=20)
        assert task.done(), f"hangs after a cancellation in wait {self._at}"
        for cancel in self._cancels:
            await cancel
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        return self.waits >= self._at

    async def _watched(self) -> None:
        await Steps(self._work, self._waiting)

    def _waiting(self) -> None:
        self.waits += 1
        if self.waits == self._at:
            task = asyncio.current_task()
            assert task is not None
            self._cancels.append(asyncio.create_task(self._cancel(task)))

    async def _cancel(self, task: asyncio.Task[Any]) -> None:
        for _ in range(self._times):
            for _ in range(self._turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)


class Steps:
    """Awaiting it runs `work`; `waiting` is told of everything that `work` waits for."""

    def __init__(self, work: Coroutine[Any, Any, Any], waiting: Callable[[], None]) -> None:
        self._work, self._waiting = work, waiting

    def __await__(self) -> Generator[Any, Any, Any]:
        thrown: BaseException | None = None
        while True:
            try:
                waited_for = self._work.throw(thrown) if thrown is not None else self._work.send(None)
            except StopIteration as done:
                return done.value
            self._waiting()
            try:
                yield waited_for
                thrown = None
            except BaseException as exc:
                thrown = exc

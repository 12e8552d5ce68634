"""Stores that fail where a test says, behind the interface of the real ones."""

import asyncio
from collections.abc import AsyncIterator
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
    #: Commands that are still on their way: they arrive when the test lets them.
    late: list[tuple[bytes | str | int, ...]]

    def arm(self, fault_at: int, fault: str) -> None:
        self.sent, self.fault_at, self.fault, self.late = 0, fault_at, fault, []

    def send(self, *args: bytes | str | int) -> asyncio.Future[Reply]:
        self.sent += 1
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
    """The next statement fails: before it reached the server, or after its commit."""

    fault = ""

    async def rows(self, sql: str, *args: Any, timeout_ms: int | None = None) -> list[Row]:
        fault, self.fault = self.fault, ""
        if fault == "before":
            raise StoreUnavailable(detail="no connection")
        found = await super().rows(sql, *args, timeout_ms=timeout_ms)
        if fault == "after":
            raise StoreUnavailable(detail="connection lost during COMMIT")
        return found


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

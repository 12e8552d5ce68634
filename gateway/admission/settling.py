"""The end of a hold: told to Redis, kept while Redis cannot take it, posted to PostgreSQL where Redis lost the account.

State: `_ending` counts holds that are being told right now; `_backlog` has those that no store could take, oldest
first, bounded. A hold is in exactly one of the two until it has ended.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import structlog

from gateway import keys, limits
from gateway.admission.hold import Hold, Rules, actual_of, counter_keys, entry_of
from gateway.errors import StoreUnavailable
from gateway.shield import shielded
from gateway.stores import Redis, Script
from gateway.types import Demand, Entry

BACKLOG_MAX = 100_000
BACKLOG_RETRY_S = 0.2
#: Settles in one write: a burst of thousands would keep every admission behind it past its deadline.
TOGETHER = 100
#: Entries in one transaction when settles go to PostgreSQL because the process ends.
POST_TOGETHER = 500

log = structlog.get_logger("gateway.settling")


class Settling:
    """`end()` when a request is over; `run()` retries what was kept; `post_backlog()` before the process ends."""

    def __init__(
        self,
        redis: Redis,
        rules: Rules,
        *,
        post: Callable[[Sequence[Entry]], Awaitable[object]],
        mark_dirty: Callable[[str], None],
    ) -> None:
        self._redis = redis
        self._rules = rules
        self._post = post
        self._mark_dirty = mark_dirty
        self._script = Script("settle", limits.script_text("settle"))
        self._ending = 0
        self._backlog: dict[tuple[str, str], Hold] = {}
        self._working_off = asyncio.Lock()

    @property
    def backlog_count(self) -> int:
        """Settles that wait in this process because no store could take them."""
        return len(self._backlog)

    @property
    def idle(self) -> bool:
        """Every hold that was to end has ended."""
        return not self._ending and not self._backlog

    async def end(self, *holds: Hold) -> None:
        """The holds have ended or are kept to be ended later, whatever happens to the caller meanwhile."""
        work = self._end(holds[0]) if len(holds) == 1 else _all(self._end(hold) for hold in holds)
        # What fails is in the backlog by now, also when a cancellation hides the failure from us.
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            await shielded(work, self._rules.settle_timeout_ms / 1000)

    async def _end(self, hold: Hold) -> None:
        """The hold has ended, or is kept to be ended later; nothing that happens here makes it neither."""
        self._ending += 1
        try:
            await self.give_back(hold)
        except BaseException as exc:
            log.warning("settle kept for later", hold=hold.hold_id, error=str(exc) or type(exc).__name__)
            self.keep(hold)
            raise
        finally:
            self._ending -= 1

    async def give_back(self, hold: Hold) -> None:
        """The hold has ended, in Redis or, when Redis lost the account, in PostgreSQL. Any number of times."""
        entry = entry_of(hold)
        verdict = await self._tell(hold, entry)
        if verdict == b"MISS":
            await self._post([entry])
            # Nothing is due in Redis any more, but its leases and counters may have outlived the account.
            await self._tell(hold, replace(entry, amount_ucredits=0))
        elif entry.amount_ucredits:
            self._mark_dirty(hold.owner)

    async def _tell(self, hold: Hold, entry: Entry) -> bytes:
        args: limits.Row = [
            hold.hold_id,
            -entry.amount_ucredits,
            msgspec.json.encode(entry.meta),
            self._rules.mirror_ttl_s,
        ]
        now_ms = time.time_ns() // 1_000_000
        # Without an answer to the admission nobody here knows which shadows it took: they are left to their windows.
        demands = hold.demands if hold.states else hold.demands[: hold.enforced]
        counters = hold.counters
        if len(demands) < len(hold.demands) or any(state.retry_ms for state in hold.states):
            demands = tuple(_taken(demands, hold))
            counters = counter_keys(hold.owner, demands)
        for demand in demands:
            args += limits.row(demand, now_ms)
            args.append(actual_of(demand, hold.charge))
        mirror = keys.mirror(hold.owner)
        verdict, settled_at_us = await self._redis.run(self._script, [*hold.keys, mirror, *counters], args)
        hold.settled_at_us = int(settled_at_us)
        return bytes(verdict)

    def keep(self, hold: Hold) -> None:
        """The hold will be ended as soon as a store can take it; also when nobody knows whether it was admitted."""
        if len(self._backlog) >= BACKLOG_MAX:
            log.error("settle backlog is full, a hold is left to its lease", hold=hold.hold_id)
            return
        self._backlog[hold.owner, hold.hold_id] = hold

    async def run(self) -> None:
        """What was kept is tried again, for ever."""
        while True:
            await asyncio.sleep(BACKLOG_RETRY_S)
            await self.work_off()

    async def work_off(self) -> None:
        """Every kept settle was tried once more; the rest is left when none of a whole batch could be taken."""
        async with self._working_off:
            waiting = list(self._backlog.values())
            for at in range(0, len(waiting), TOGETHER):
                batch = waiting[at : at + TOGETHER]
                done = await asyncio.gather(*(self.give_back(hold) for hold in batch), return_exceptions=True)
                failed = 0
                for hold, result in zip(batch, done, strict=True):
                    del self._backlog[hold.owner, hold.hold_id]
                    if isinstance(result, StoreUnavailable):
                        failed += 1
                        self._backlog[hold.owner, hold.hold_id] = (
                            hold  # behind the others: it may be the only one that fails
                        )
                    elif result is not None:
                        log.error("settle given up, left to its lease", hold=hold.hold_id, exc_info=result)
                if failed == len(batch):
                    return

    async def post_backlog(self) -> None:
        """What Redis did not take before the end is in the ledger. The sweeper that finds the hold later posts nothing
        beside it, not even for a request that owes nothing."""
        async with self._working_off:
            holds = [hold for hold in self._backlog.values() if hold.ucredits]
            try:
                for at in range(0, len(holds), POST_TOGETHER):
                    batch = holds[at : at + POST_TOGETHER]
                    await self._post([entry_of(hold) for hold in batch])
                    for hold in batch:
                        del self._backlog[hold.owner, hold.hold_id]
            except StoreUnavailable as exc:
                log.error("settles left to their leases", count=len(self._backlog), error=str(exc))


def _taken(demands: Sequence[Demand], hold: Hold) -> Iterator[Demand]:
    """Those that the admission took: all but the shadows that did not fit."""
    for number, demand in enumerate(demands):
        if not demand.limit.shadow or not hold.states[number].retry_ms:
            yield demand


async def _all(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them have ended; then the first failure is raised."""
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result

"""The end of a hold: told to Redis, kept while Redis cannot take it, posted to PostgreSQL where Redis lost the account.

    held in Redis  ──settle.lua──▶ ended there; a charge stays `unconfirmed` until PostgreSQL has it
        ├─ Redis has lost the account ─▶ posted ─▶ the new balance shown to Redis ─▶ ended there
        └─ nobody took it ─▶ backlog ─▶ tried again; what is owed is posted all the same
    held in PostgreSQL ──post──▶ ended there; its limits ──settle.lua without a charge──▶ ended in Redis

State: `_ending` has holds that are being told right now, by owner; `_backlog` those that no store could take, oldest
first, bounded. A hold is in one of the two until it has ended.
"""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import structlog

from gateway import keys, limits
from gateway.admission.hold import Hold, Rules, actual_of, counter_keys, entry_of
from gateway.admission.leases import wall_ms
from gateway.admission.posting import posted
from gateway.admission.powers import Powers
from gateway.admission.unconfirmed import Unconfirmed, by_org
from gateway.errors import StoreUnavailable
from gateway.shield import shielded
from gateway.stores import INCARNATION, Redis, Script
from gateway.types import Demand, Entry

#: Holds that owe nothing; charges are kept beyond it, since new ones are refused before there are so many.
BACKLOG_MAX = 100_000
BACKLOG_RETRY_S = 0.2
#: Settles in one write: a burst of thousands would keep every admission behind it past its deadline.
TOGETHER = 100
ENDED_POLL_S = 0.01

log = structlog.get_logger("gateway.settling")


class Settling:
    """`end()` when a request is over; `run()` retries what was kept; `post_backlog()` before the process ends."""

    def __init__(self, redis: Redis, rules: Rules, powers: Powers) -> None:
        self._redis = redis
        self._rules = rules
        self._powers = powers
        self._script = Script("settle", limits.script_text("settle"))
        self._ending: dict[str, set[Hold]] = {}
        self._backlog: dict[tuple[str, str], Hold] = {}
        self._working_off = asyncio.Lock()
        self._unconfirmed = Unconfirmed(redis, powers)

    @property
    def backlog_count(self) -> int:
        """Settles that wait in this process because no store could take them."""
        return len(self._backlog)

    @property
    def unconfirmed_count(self) -> int:
        """Charges that Redis was told and PostgreSQL may not have yet."""
        return len(self._unconfirmed)

    @property
    def is_full(self) -> bool:
        """As much is owed to PostgreSQL as may be: nothing more must be charged."""
        return len(self._unconfirmed) + len(self._backlog) >= self._rules.unconfirmed_entries_max

    @property
    def idle(self) -> bool:
        """Every hold that was to end has ended."""
        return not self._ending and not self._backlog

    async def end(self, *holds: Hold) -> None:
        """The holds have ended or are kept to be ended later, whatever happens to the caller meanwhile."""
        if not holds:
            return
        work = self._end(holds[0]) if len(holds) == 1 else _all(*(self._end(hold) for hold in holds))
        # What fails is in the backlog by now, also when a cancellation hides the failure from us.
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            await shielded(work, self._rules.settle_timeout_ms / 1000)

    async def _end(self, hold: Hold) -> None:
        """The hold has ended, or is kept to be ended later; nothing that happens here makes it neither."""
        ending = self._ending.setdefault(hold.owner, set())
        ending.add(hold)
        try:
            await self.give_back(hold)
        except BaseException as exc:
            log.warning("settle kept for later", hold=hold.hold_id, error=str(exc) or type(exc).__name__)
            self.keep(hold)
            raise
        finally:
            ending.discard(hold)
            if not ending:
                del self._ending[hold.owner]

    async def give_back(self, hold: Hold) -> None:
        """The hold has ended, in Redis or, where it is held in PostgreSQL or Redis has lost the account, there. Any
        number of times."""
        entry = entry_of(hold)
        if (journal := self._powers.journal) is not None and hold.quote.want_ucredits and not hold.noted:
            # A disk that fails is the journal's to report and to make good; the charge must not wait for it in memory.
            with contextlib.suppress(StoreUnavailable):
                await journal.settled(entry)
            hold.noted = True
        if hold.where == "postgres":
            await self._end_in_postgres(hold, entry)
        elif hold.posted is not None:
            await self._make_known(hold, entry)
        else:
            await self._end_in_redis(hold, entry)

    async def _end_in_redis(self, hold: Hold, entry: Entry) -> None:
        verdict, outbox_id, birth = await self._tell(hold, entry)
        if verdict == b"MISS":
            await self._post([hold])
            await self._make_known(hold, entry)
        elif entry.amount_ucredits:
            # Of one that Redis had been told before (DUP) nobody knows where it is.
            self._unconfirmed.add(entry, birth, outbox_id)
            self._powers.mark_dirty(hold.owner)

    async def _end_in_postgres(self, hold: Hold, entry: Entry) -> None:
        limits_in_redis = hold.demands and hold.judged_by == "redis"
        await _all(self._charge_there(hold), *([self._end_limits(hold, entry)] if limits_in_redis else []))

    async def _charge_there(self, hold: Hold) -> None:
        if hold.posted is None:
            await self._post([hold])
        if hold.posted is not None:
            try:
                await self._powers.install(hold.posted)
            except StoreUnavailable:
                # It need not know at once: what is held in PostgreSQL was never its to spend.
                self._powers.refresh(hold.owner)

    async def _end_limits(self, hold: Hold, entry: Entry) -> None:
        await self._tell(hold, replace(entry, amount_ucredits=0))

    async def _make_known(self, hold: Hold, entry: Entry) -> None:
        """Nothing is due in Redis any more, but its leases and counters may have outlived the account. The balance goes
        first: without it, what the hold gives up could be spent once more."""
        if hold.posted is not None:
            await self._powers.install(hold.posted)
        await self._end_limits(hold, entry)

    async def _tell(self, hold: Hold, entry: Entry) -> tuple[bytes, bytes, bytes]:
        """Status, outbox entry and birth of the account, as settle.lua has them."""
        args: limits.Row = [
            hold.hold_id,
            -entry.amount_ucredits,
            msgspec.json.encode(entry.meta),
            limits.mirror_ttl_s(self._rules.mirror_ttl_s),
        ]
        now_ms = wall_ms()
        # Without an answer to the admission nobody here knows which shadows it took: they are left to their windows.
        demands = hold.demands if hold.states else hold.demands[: hold.enforced]
        counters = hold.counters
        if len(demands) < len(hold.demands) or any(state.retry_ms for state in hold.states):
            demands = tuple(_taken(demands, hold))
            counters = counter_keys(hold.owner, demands)
        for demand in demands:
            args += limits.row(demand, now_ms)
            args.append(actual_of(demand, hold.charge))
        args.append(INCARNATION)
        mirror = keys.mirror(hold.owner)
        verdict, settled_at_us, outbox_id, birth = await self._redis.run(
            self._script, [*hold.keys, mirror, *counters], args
        )
        hold.settled_at_us = int(settled_at_us)
        return verdict, outbox_id, birth

    # Charges that PostgreSQL has

    async def _post(self, holds: Sequence[Hold]) -> None:
        """What these holds owe is in PostgreSQL, but for what the ledger refuses. Raises StoreUnavailable; what was
        posted before that is noted."""
        by_name = {(hold.owner, hold.hold_id): hold for hold in holds}
        async for part, states in posted(self._powers.post, [entry_of(hold) for hold in holds]):
            for entry in part:
                by_name[entry.org_id, entry.request_id].posted = states[entry.org_id]
            for org_id, request_ids in by_org(part):
                self.confirmed(org_id, request_ids)

    def confirmed(self, org_id: str, request_ids: Sequence[str]) -> None:
        """PostgreSQL has what these requests were charged. Others' may be among them."""
        self._unconfirmed.confirmed(org_id, request_ids)

    async def resubmit(self, org_id: str) -> None:
        """Whatever this process has charged the org is in PostgreSQL: what Redis may have lost, and what it could not
        be told. Raises StoreUnavailable when that is not so."""
        telling = set(self._ending.get(org_id, ()))
        while not telling.isdisjoint(self._ending.get(org_id, ())):
            await asyncio.sleep(ENDED_POLL_S)
        await self._post(self._owing(org_id))
        await self._unconfirmed.resubmit(org_id)

    async def post_unconfirmed(self) -> None:
        """Whatever this process has charged through Redis is in PostgreSQL. Raises StoreUnavailable."""
        await self._unconfirmed.post_all()

    def _owing(self, org_id: str | None = None) -> list[Hold]:
        return [
            hold
            for hold in self._backlog.values()
            if hold.posted is None and (org_id is None or hold.owner == org_id) and entry_of(hold).amount_ucredits
        ]

    # What could not be ended at once

    def keep(self, hold: Hold) -> None:
        """The hold will be ended as soon as a store can take it; also when nobody knows whether it was admitted."""
        if len(self._backlog) >= BACKLOG_MAX and not entry_of(hold).amount_ucredits:
            log.error("settle backlog is full, a hold is left to its lease", hold=hold.hold_id)
            return
        self._backlog[hold.owner, hold.hold_id] = hold

    async def run(self) -> None:
        """What was kept is tried again, and what is unconfirmed asked after, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_working_off())
            group.create_task(self._unconfirmed.run())

    async def _keep_working_off(self) -> None:
        while True:
            await asyncio.sleep(BACKLOG_RETRY_S)
            await self.work_off()
            # Redis does not take it, once more: what is owed need not wait in memory for that.
            try:
                await self._post(self._owing())
            except StoreUnavailable as exc:
                log.debug("kept settles not posted", count=len(self._backlog), error=str(exc))

    async def work_off(self) -> None:
        """Every kept settle was tried once more; the rest is left when none of a whole batch could be taken."""
        async with self._working_off:
            waiting = list(self._backlog.values())
            for at in range(0, len(waiting), TOGETHER):
                batch = waiting[at : at + TOGETHER]
                done = await asyncio.gather(*(self.give_back(hold) for hold in batch), return_exceptions=True)
                failed = 0
                for hold, result in zip(batch, done, strict=True):
                    self._backlog.pop((hold.owner, hold.hold_id), None)
                    if isinstance(result, StoreUnavailable):
                        failed += 1
                        # Behind the others: it may be the only one that fails.
                        self._backlog[hold.owner, hold.hold_id] = hold
                    elif result is not None:
                        log.error("settle given up, left to its lease", hold=hold.hold_id, exc_info=result)
                if failed == len(batch):
                    return

    async def post_backlog(self) -> None:
        """What Redis did not take before the end is in the ledger. The sweeper that finds the hold later posts nothing
        beside it, not even for a request that owes nothing."""
        async with self._working_off:
            holds = [hold for hold in self._backlog.values() if hold.quote.want_ucredits and hold.posted is None]
            try:
                await self._post(holds)
            except StoreUnavailable as exc:
                log.error("settles left to their leases", count=len(self._backlog), error=str(exc))
            for hold in holds:
                if hold.posted is not None:
                    del self._backlog[hold.owner, hold.hold_id]


def _taken(demands: Sequence[Demand], hold: Hold) -> Iterator[Demand]:
    """Those that the admission took: all but the shadows that did not fit."""
    for number, demand in enumerate(demands):
        if not demand.limit.shadow or not hold.states[number].retry_ms:
            yield demand


async def _all(*works: Coroutine[Any, Any, None]) -> None:
    """All of them have ended; then the first failure is raised."""
    if len(works) == 1:
        await works[0]
        return
    for result in await asyncio.gather(*works, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result

"""Admission: every demand and the credit hold are taken in one trip, or none is; what is taken is given back once.

    NEW ──admit──▶ HELD ──settle──▶ SETTLED        charge, the rest of the hold and of the estimates given back
                    │ └──release──▶ RELEASED       the upstream never saw the request: all given back
                    └──lease over──▶ ORPHANED      this process died; the ledger's sweeper charges the checkpoint

A settle that Redis cannot take now is kept here, in memory and bounded, and tried until it is taken; when Redis has
lost the account it goes to PostgreSQL directly. Reading balances and posting are the ledger's, passed in as functions.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import structlog

from gateway import keys, limits
from gateway.errors import StoreUnavailable
from gateway.shield import shielded
from gateway.stores import Redis, Script
from gateway.types import UCREDITS_PER_CREDIT, Charge, Demand, Entry, Principal, Refusal

#: How often an org is marked as active; the sweeper forgets only orgs that were silent for much longer.
ACTIVE_MARK_S = 30.0
ACTIVE_MARKS_MAX = 100_000
BACKLOG_MAX = 100_000
BACKLOG_RETRY_S = 0.2
DRAIN_POLL_S = 0.02
#: Settles or renewals in one write: a burst of thousands would keep every admission behind it past its deadline.
TOGETHER = 100
#: Entries in one transaction when settles go to PostgreSQL because the process ends.
POST_TOGETHER = 500

log = structlog.get_logger("gateway.admission")


@dataclass(frozen=True, slots=True)
class Rules:
    """How long things are held. All from `credits:` in gateway.yaml."""

    lease_ms: int
    heartbeat_ms: int
    settle_timeout_ms: int
    outbox_entries_max: int
    mirror_ttl_s: int


@dataclass(slots=True)
class Hold:
    """What one admitted request has taken. The walk sets `charge` and `meta`; leaving the block settles them."""

    hold_id: str
    principal: Principal
    demands: tuple[Demand, ...]
    ucredits: int
    #: Redis time of admission in ms; 0 while it is unknown whether the server admitted.
    taken_at_ms: int = 0
    #: Used of each demand's limit before this request, in order of `demands`.
    used: tuple[int, ...] = ()
    #: What the org can still spend beside this hold; None for a request that costs nothing.
    available_ucredits: int | None = None
    #: What leaving the block books. None: the upstream never saw the request, everything is given back.
    charge: Charge | None = None
    #: Goes into the ledger entry beside the amount.
    meta: Mapping[str, Any] = field(default_factory=dict)
    #: The Redis keys that every script takes, made when the hold is taken: account, holds, deadlines, outbox,
    #: tombstone; and one counter per demand.
    keys: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)

    @property
    def token_estimate(self) -> int:
        return max((demand.cost for demand in self.demands if demand.unit == "tokens"), default=0)


class Admission:
    """`hold()` for the walk; `run()` renews leases and retries settles until it is cancelled; then `drain()`."""

    def __init__(
        self,
        redis: Redis,
        rules: Rules,
        *,
        load_balance: Callable[[str, str], Awaitable[None]],
        post: Callable[[Sequence[Entry]], Awaitable[object]],
        mark_dirty: Callable[[str], None],
        recheck: Callable[[str], None] = lambda org_id: None,
    ) -> None:
        self._redis = redis
        self._rules = rules
        self._load_balance = load_balance
        self._post = post
        self._mark_dirty = mark_dirty
        self._recheck = recheck
        self._admit = Script("admit", limits.script_text("admit"))
        self._settle = Script("settle", limits.script_text("settle"))
        self._renew = Script("renew", limits.script_text("renew"))
        self._open: dict[str, Hold] = {}
        #: Ending right now: neither open nor, should it fail, in the backlog yet.
        self._ending = 0
        self._backlog: dict[str, Hold] = {}
        self._working_off = asyncio.Lock()
        self._active_marks: dict[str, float] = {}

    @property
    def scripts(self) -> tuple[Script, ...]:
        return (self._admit, self._settle, self._renew)

    @property
    def open_count(self) -> int:
        """Requests of this process that hold something now."""
        return len(self._open)

    @property
    def backlog_count(self) -> int:
        """Settles that wait in this process because no store could take them."""
        return len(self._backlog)

    @asynccontextmanager
    async def hold(
        self, hold_id: str, principal: Principal, demands: tuple[Demand, ...], price_ucredits: int
    ) -> AsyncIterator[Hold | Refusal]:
        """Inside the block everything in `demands` (policy order) and `price_ucredits` is held; a Refusal instead
        means that nothing was taken. Leaving the block settles `Hold.charge`, shielded from cancellation.

        Raises StoreUnavailable within the stores' deadlines. Shape after Envoy's DoLimit: a list in, all or nothing.
        """
        hold = Hold(hold_id, principal, demands, price_ucredits)
        if not demands and price_ucredits == 0:
            yield hold  # nothing to take, so nothing to ask and nothing to give back
            return
        try:
            refusal = await self._take(hold)
        except StoreUnavailable as exc:
            if exc.ambiguous:
                self._keep(hold)
            raise
        except BaseException:
            # No reply: the server may have admitted, or may still. A release makes a late admission impossible.
            self._keep(hold)
            raise
        if refusal is not None:
            yield refusal
            return
        self._open[hold_id] = hold
        try:
            yield hold
        finally:
            del self._open[hold_id]
            # What fails is in the backlog by now, also when a cancellation hides the failure from us.
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                await shielded(self._end(hold), self._rules.settle_timeout_ms / 1000)

    async def _take(self, hold: Hold) -> Refusal | None:
        hold.keys, hold.counters = account_keys(hold), counter_keys(hold)
        reply = await self._ask(hold)
        if reply[0] == b"MISS":
            await self._load_balance(hold.principal.org_id, hold.principal.plan)
            reply = await self._ask(hold)
        status = reply[0].decode()
        numbers = [int(value) for value in reply[1:]]
        hold.used = tuple(numbers[2::2])
        if status in ("OK", "DUP"):
            hold.taken_at_ms = numbers[0]
            if hold.ucredits:
                hold.available_ucredits = numbers[1] - hold.ucredits
            return None
        if status == "DENY":
            return limit_refusal(hold.demands, hold.used, tuple(numbers[3::2]))
        if status in ("NOCREDIT", "INFLIGHT"):
            if status == "NOCREDIT":
                self._recheck(hold.principal.org_id)
            return credit_refusal(status, hold.ucredits, numbers[1])
        raise StoreUnavailable(detail=f"admission of {hold.hold_id}: {status}")

    async def _ask(self, hold: Hold) -> list[bytes]:
        org_id, rules = hold.principal.org_id, self._rules
        self._mark_active(org_id)
        args: list[str | int | bytes] = [hold.hold_id, hold.ucredits, rules.lease_ms, rules.outbox_entries_max]
        for demand in hold.demands:
            args += (limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost)
        reply: list[bytes] = await self._redis.run(self._admit, [*hold.keys, *hold.counters], args)
        return reply

    def _mark_active(self, org_id: str) -> None:
        """The sweeper of every gateway will look at this org. Rides on the admission's own write."""
        now = time.monotonic()
        if now - self._active_marks.get(org_id, -ACTIVE_MARK_S) < ACTIVE_MARK_S or not self._redis.usable:
            return
        if len(self._active_marks) >= ACTIVE_MARKS_MAX:
            self._active_marks.clear()
        self._active_marks[org_id] = now
        self._redis.send_detached("ZADD", keys.ACTIVE_ORGS, int(time.time() * 1000), org_id)

    async def _end(self, hold: Hold) -> None:
        """The hold has ended, or is kept to be ended later; nothing that happens here makes it neither."""
        self._ending += 1
        try:
            await self._give_back(hold)
        except BaseException as exc:
            log.warning("settle kept for later", hold=hold.hold_id, error=str(exc) or type(exc).__name__)
            self._keep(hold)
            raise
        finally:
            self._ending -= 1

    async def _give_back(self, hold: Hold) -> None:
        """The hold has ended, in Redis or, when Redis lost the account, in PostgreSQL. Any number of times."""
        org_id, entry = hold.principal.org_id, _entry(hold)
        verdict = await self._tell(hold, entry)
        if verdict == b"MISS":
            await self._post([entry])
            # Nothing is due in Redis any more, but its leases and counters may have outlived the account.
            await self._tell(hold, replace(entry, amount_ucredits=0))
        elif entry.amount_ucredits:
            self._mark_dirty(org_id)

    async def _tell(self, hold: Hold, entry: Entry) -> bytes:
        args: list[str | int | bytes] = [
            hold.hold_id,
            -entry.amount_ucredits,
            msgspec.json.encode(entry.meta),
            self._rules.mirror_ttl_s,
            hold.taken_at_ms,
        ]
        for demand in hold.demands:
            actual = _actual(demand, hold.charge)
            args += (limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost, actual)
        mirror = keys.mirror(hold.principal.org_id)
        verdict: bytes = await self._redis.run(self._settle, [*hold.keys, mirror, *hold.counters], args)
        return verdict

    def _keep(self, hold: Hold) -> None:
        if len(self._backlog) >= BACKLOG_MAX:
            log.error("settle backlog is full, a hold is left to its lease", hold=hold.hold_id)
            return
        self._backlog[hold.hold_id] = hold

    async def run(self) -> None:
        """Leases are renewed and kept settles retried, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_renewing())
            group.create_task(self._keep_retrying())

    async def _keep_retrying(self) -> None:
        while True:
            await asyncio.sleep(BACKLOG_RETRY_S)
            await self._work_off_backlog()

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._rules.heartbeat_ms / 1000)
            holds = list(self._open.values())
            for at in range(0, len(holds), TOGETHER):
                await asyncio.gather(*(self._heartbeat(hold) for hold in holds[at : at + TOGETHER]))

    async def drain(self, timeout_s: float) -> None:
        """Requests that are being ended have settled, and settles that were kept are in Redis or at least in the
        ledger. What remains ends with its lease."""
        deadline = time.monotonic() + timeout_s
        while (self._open or self._ending or self._backlog) and time.monotonic() < deadline:
            await self._work_off_backlog()
            await asyncio.sleep(DRAIN_POLL_S)
        await self._post_backlog()

    async def _work_off_backlog(self) -> None:
        """Every kept settle was tried once more; the rest is left when none of a whole batch could be taken."""
        async with self._working_off:
            waiting = list(self._backlog.values())
            for at in range(0, len(waiting), TOGETHER):
                batch = waiting[at : at + TOGETHER]
                done = await asyncio.gather(*(self._give_back(hold) for hold in batch), return_exceptions=True)
                failed = 0
                for hold, result in zip(batch, done, strict=True):
                    del self._backlog[hold.hold_id]
                    if isinstance(result, StoreUnavailable):
                        failed += 1
                        self._backlog[hold.hold_id] = hold  # behind the others: it may be the only one that fails
                    elif result is not None:
                        log.error("settle given up, left to its lease", hold=hold.hold_id, exc_info=result)
                if failed == len(batch):
                    return

    async def _post_backlog(self) -> None:
        """What Redis did not take before the end is in the ledger. The sweeper that finds the hold later posts nothing
        beside it, not even for a request that owes nothing."""
        async with self._working_off:
            holds = [hold for hold in self._backlog.values() if hold.ucredits]
            try:
                for at in range(0, len(holds), POST_TOGETHER):
                    batch = holds[at : at + POST_TOGETHER]
                    await self._post([_entry(hold) for hold in batch])
                    for hold in batch:
                        del self._backlog[hold.hold_id]
            except StoreUnavailable as exc:
                log.error("settles left to their leases", count=len(self._backlog), error=str(exc))

    async def _heartbeat(self, hold: Hold) -> None:
        org_id = hold.principal.org_id
        self._mark_active(org_id)
        args: list[str | int | bytes] = [hold.hold_id, self._rules.lease_ms, hold.ucredits]
        for demand in hold.demands:
            args += (limits.algorithm(demand), demand.limit, demand.window_ms)
        try:
            await self._redis.run(self._renew, [*hold.keys[:3], *hold.counters], args)
        except StoreUnavailable as exc:
            log.debug("lease not renewed", hold=hold.hold_id, error=str(exc))


def account_keys(hold: Hold) -> list[str]:
    """What every script that ends or begins a hold works on, in the order it takes them."""
    org_id = hold.principal.org_id
    return [
        keys.account(org_id),
        keys.holds(org_id),
        keys.deadlines(org_id),
        keys.outbox(org_id),
        keys.tombstone(org_id, hold.hold_id),
    ]


def counter_keys(hold: Hold) -> list[str]:
    """One Redis key per demand. The algorithm and the window are part of it, so a changed policy starts afresh."""
    return [
        keys.limit(
            hold.principal.org_id,
            f"{demand.name}:{limits.algorithm(demand)}:{demand.window_ms}",
            demand.scope,
            demand.subject,
        )
        for demand in hold.demands
    ]


def limit_refusal(demands: Sequence[Demand], used: Sequence[int], retry_ms: Sequence[int]) -> Refusal:
    """The 429 for demands that did not fit, named after the one that takes longest to fit."""
    longest = max(range(len(demands)), key=lambda index: retry_ms[index])
    demand = demands[longest]
    unit = "requests in flight" if demand.unit == "concurrent" else f"{demand.unit} per {demand.window_ms / 1000:g} s"
    return Refusal(
        status=429,
        code="rate_limit_exceeded",
        message=f"Limit '{demand.name}' of this {demand.scope} is reached: "
        f"{used[longest]} of {demand.limit} {unit} are used and this request needs {demand.cost}.",
        retry_after_ms=retry_ms[longest],
        details={
            "limit": demand.name,
            "scope": demand.scope,
            "unit": demand.unit,
            "used": used[longest],
            "max": demand.limit,
            "requested": demand.cost,
            "violated_policies": [d.name for d, wait in zip(demands, retry_ms, strict=True) if wait > 0],
        },
    )


def credit_refusal(status: str, price_ucredits: int, available_ucredits: int) -> Refusal:
    """402 when the money is gone, 429 when it is only held by requests in flight."""
    details = {
        "required_credits": price_ucredits / UCREDITS_PER_CREDIT,
        "available_credits": max(0, available_ucredits) / UCREDITS_PER_CREDIT,
    }
    if status == "INFLIGHT":
        message = "The remaining credits of this organization are held by requests in flight."
        return Refusal(429, "credits_in_flight", message, retry_after_ms=1000, details=details)
    message = "This organization has no credits left for this request."
    return Refusal(402, "insufficient_credits", message, should_retry=False, details=details)


def _entry(hold: Hold) -> Entry:
    """The ledger's line for the hold as it ended."""
    charge = hold.charge
    meta = {**hold.meta, "basis": charge.basis} if charge else {}
    return Entry(hold.principal.org_id, hold.hold_id, "settle", -charge.ucredits if charge else 0, meta)


def _actual(demand: Demand, charge: Charge | None) -> int:
    """What the request really used of one demand (outcome table, DESIGN.md §6)."""
    if charge is None:
        return 0
    if demand.unit == "tokens":
        return demand.cost if charge.tokens is None else charge.tokens
    return demand.cost if charge.keep_requests else 0

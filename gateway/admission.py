"""Admission: every demand and the credit hold are taken in one trip, or none is; what is taken is given back once.

    NEW ──admit──▶ HELD ──settle──▶ SETTLED        charge, the rest of the hold and of the estimates given back
                    │ └──release──▶ RELEASED       the upstream never saw the request: all given back
                    └──lease over──▶ ORPHANED      this process died; the ledger's sweeper charges the checkpoint

A settle that Redis cannot take now is kept here, in memory and bounded, and tried until it is taken; when Redis has
lost the account it goes to PostgreSQL directly. Reading balances and posting are the ledger's, passed in as functions.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
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
    ) -> None:
        self._redis = redis
        self._rules = rules
        self._load_balance = load_balance
        self._post = post
        self._mark_dirty = mark_dirty
        self._admit = Script("admit", limits.script_text("admit"))
        self._settle = Script("settle", limits.script_text("settle"))
        self._renew = Script("renew", limits.script_text("renew"))
        self._open: dict[str, Hold] = {}
        self._backlog: deque[Hold] = deque()
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
            try:
                await shielded(self._give_back(hold), self._rules.settle_timeout_ms / 1000)
            except (StoreUnavailable, TimeoutError) as exc:
                log.warning("settle kept for later", hold=hold_id, error=str(exc))
                self._keep(hold)

    async def _take(self, hold: Hold) -> Refusal | None:
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
            return credit_refusal(status, hold.ucredits, numbers[1])
        raise StoreUnavailable(detail=f"admission of {hold.hold_id}: {status}")

    async def _ask(self, hold: Hold) -> list[bytes]:
        org_id, rules = hold.principal.org_id, self._rules
        self._mark_active(org_id)
        args: list[str | int | bytes] = [hold.hold_id, hold.ucredits, rules.lease_ms, rules.outbox_entries_max]
        for demand in hold.demands:
            args += (limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost)
        reply: list[bytes] = await self._redis.run(
            self._admit,
            [
                keys.account(org_id),
                keys.holds(org_id),
                keys.deadlines(org_id),
                keys.outbox(org_id),
                keys.tombstone(org_id, hold.hold_id),
                *counter_keys(hold),
            ],
            args,
        )
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

    async def _give_back(self, hold: Hold) -> None:
        """The hold has ended, in Redis or, when Redis lost the account, in PostgreSQL. Any number of times."""
        org_id, charge = hold.principal.org_id, hold.charge
        ucredits = charge.ucredits if charge else 0
        meta = {**hold.meta, "basis": charge.basis} if charge else {}
        args: list[str | int | bytes] = [
            hold.hold_id,
            ucredits,
            msgspec.json.encode(meta),
            self._rules.mirror_ttl_s,
            hold.taken_at_ms,
        ]
        for demand in hold.demands:
            actual = _actual(demand, charge)
            args += (limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost, actual)
        verdict = await self._redis.run(
            self._settle,
            [
                keys.account(org_id),
                keys.holds(org_id),
                keys.deadlines(org_id),
                keys.outbox(org_id),
                keys.tombstone(org_id, hold.hold_id),
                keys.mirror(org_id),
                *counter_keys(hold),
            ],
            args,
        )
        if verdict == b"MISS":
            await self._post([Entry(org_id, hold.hold_id, "settle", -ucredits, meta)])
        elif ucredits:
            self._mark_dirty(org_id)

    def _keep(self, hold: Hold) -> None:
        if len(self._backlog) >= BACKLOG_MAX:
            log.error("settle backlog is full, a hold is left to its lease", hold=hold.hold_id)
            return
        self._backlog.append(hold)

    async def run(self) -> None:
        """Leases are renewed and kept settles retried, for ever."""
        last_heartbeat = time.monotonic()
        while True:
            await asyncio.sleep(min(BACKLOG_RETRY_S, self._rules.heartbeat_ms / 1000))
            await self._work_off_backlog()
            if (time.monotonic() - last_heartbeat) * 1000 >= self._rules.heartbeat_ms:
                last_heartbeat = time.monotonic()
                await asyncio.gather(*(self._heartbeat(hold) for hold in list(self._open.values())))

    async def drain(self, timeout_s: float) -> None:
        """Requests that are being ended have settled, and settles that were kept had one last chance. What remains
        after `timeout_s` ends with its lease."""
        deadline = time.monotonic() + timeout_s
        while (self._open or self._backlog) and time.monotonic() < deadline:
            await self._work_off_backlog()
            await asyncio.sleep(DRAIN_POLL_S)

    async def _work_off_backlog(self) -> None:
        for _ in range(len(self._backlog)):
            try:
                await self._give_back(self._backlog[0])
            except StoreUnavailable:
                return
            self._backlog.popleft()

    async def _heartbeat(self, hold: Hold) -> None:
        org_id = hold.principal.org_id
        self._mark_active(org_id)
        args: list[str | int | bytes] = [hold.hold_id, self._rules.lease_ms, hold.ucredits]
        for demand in hold.demands:
            args += (limits.algorithm(demand), demand.limit, demand.window_ms)
        try:
            await self._redis.run(
                self._renew,
                [keys.account(org_id), keys.holds(org_id), keys.deadlines(org_id), *counter_keys(hold)],
                args,
            )
        except StoreUnavailable as exc:
            log.debug("lease not renewed", hold=hold.hold_id, error=str(exc))


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


def _actual(demand: Demand, charge: Charge | None) -> int:
    """What the request really used of one demand (outcome table, DESIGN.md §6)."""
    if charge is None:
        return 0
    if demand.unit == "tokens":
        return demand.cost if charge.tokens is None else charge.tokens
    return demand.cost if charge.keep_requests else 0

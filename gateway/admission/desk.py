"""Taking every demand and the credit hold in one trip, and renewing their leases while the request runs."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from gateway import keys, limits
from gateway.admission.hold import Hold, Rules, account_keys, counter_keys
from gateway.admission.refusals import credit_refusal, limit_refusal
from gateway.admission.settling import Settling
from gateway.errors import StoreUnavailable
from gateway.stores import Redis, Script
from gateway.types import Demand, Principal, Refusal

#: How often an org is marked as active; the sweeper forgets only orgs that were silent for much longer.
ACTIVE_MARK_S = 30.0
ACTIVE_MARKS_MAX = 100_000
DRAIN_POLL_S = 0.02
#: Renewals in one write: a burst of thousands would keep every admission behind it past its deadline.
TOGETHER = 100

log = structlog.get_logger("gateway.admission")


class Admission:
    """`hold()` for the walk; `run()` renews leases and retries settles until it is cancelled; then `drain()`."""

    def __init__(
        self,
        redis: Redis,
        rules: Rules,
        settling: Settling,
        *,
        load_balance: Callable[[str, str], Awaitable[None]],
        recheck: Callable[[str], None],
    ) -> None:
        """load_balance: installs an org's balance in Redis. recheck: an org was refused for want of credits."""
        self._redis = redis
        self._rules = rules
        self.settling = settling
        self._load_balance = load_balance
        self._recheck = recheck
        self._admit = Script("admit", limits.script_text("admit"))
        self._renew = Script("renew", limits.script_text("renew"))
        self._open: dict[str, Hold] = {}
        self._active_marks: dict[str, float] = {}

    @property
    def open_count(self) -> int:
        """Requests of this process that hold something now."""
        return len(self._open)

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
                self.settling.keep(hold)
            raise
        except BaseException:
            # No reply: the server may have admitted, or may still. A release makes a late admission impossible.
            self.settling.keep(hold)
            raise
        if refusal is not None:
            yield refusal
            return
        self._open[hold_id] = hold
        try:
            yield hold
        finally:
            del self._open[hold_id]
            await self.settling.end(hold)

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

    async def run(self) -> None:
        """Leases are renewed and kept settles retried, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_renewing())
            group.create_task(self.settling.run())

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._rules.heartbeat_ms / 1000)
            holds = list(self._open.values())
            for at in range(0, len(holds), TOGETHER):
                await asyncio.gather(*(self._heartbeat(hold) for hold in holds[at : at + TOGETHER]))

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

    async def drain(self, timeout_s: float) -> None:
        """Requests that are being ended have settled, and settles that were kept are in Redis or at least in the
        ledger. What remains ends with its lease."""
        deadline = time.monotonic() + timeout_s
        while (self._open or not self.settling.idle) and time.monotonic() < deadline:
            await self.settling.work_off()
            await asyncio.sleep(DRAIN_POLL_S)
        await self.settling.post_backlog()

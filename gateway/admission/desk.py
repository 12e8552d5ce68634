"""Taking every demand and the credit hold, all or nothing, and renewing their leases while the request runs."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

import structlog

from gateway import keys, limits
from gateway.admission.denials import Denials
from gateway.admission.hold import Hold, Rules, account_keys, counter_keys
from gateway.admission.refusals import credit_refusal, limit_refusal
from gateway.admission.settling import Settling
from gateway.admission.states import session_known, states_of
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
        self._denials = Denials(rules.deny_cache_ms, rules.deny_cache_entries_max)
        self._open: dict[str, Hold] = {}
        self._active_marks: dict[str, float] = {}

    @property
    def open_count(self) -> int:
        """Requests of this process that hold something now."""
        return len(self._open)

    @property
    def denials_count(self) -> int:
        """Denials that this process remembers."""
        return len(self._denials)

    def hold(self, hold_id: str, principal: Principal, demands: tuple[Demand, ...], price_ucredits: int) -> "Holding":
        """Inside the block everything in `demands` and `price_ucredits` is held; a Refusal instead means that nothing
        was taken. Leaving the block settles `Hold.charge`, shielded from cancellation.

        Raises StoreUnavailable within the stores' deadlines. Shape after Envoy's DoLimit: a list in, all or nothing.
        """
        if any(demand.limit.shared for demand in demands):
            own = tuple(demand for demand in demands if not demand.limit.shared)
            hold = Hold(hold_id, principal, own, price_ucredits)
            shared = tuple(demand for demand in demands if demand.limit.shared)
            hold.shared = Hold(hold_id, principal, shared, 0, owner=keys.SHARED)
        else:
            hold = Hold(hold_id, principal, demands, price_ucredits)
        return Holding(self, hold)

    async def take(self, hold: Hold) -> Refusal | None:
        """Everything is taken, or nothing is and the answer says why. What no org owns is asked first, by a script of
        its own: it lives in another place of a cluster."""
        parts = [part for part in (hold.shared, hold) if part is not None and (part.demands or part.ucredits)]
        for part in parts:
            part.keys, part.counters = account_keys(part), counter_keys(part.owner, part.demands)
            if (known := self._denials.find(part)) is not None:
                return known
        taken: list[Hold] = []
        for part in parts:
            try:
                refusal = await self._take(part)
            except BaseException:
                if taken:
                    await self._end(*taken)
                raise
            if refusal is not None:
                if taken:
                    await self._end(*taken)
                return refusal
            taken.append(part)
        self._open[hold.hold_id] = hold
        return None

    async def give_back(self, hold: Hold) -> None:
        """What `take` took has ended as `hold.charge` says."""
        del self._open[hold.hold_id]
        if (shared := hold.shared) is None:
            await self._end(hold)
            return
        shared.charge = hold.charge
        await self._end(shared, *([hold] if hold.keys else []))

    async def _end(self, *holds: Hold) -> None:
        try:
            await self.settling.end(*holds)
        finally:
            # Not before: denials that the server judged before it have been noted by now.
            for hold in holds:
                self._denials.drop(hold, released=hold.charge is None or not hold.charge.keep_requests)

    async def _take(self, hold: Hold) -> Refusal | None:
        try:
            return await self._judge(hold)
        except StoreUnavailable as exc:
            if exc.ambiguous:
                self.settling.keep(hold)
            raise
        except BaseException:
            # No reply: the server may have admitted, or may still. A release makes a late admission impossible.
            self.settling.keep(hold)
            raise

    async def _judge(self, hold: Hold) -> Refusal | None:
        asked_at_s = time.monotonic()
        reply = await self._ask(hold)
        if reply[0] == b"MISS":
            await self._load_balance(hold.principal.org_id, hold.principal.plan)
            reply = await self._ask(hold)
        status = reply[0].decode()
        hold.judged_at_us = int(reply[1])
        admitted = status in ("OK", "DUP")
        numbers = [int(value) for value in reply[3:]]
        hold.states, hold.session_known = states_of(hold, numbers, admitted), session_known(hold, numbers)
        if admitted:
            if hold.ucredits:
                hold.available_ucredits = int(reply[2]) - hold.ucredits
            return None
        if status == "DENY":
            self._denials.note(hold, asked_at_s)
            return limit_refusal(hold.states)
        if status in ("NOCREDIT", "INFLIGHT"):
            if status == "NOCREDIT":
                self._recheck(hold.principal.org_id)
            return credit_refusal(status, hold.ucredits, int(reply[2]))
        raise StoreUnavailable(detail=f"admission of {hold.hold_id}: {status}")

    async def _ask(self, hold: Hold) -> list[bytes]:
        rules = self._rules
        if hold.owner is not keys.SHARED:
            self._mark_active(hold.owner)
        args: limits.Row = [hold.hold_id, hold.ucredits, rules.lease_ms, rules.outbox_entries_max, hold.enforced]
        now_ms = _wall_ms()
        for demand in hold.demands:
            args += limits.row(demand, now_ms)
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
            holds = [part for hold in self._open.values() for part in (hold, hold.shared) if part and part.keys]
            for at in range(0, len(holds), TOGETHER):
                await asyncio.gather(*(self._heartbeat(hold) for hold in holds[at : at + TOGETHER]))

    async def _heartbeat(self, hold: Hold) -> None:
        if hold.owner is not keys.SHARED:
            self._mark_active(hold.owner)
        args: limits.Row = [hold.hold_id, self._rules.lease_ms, hold.ucredits]
        now_ms = _wall_ms()
        for demand in hold.demands:
            args += limits.row(demand, now_ms)
        try:
            await self._redis.run(self._renew, [*hold.keys[:3], hold.keys[4], *hold.counters], args)
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


class Holding:
    """The block around an admitted request. A class, since a generator costs several microseconds more per request."""

    __slots__ = ("_admission", "_taken", "hold")

    def __init__(self, admission: Admission, hold: Hold) -> None:
        self._admission = admission
        self._taken = False
        #: What is asked for; while it is refused, what the refusal found.
        self.hold = hold

    async def __aenter__(self) -> Hold | Refusal:
        hold = self.hold
        if not hold.demands and hold.shared is None and hold.ucredits == 0:
            return hold  # nothing to take, so nothing to ask and nothing to give back
        refusal = await self._admission.take(hold)
        if refusal is not None:
            return refusal
        self._taken = True
        return hold

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._taken:
            await self._admission.give_back(self.hold)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000

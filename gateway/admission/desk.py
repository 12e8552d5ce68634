"""Taking every demand and the credit hold, all or nothing, wherever that can be done.

    limits and credits in Redis, in one trip          as long as Redis is there (`write: behind`)
    limits in Redis, then credits in PostgreSQL       `write: through`
    limits in this process, credits in PostgreSQL     while Redis is away (`without_redis`)

A failure after which Redis may have taken them all the same is none of these: what it may have taken is undone, and the
request is refused.
"""

import asyncio
import time
from types import TracebackType

import structlog

from gateway import keys
from gateway.admission.asking import Asking
from gateway.admission.denials import Denials
from gateway.admission.hold import Hold, Rules, account_keys, counter_keys
from gateway.admission.leases import Leases
from gateway.admission.local import LocalLimits
from gateway.admission.powers import Powers
from gateway.admission.refusals import credit_refusal, limit_refusal
from gateway.admission.settling import Settling
from gateway.admission.states import ADMITTED, AVAILABLE, OWNED, note_verdict
from gateway.errors import StoreRefused, StoreUnavailable, UnknownBalance
from gateway.stores import Redis
from gateway.types import Demand, Principal, Quote, Refusal

DRAIN_POLL_S = 0.02
#: What a request asks that costs nothing.
NOTHING = Quote.flat(0)

log = structlog.get_logger("gateway.admission")


class Admission:
    """`hold()` for the walk; `run()` renews leases and retries settles until it is cancelled; then `drain()`."""

    def __init__(self, redis: Redis, rules: Rules, settling: Settling, powers: Powers) -> None:
        self._rules = rules
        self.settling = settling
        self._powers = powers
        self._leases = Leases(redis, rules, powers)
        self._asking = Asking(redis, rules, powers, self._leases)
        self._denials = Denials(rules.deny_cache_ms, rules.deny_cache_entries_max)
        self._local = LocalLimits(powers.instances)
        self._open: dict[str, Hold] = {}

    @property
    def open_count(self) -> int:
        """Requests of this process that hold something now."""
        return len(self._open)

    @property
    def denials_count(self) -> int:
        """Denials that this process remembers."""
        return len(self._denials)

    def hold(self, hold_id: str, principal: Principal, demands: tuple[Demand, ...], quote: Quote) -> "Holding":
        """Inside the block everything in `demands` and what `quote` wants is held; a Refusal instead means that nothing
        was taken. Leaving the block settles `Hold.charge`, shielded from cancellation.

        Raises StoreUnavailable within the stores' deadlines, as UnknownBalance when nobody can tell what the org may
        spend. Shape after Envoy's DoLimit: a list in, all or nothing.
        """
        if any(demand.limit.shared for demand in demands):
            own = tuple(demand for demand in demands if not demand.limit.shared)
            hold = Hold(hold_id, principal, own, quote)
            shared = tuple(demand for demand in demands if demand.limit.shared)
            hold.shared = Hold(hold_id, principal, shared, NOTHING, owner=keys.SHARED)
        else:
            hold = Hold(hold_id, principal, demands, quote)
        return Holding(self, hold)

    # Taking

    async def take(self, hold: Hold) -> Refusal | None:
        """Everything is taken, or nothing is and the answer says why. What no org owns is asked first, by a script of
        its own: it lives in another place of a cluster."""
        if hold.ucredits and self.settling.is_full:
            raise UnknownBalance(detail="too many charges wait for PostgreSQL in this process")
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
        if not hold.keys:
            hold.judged_by = taken[0].judged_by  # nothing of its own was judged
        self._open[hold.hold_id] = hold
        if hold.ucredits and hold.where == "redis":
            await self._promise(hold)
        return None

    async def _promise(self, hold: Hold) -> None:
        """What is held in Redis is known wherever it has to be before the request may go on."""
        try:
            if self._leases.is_stale(hold.owner, hold.epoch):
                await self._powers.recover(hold.owner)
            if (journal := self._powers.journal) is not None:
                await journal.held(hold.hold_id, hold.owner, hold.ucredits, hold.used_ucredits)
        except BaseException:
            await self.give_back(hold)
            raise

    async def give_back(self, hold: Hold) -> None:
        """What `take` took has ended as `hold.charge` says."""
        del self._open[hold.hold_id]
        if (shared := hold.shared) is None:
            await self._end(hold)
            return
        shared.charge = hold.charge
        await self._end(shared, *([hold] if hold.keys else []))

    async def _end(self, *holds: Hold) -> None:
        elsewhere = holds
        for hold in holds:
            if hold.judged_by == "local":
                self._local.settle(hold)
                if hold.where == "redis":
                    elsewhere = tuple(other for other in elsewhere if other is not hold)
        try:
            await self.settling.end(*elsewhere)
        finally:
            # Not before: denials that the server judged before it have been noted by now.
            for hold in holds:
                self._denials.drop(hold, released=hold.charge is None or not hold.charge.keep_requests)

    async def _take(self, hold: Hold) -> Refusal | None:
        wanted_ucredits, in_postgres = hold.ucredits, self._rules.through
        if wanted_ucredits:
            await self._powers.begin_period(hold.owner, hold.principal.plan)
        if in_postgres:
            hold.ucredits = 0
        if hold.demands or hold.ucredits:
            try:
                refusal = await self._judge(hold)
            except StoreUnavailable as exc:
                if exc.ambiguous:
                    self.settling.keep(hold)
                if exc.ambiguous or not self._goes_on_without_redis(hold, exc):
                    raise
                refusal, in_postgres = self._local.take(hold), True
            except BaseException:
                # No reply: the server may have admitted, or may still. A release makes a late admission impossible.
                self.settling.keep(hold)
                raise
            if refusal is not None:
                return refusal
        if in_postgres and wanted_ucredits:
            return await self._hold_in_postgres(hold)
        return None

    def _goes_on_without_redis(self, hold: Hold, failure: StoreUnavailable) -> bool:
        """It is Redis that cannot be asked, not PostgreSQL, and nothing is wrong with what it was asked."""
        if isinstance(failure, UnknownBalance | StoreRefused):
            return False
        rules = self._rules
        return (not hold.demands or rules.counts_locally) and (not hold.ucredits or rules.holds_in_postgres)

    async def _judge(self, hold: Hold) -> Refusal | None:
        """Redis's verdict."""
        asked_at_s = time.monotonic()
        reply = await self._asking.admit(hold)
        if self._local:
            self._local.drop(hold.owner)
        status = note_verdict(hold, reply)
        if status in ADMITTED:
            return None
        if status == "DENY":
            self._denials.note(hold, asked_at_s)
            return limit_refusal(hold.states)
        if status in ("NOCREDIT", "INFLIGHT"):
            return self._credit_refusal(hold, status, int(reply[AVAILABLE]), int(reply[OWNED]))
        if status == "FULL":
            raise UnknownBalance(detail=f"the outbox of {hold.owner} is full: charges wait for PostgreSQL")
        raise StoreRefused(detail=f"admission of {hold.hold_id}: {status}")

    async def _hold_in_postgres(self, hold: Hold) -> Refusal | None:
        """The limits are taken; PostgreSQL's verdict on the credits. Unless it is yes, the limits are given back."""
        quote = hold.quote
        least_ucredits = min(max(1, quote.least_ucredits), quote.want_ucredits)
        try:
            taken = await self._powers.take_in_postgres(
                hold.owner, hold.hold_id, quote.want_ucredits, least_ucredits, quote.price.flat_ucredits
            )
        except BaseException as exc:
            if not isinstance(exc, StoreUnavailable) or exc.ambiguous:
                hold.where = "postgres"  # or not: nobody knows whether it is held there
            await self._undo(hold)
            if isinstance(exc, StoreUnavailable):
                raise UnknownBalance(detail=exc.detail) from exc
            raise
        if taken.status in ADMITTED:
            hold.where, hold.ucredits = "postgres", taken.held_ucredits
            hold.available_ucredits = taken.available_ucredits - taken.held_ucredits
            return None
        await self._undo(hold)
        if taken.status == "GONE":
            raise StoreRefused(detail=f"admission of {hold.hold_id}: it has ended already")
        return self._credit_refusal(hold, taken.status, taken.available_ucredits, taken.owned_ucredits)

    def _credit_refusal(self, hold: Hold, status: str, available_ucredits: int, owned_ucredits: int) -> Refusal:
        self._powers.recheck(hold.owner)
        return credit_refusal(status, hold.quote, available_ucredits, owned_ucredits)

    async def _undo(self, hold: Hold) -> None:
        if hold.demands or hold.where == "postgres":
            await self._end(hold)

    # While it runs

    async def extend(self, hold: Hold, ucredits: int) -> int:
        """The hold has grown by what is returned, `ucredits` at most; 0: nothing is left, or nobody can tell."""
        try:
            if hold.where == "redis":
                granted = await self._asking.extend(hold, ucredits)
            else:
                taken = await self._powers.extend_in_postgres(hold.owner, hold.hold_id, ucredits)
                granted = taken.held_ucredits if taken.status == "OK" else 0
        except StoreUnavailable as exc:
            log.info("hold not extended", hold=hold.hold_id, error=str(exc))
            return 0
        hold.ucredits += granted
        return granted

    async def run(self) -> None:
        """Leases are renewed and kept settles retried, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_renewing())
            group.create_task(self.settling.run())

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._rules.heartbeat_ms / 1000)
            await self._leases.beat(
                [part for hold in self._open.values() for part in (hold, hold.shared) if part and part.keys]
            )

    # After a loss

    async def answered(self, org_id: str) -> None:
        """Every admission and extension of the org that was under way has its answer, or was given up."""
        await self._asking.answered(org_id)

    async def register(self, org_id: str, epoch: int) -> tuple[int, str]:
        """The account of the org in Redis was lost, and `epoch` is that of another one: whatever this process holds for
        the org is in that one, and whatever it has charged the org is in PostgreSQL. Returns what the account owes in
        all, and its birth; 0 and "" when nothing is held. What is admitted by the lost one from now on looks after
        itself (`Powers.recover`). Raises StoreUnavailable when that is not so."""
        self._leases.expect(org_id, epoch)
        holds = [one for one in self._open.values() if one.owner == org_id and one.where == "redis" and one.ucredits]
        owed_ucredits, birth = await self._leases.register(org_id, holds)
        await self.settling.resubmit(org_id)
        return owed_ucredits, birth

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

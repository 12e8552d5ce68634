"""What runs is held: leases are renewed while a request runs, and written anew where Redis has lost them.

After a loss an org's account gets a new epoch. State: `_epochs`, by org the newest epoch this process has heard of.
What was admitted into the account of an older one has to be registered again before its request may go on.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog

from gateway import keys, limits
from gateway.admission.hold import Hold, Rules
from gateway.admission.powers import Powers
from gateway.errors import StoreUnavailable
from gateway.stores import INCARNATION, Redis, Script

#: How often an org is marked as active; the sweeper forgets only orgs that were silent for much longer.
ACTIVE_MARK_S = 30.0
ACTIVE_MARKS_MAX = 100_000
EPOCHS_MAX = 100_000
#: Renewals in one write: a burst of thousands would keep every admission behind it past its deadline.
TOGETHER = 100
#: How often registering begins again because the account was lost once more.
ROUNDS_MAX = 4

log = structlog.get_logger("gateway.admission")


class Leases:
    def __init__(self, redis: Redis, rules: Rules, powers: Powers) -> None:
        self._redis = redis
        self._rules = rules
        self._powers = powers
        self._renew = Script("renew", limits.script_text("renew"))
        self._epochs: dict[str, int] = {}
        self._active_marks: dict[str, float] = {}

    def mark_active(self, owner: str) -> None:
        """The sweeper of every gateway will look at this org. Rides on the next command's write."""
        if owner is keys.SHARED:
            return
        now = time.monotonic()
        if now - self._active_marks.get(owner, -ACTIVE_MARK_S) < ACTIVE_MARK_S or not self._redis.usable:
            return
        if len(self._active_marks) >= ACTIVE_MARKS_MAX:
            self._active_marks.clear()
        self._active_marks[owner] = now
        self._redis.send_detached("ZADD", keys.ACTIVE_ORGS, wall_ms(), owner)

    async def beat(self, holds: Sequence[Hold]) -> None:
        """All leases are renewed, as far as the stores can be asked."""
        here = [hold for hold in holds if hold.judged_by == "redis"]
        for at in range(0, len(here), TOGETHER):
            await asyncio.gather(*(self.keep(hold) for hold in here[at : at + TOGETHER]))
        there = [(hold.owner, hold.hold_id, hold.used_ucredits) for hold in holds if hold.where == "postgres"]
        if there:
            try:
                await self._powers.renew_in_postgres(there)
            except StoreUnavailable as exc:
                log.debug("leases in PostgreSQL not renewed", holds=len(there), error=str(exc))

    async def keep(self, hold: Hold) -> None:
        """The hold's leases in Redis are renewed, if it can be asked."""
        if hold.extending:
            return  # nobody can tell how much it holds; the next beat comes within its lease
        self.mark_active(hold.owner)
        try:
            await self.renew(hold)
        except StoreUnavailable as exc:
            log.debug("lease not renewed", hold=hold.hold_id, error=str(exc))

    async def renew(self, hold: Hold) -> tuple[bytes, int, bytes]:
        """The leases last another lease. Where Redis has lost the hold, or the whole account, it has them again.
        Returns OK or GONE (it has ended there), what the account owes in all, and the account's birth; none: a hold
        without credits, or an account that was lost at the same moment."""
        status, owed, birth = await self._renewed(hold)
        if hold.where == "redis" and hold.ucredits and (status == b"MISS" or not birth):
            await self._powers.load(hold.owner, hold.principal.plan, 0)
            status, owed, birth = await self._renewed(hold)
        return status, owed, birth

    async def _renewed(self, hold: Hold) -> tuple[bytes, int, bytes]:
        amount = hold.ucredits if hold.where == "redis" else 0
        args: limits.Row = [hold.hold_id, self._rules.lease_ms, hold.used_ucredits, amount]
        now_ms = wall_ms()
        for demand in hold.demands:
            args += limits.row(demand, now_ms)
        args.append(INCARNATION)
        status, epoch, owed, birth = await self._redis.run(
            self._renew, [*hold.keys[:3], hold.keys[4], *hold.counters], args
        )
        if status == b"OK" and amount:
            hold.epoch = max(hold.epoch, int(epoch))
        return status, int(owed), birth

    # After a loss

    def expect(self, org_id: str, epoch: int) -> None:
        """From now on whatever is admitted in an older epoch is `stale`."""
        self._epochs[org_id] = max(epoch, self._epochs.get(org_id, 0))
        if len(self._epochs) > EPOCHS_MAX:
            del self._epochs[next(iter(self._epochs))]

    def is_stale(self, org_id: str, epoch: int) -> bool:
        """The account that answered in this epoch is lost, or will be: its word is worth nothing."""
        return epoch < self._epochs.get(org_id, 0)

    async def register(self, org_id: str, holds: Sequence[Hold]) -> tuple[int, str]:
        """All of `holds` are in one account in Redis: what it owes in all, and its birth; 0 and "" without any. Raises
        StoreUnavailable when that is not so."""
        for _ in range(ROUNDS_MAX):
            owed, births = 0, set[bytes]()
            for at in range(0, len(holds), TOGETHER):
                for status, owes, birth in await asyncio.gather(*map(self.renew, holds[at : at + TOGETHER])):
                    if status != b"GONE":
                        owed = max(owed, owes)
                        births.add(birth)
            if not births:
                return 0, ""
            if len(births) == 1 and b"" not in births:
                return owed, births.pop().decode()
        raise StoreUnavailable(detail=f"the account of {org_id} was lost again and again")


def wall_ms() -> int:
    return time.time_ns() // 1_000_000

"""When an org is given what its plan brings: at its first request in a period, or under another plan.

    nobody here has asked yet, or the period is over   begin: PostgreSQL is asked once, and mostly nothing is due
    Redis finds the period over                        turn: then Redis must know of the new one
    Redis has no account                               load: what is due comes with it

By the clocks of the two stores, never this process's: PostgreSQL's, or Redis's where that goes ahead.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

import structlog

from gateway.config import Plan
from gateway.errors import StoreLocked, StoreRefused, StoreUnavailable, UnknownBalance
from gateway.ledger import books, grants
from gateway.ledger.rounds import Rounds
from gateway.stores import Postgres
from gateway.types import Balance

#: How long an org without a row in the application's table is remembered as having nothing.
ABSENT_TTL_S = 15
#: After an answer, and after PostgreSQL could not be asked, nobody here asks again for so long, whatever clocks show.
PAUSE_S = 1.0
#: How often what Redis may owe is lowered for one turn, while the account changes in between.
LOWERINGS_MAX = 3
#: Nobody waits longer to hear that mostly nothing is due.
BEGIN_S = 1.0
REMEMBERED_MAX = 100_000
#: As much as Redis can count.
EXACT_MAX = 2**53

log = structlog.get_logger("gateway.ledger")


@dataclass(frozen=True, slots=True)
class RedisSide:
    """What a turn needs of an org's account in Redis. Each raises StoreUnavailable."""

    #: (state): Redis has it, or a newer one.
    install: Callable[[Balance], Awaitable[object]]
    #: (org): Redis may owe no more than it does: as of which version and epoch, how much, in the hash of which birth.
    lower: Callable[[str], Awaitable[tuple[int, int, int, str]]]
    #: (org): what it owes, held and unposted.
    owed: Callable[[str], Awaitable[int]]


class Remembered:
    """Who need not be asked about, by org and plan: users of one org may have different ones. Whatever is forgotten
    costs a question."""

    def __init__(self) -> None:
        #: When the period is over, by this process's clock, and when to ask again at the earliest, monotonic.
        self._until: dict[tuple[str, str], tuple[float, float]] = {}
        self._absent_until_s: dict[str, float] = {}
        self._pause_until_s = 0.0

    def knows(self, org_id: str, plan: str) -> bool:
        """Nothing is due, or nobody could tell just now."""
        ends_ms, again_s = self._until.get((org_id, plan), (0.0, 0.0))
        if time.time() * 1000 < ends_ms:
            return True
        return time.monotonic() < max(again_s, self._pause_until_s, self._absent_until_s.get(org_id, 0.0))

    def note(self, org_id: str, plan: str, *, present: bool, ends_ms: int) -> None:
        """The org has what the plan brings until `ends_ms` (0: for good), or has no row and is not given one."""
        if not present:
            if len(self._absent_until_s) >= REMEMBERED_MAX:
                self._absent_until_s.clear()
            self._absent_until_s[org_id] = time.monotonic() + ABSENT_TTL_S
            return
        self._note(org_id, plan, ends_ms or math.inf)

    def _note(self, org_id: str, plan: str, ends_ms: float) -> None:
        if len(self._until) >= REMEMBERED_MAX:
            self._until.clear()
        self._until[org_id, plan] = (ends_ms, time.monotonic() + PAUSE_S)

    def note_present(self, org_id: str) -> None:
        self._absent_until_s.pop(org_id, None)

    def note_trouble(self, org_id: str, plan: str, failure: StoreUnavailable) -> None:
        """PostgreSQL cannot be asked: at all, if it was not reached. Else this org's row may be locked, or its values
        may be at fault, which keeps nobody else."""
        if failure.ambiguous or isinstance(failure, StoreRefused | StoreLocked):
            self._note(org_id, plan, 0.0)
        else:
            self._pause_until_s = time.monotonic() + PAUSE_S


class Periods:
    """Of all orgs; one turn per org and plan at a time. `at_once`: statements that this process may have running."""

    def __init__(
        self,
        postgres: Postgres,
        redis: RedisSide,
        plans: Mapping[str, Plan],
        *,
        provision: bool,
        capped: bool,
        at_once: asyncio.Semaphore,
    ) -> None:
        self._postgres = postgres
        self._redis = redis
        self._plans = plans
        #: Those that may bring an org something beyond what it has.
        self._granting = {
            name for name, plan in plans.items() if plan.is_periodic or (provision and plan.grant != "none")
        }
        self._provision = provision
        self._capped = capped
        self._at_once = at_once
        self._turns = Rounds(self._turn)
        #: Of turns that are asked for: what the clock shows that found the period over.
        self._clock_ms: dict[tuple[str, str], int] = {}
        self.remembered = Remembered()

    async def begin(self, org_id: str, plan: str) -> None:
        """The org has what its plan brings now. While nobody can tell, it goes on with what it has."""
        if plan in self._granting and not self.remembered.knows(org_id, plan):
            try:
                async with asyncio.timeout(BEGIN_S):
                    await self._turns.share((org_id, plan))
            except (StoreUnavailable, TimeoutError) as exc:
                log.debug("period not begun", org=org_id, error=str(exc))

    async def turn(self, org_id: str, plan: str, clock_ms: int) -> None:
        """Redis, whose clock shows `clock_ms`, has found the org's period over: it is the current one, and Redis knows.

        Raises UnknownBalance when PostgreSQL cannot be asked, StoreUnavailable when Redis cannot."""
        name = (org_id, plan)
        self._clock_ms[name] = max(clock_ms, self._clock_ms.get(name, 0))
        await self._turns.join(name)

    async def load(self, org_id: str, plan: str) -> Balance:
        """The org's state, with what its plan brings now, for a Redis that has no account of it. Raises
        StoreUnavailable."""
        if plan not in self._granting:
            return (await books.read(self._postgres, [org_id]))[org_id]
        return await self._granted(org_id, plan, await grants.look(self._postgres, org_id))

    async def _turn(self, org_and_plan: tuple[str, str]) -> None:
        org_id, plan = org_and_plan
        clock_ms = self._clock_ms.pop(org_and_plan, 0)
        try:
            async with self._at_once:
                if not clock_ms and self.remembered.knows(org_id, plan):
                    return  # found out while this one waited
                facts = await grants.look(self._postgres, org_id)
                facts = replace(facts, clock_ms=max(facts.clock_ms, clock_ms))
                if not clock_ms and not self._is_due(plan, facts):
                    self.remembered.note(
                        org_id, plan, present=facts.present, ends_ms=facts.period.ends_ms if facts.period else 0
                    )
                    return
                balance = await self._granted(org_id, plan, facts, lowers=True)
        except StoreUnavailable as exc:
            self.remembered.note_trouble(org_id, plan, exc)
            raise UnknownBalance(detail=exc.detail) from exc
        await self._redis.install(balance)

    async def _granted(self, org_id: str, plan: str, facts: grants.Facts, *, lowers: bool = False) -> Balance:
        """lowers: first what Redis may owe is lowered, where that matters. It is left as it is when the account changes
        again and again meanwhile."""
        balance = None
        if not self._is_due(plan, facts):
            balance = (await books.read(self._postgres, [org_id]))[org_id]
        lowerings = LOWERINGS_MAX if lowers else 0
        while balance is None:
            owed_ucredits, lowered = await self._lowered(org_id, plan) if lowerings else (0, None)
            balance = await grants.turn(
                self._postgres,
                org_id,
                plan,
                self._plans[plan],
                facts,
                owed_ucredits=owed_ucredits,
                lowered=lowered,
                provision=self._provision,
            )
            lowerings -= 1
        self.remembered.note(org_id, plan, present=balance.present, ends_ms=balance.period_ends_ms)
        return balance

    def _is_due(self, plan: str, facts: grants.Facts) -> bool:
        terms = self._plans.get(plan)
        return terms is not None and grants.is_due(plan, terms, facts, provision=self._provision)

    async def _lowered(self, org_id: str, plan: str) -> tuple[int, grants.Lowered | None]:
        """Before a reset: where Redis has no cap, what it owes; else the cap that it has lowered to that, so that no
        more than this stays in the plan pocket. A Redis that cannot be asked may owe whatever it might."""
        if self._plans[plan].grant != "reset":
            return 0, None
        before = (await books.read(self._postgres, [org_id]))[org_id]
        try:
            # So that it is in the newest state that Redis lowers its cap.
            await self._redis.install(before)
            if not self._capped:
                return await self._redis.owed(org_id), None
            version, epoch, cap_ucredits, birth = await self._redis.lower(org_id)
        except StoreUnavailable:
            return 0 if self._capped else EXACT_MAX, None
        # One epoch, one birth: as long as PostgreSQL has this epoch, it is this hash that has the cap.
        is_its = birth != "" and (before.epoch, before.birth) == (epoch, birth)
        return 0, (version, epoch, cap_ucredits) if is_its else None

    async def close(self) -> None:
        await self._turns.close()

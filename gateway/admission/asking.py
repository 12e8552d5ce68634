"""Asking Redis for a hold, or for more of one, until it has what it needs for a verdict.

    MISS, LOST  there is no account, or one of a process that is gone   install it
    PERIOD      the grant period is over                                turn it
    CAP         the account would owe more than it may                  raise the cap
    NOCREDIT    while charges wait: the balance may lack them already   post them
    GONE        (of an extension) the hold is not there                 write it again, if it has not ended

Each of these costs a question to PostgreSQL and is rare. All that one request may lead to is bounded in number and in
time.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from gateway import limits
from gateway.admission.hold import Hold, Rules
from gateway.admission.leases import Leases, wall_ms
from gateway.admission.powers import Powers
from gateway.admission.states import BIRTH, EPOCH, JUDGED_AT_US, NEED
from gateway.errors import StoreUnavailable, UnknownBalance
from gateway.stores import INCARNATION, Redis, Script

#: An account to install, a period to turn, a cap to raise, and each once more because somebody else was faster.
ROUNDS_MAX = 8
ROUNDS_S = 5.0
ANSWERED_POLL_S = 0.01
#: How long a refusal for want of credits waits for charges to be posted that may count twice.
CARRIED_S = 0.5


class Asking:
    """State: by org the questions whose answers may be on their way, and what those want that wait for a higher cap."""

    def __init__(self, redis: Redis, rules: Rules, powers: Powers, leases: Leases) -> None:
        self._redis = redis
        self._rules = rules
        self._powers = powers
        self._leases = leases
        self._admit = Script("admit", limits.script_text("admit"))
        self._extend = Script("extend", limits.script_text("extend"))
        self._under_way: dict[str, set[object]] = {}
        self._wanted_ucredits: Counter[str] = Counter()

    async def admit(self, hold: Hold) -> list[bytes]:
        """The reply of admit.lua. Raises StoreUnavailable, as UnknownBalance when it is PostgreSQL that cannot tell."""
        if not hold.ucredits:
            return await self.ask(hold, 0)
        question = self._begun(hold.owner)
        try:
            reply = await self.ask(hold, self._capped)
            if reply[0] in (b"MISS", b"CAP", b"LOST", b"PERIOD") or _may_count_twice(reply):
                reply = await self._ask_again(hold, reply)
            return reply
        finally:
            self._ended(hold.owner, question)

    async def _ask_again(self, hold: Hold, reply: list[bytes]) -> list[bytes]:
        capped, org_id, plan, carried = self._capped, hold.owner, hold.principal.plan, False
        async with _bounded(hold):
            for _ in range(ROUNDS_MAX):
                match reply[0]:
                    case b"MISS" | b"LOST":
                        await self._powers.load(org_id, plan, hold.ucredits)
                    case b"PERIOD":
                        await self._powers.turn_period(org_id, plan, int(reply[JUDGED_AT_US]) // 1000)
                    case b"CAP":
                        account = (org_id, int(reply[EPOCH]), reply[BIRTH].decode())
                        capped = await self._raised(*account, int(reply[NEED]), hold.ucredits)
                    case _ if _may_count_twice(reply) and not carried:
                        carried = True
                        await self._carry(org_id)
                    case _:
                        return reply
                reply = await self.ask(hold, capped)
        raise UnknownBalance(detail=f"hold {hold.hold_id}: still {reply[0].decode()} after {ROUNDS_MAX} rounds")

    async def _carry(self, org_id: str) -> None:
        """What the org was charged is posted, if that can be done soon: else the refusal stands."""
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(CARRIED_S):
                await self._powers.carry(org_id)

    async def ask(self, hold: Hold, capped: int) -> list[bytes]:
        """One question, one answer."""
        rules, quote = self._rules, hold.quote
        self._leases.mark_active(hold.owner)
        args: limits.Row = [
            hold.hold_id,
            hold.ucredits,
            # Whoever pays holds something.
            min(max(1, quote.least_ucredits), hold.ucredits),
            quote.price.flat_ucredits,
            rules.lease_ms,
            rules.outbox_entries_max,
            hold.enforced,
            capped,
        ]
        now_ms = wall_ms()
        for demand in hold.demands:
            args += limits.row(demand, now_ms)
        args.append(INCARNATION)
        reply: list[bytes] = await self._redis.run(self._admit, [*hold.keys, *hold.counters], args)
        return reply

    async def extend(self, hold: Hold, ucredits: int) -> int:
        """What the hold in Redis has grown by, `ucredits` at most. Raises StoreUnavailable like `admit`."""
        question, hold.extending = self._begun(hold.owner), True
        try:
            async with _bounded(hold):
                return await self._extended(hold, ucredits)
        finally:
            hold.extending = False
            self._ended(hold.owner, question)

    async def _extended(self, hold: Hold, ucredits: int) -> int:
        capped, carried = self._capped, False
        for _ in range(ROUNDS_MAX):
            args: limits.Row = [hold.hold_id, ucredits, hold.used_ucredits, capped, INCARNATION]
            status, granted, epoch, need, birth = await self._redis.run(
                self._extend, [*hold.keys[:3], hold.keys[4]], args
            )
            match status:
                case b"OK" if not self._leases.is_stale(hold.owner, int(epoch)):
                    return int(granted)
                case b"CAP":
                    capped = await self._raised(hold.owner, int(epoch), birth.decode(), int(need), ucredits)
                case b"OK" | b"MISS" | b"LOST" | b"GONE":
                    if (await self._leases.renew(hold))[0] == b"GONE":
                        return 0
                case b"REFUSED" if int(need) and not carried:
                    carried = True
                    await self._carry(hold.owner)
                case _:
                    return 0
        raise UnknownBalance(detail=f"hold {hold.hold_id}: not extended after {ROUNDS_MAX} rounds")

    async def answered(self, org_id: str) -> None:
        """Every question of the org that was under way has its answer, or was given up."""
        waiting = set(self._under_way.get(org_id, ()))
        while not waiting.isdisjoint(self._under_way.get(org_id, ())):
            await asyncio.sleep(ANSWERED_POLL_S)

    @property
    def _capped(self) -> int:
        return 1 if self._rules.capped else 0

    async def _raised(self, org_id: str, epoch: int, birth: str, need_ucredits: int, wanted_ucredits: int) -> int:
        """How capped the next question is: 2 once the cap cannot be raised to what is needed. Whoever waits beside this
        one is reckoned with, so that all of them find room after one question."""
        waiting = self._wanted_ucredits
        waiting[org_id] += wanted_ucredits
        try:
            all_ucredits = need_ucredits - wanted_ucredits + waiting[org_id]
            balance = await self._powers.raise_cap(org_id, epoch, birth, all_ucredits)
        finally:
            waiting[org_id] -= wanted_ucredits
            if not waiting[org_id]:
                del waiting[org_id]
        return 2 if balance.birth == birth and balance.cap_ucredits < need_ucredits else 1

    def _begun(self, org_id: str) -> object:
        question = object()
        self._under_way.setdefault(org_id, set()).add(question)
        return question

    def _ended(self, org_id: str, question: object) -> None:
        under_way = self._under_way[org_id]
        under_way.discard(question)
        if not under_way:
            del self._under_way[org_id]


def _may_count_twice(reply: list[bytes]) -> bool:
    """The balance is too small less what waits to be posted; some of which may be posted already, and missing from the
    balance."""
    return reply[0] == b"NOCREDIT" and reply[NEED] != b"0"


@asynccontextmanager
async def _bounded(hold: Hold) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(ROUNDS_S):
            yield
    except TimeoutError as exc:
        detail = f"hold {hold.hold_id}: no verdict within {ROUNDS_S:g} s"
        raise UnknownBalance(detail=detail, ambiguous=True) from exc

"""An org's account in Redis: built from PostgreSQL's state of it, and given as much of the balance to owe as it needs.

    (missing, or of a server process that is gone) ──load──▶ built, cap 0 ──raise_cap──▶ may owe up to its cap
                                                              ▲   new state of PostgreSQL: install   │
                                                              │   lower: much of it is spent         │
                                                              └──retire: cap 0 in both ◀── idle ─────┘

PostgreSQL gives the cap to one hash of Redis, told by its birth. When another hash asks, the one before was lost, and
what it may have owed is set aside until every gateway has told what it knows of (losses.py). State: what is under way
for each org, and for a moment who could not be given more.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from gateway import keys, limits
from gateway.config import Plan
from gateway.errors import StoreUnavailable, UnknownBalance
from gateway.ledger import books
from gateway.ledger.periods import ABSENT_TTL_S, Periods, RedisSide
from gateway.ledger.rounds import Rounds
from gateway.stores import INCARNATION, Postgres, Redis, Script
from gateway.types import UCREDITS_PER_CREDIT, Balance

#: So long who was not given as much as it needed does not ask PostgreSQL again, unless something has changed.
SHORT_S = 0.1
SHORT_MAX = 10_000

log = structlog.get_logger("gateway.ledger")


@dataclass(frozen=True, slots=True)
class Terms:
    """From `credits:` in gateway.yaml."""

    mirror_ttl_s: int = 3_600
    #: Redis owes its cap at most, and at least so much may be its cap (`on_state_loss: cap`).
    capped: bool = True
    cap_floor_ucredits: int = 10 * UCREDITS_PER_CREDIT
    #: Or so much of its balance, so that an outage of PostgreSQL is not felt before that is spent.
    cap_percent: int = 50
    #: Every hold is in PostgreSQL (`write: through`): Redis has nothing to owe.
    through: bool = False
    loss_grace_ms: int = 120_000
    #: An org without a row gets one, and what its plan begins with.
    provision: bool = False
    #: Statements at once, so that a rush leaves connections to the others.
    postgres_at_once: int = 4


@dataclass(slots=True)
class _Need:
    """What the hash of this epoch and birth must be allowed to owe."""

    epoch: int
    birth: str
    ucredits: int


@dataclass(frozen=True, slots=True)
class Known:
    """What Redis has of an org's account: what PostgreSQL says afterwards is older only when it was restored."""

    version: int = -1
    epoch: int = 0
    ucredits: int | None = None

    def contradicts(self, balance: Balance) -> bool:
        if balance.version == self.version and self.ucredits not in (None, balance.ucredits):
            return True
        return balance.version < self.version or balance.epoch < self.epoch


@dataclass(frozen=True, slots=True)
class _Short:
    """What PostgreSQL gave, less than was needed, and when."""

    balance: Balance
    at_s: float


class Accounts:
    """Everything here may be done any number of times, by any number of gateways: states have versions.

    `arrive`: PostgreSQL knows this process; done before an account is used. `on_loss` is told the org and its new epoch
    whenever a raise found that Redis had lost a state."""

    def __init__(
        self,
        redis: Redis,
        postgres: Postgres,
        plans: Mapping[str, Plan],
        terms: Terms,
        *,
        arrive: Callable[[], Awaitable[None]],
        on_loss: Callable[[str, int], None],
    ) -> None:
        self._redis = redis
        self._postgres = postgres
        self._terms = terms
        self._arrive = arrive
        self._on_loss = on_loss
        self._install = Script("install", limits.script_text("install"))
        self._lower = Script("lower", limits.script_text("lower"))
        self._at_once = asyncio.Semaphore(terms.postgres_at_once)
        self.periods = Periods(
            postgres,
            RedisSide(install=self._built, lower=self._lowered, owed=self._owed),
            plans,
            provision=terms.provision,
            capped=terms.capped,
            at_once=self._at_once,
        )
        self._loads = Rounds(self._load)
        self._raises = Rounds(self._raise)
        self._needs: dict[str, _Need] = {}
        self._short: dict[str, _Short] = {}
        #: Caps that PostgreSQL was asked to raise since this process started.
        self.raised_count = 0

    async def load(self, org_id: str, plan: str, need_ucredits: int = 0) -> None:
        """The org's account is in Redis, and may owe `need_ucredits` if there is so much. One load per org at a time,
        shared by all who wait for it.

        Raises UnknownBalance when PostgreSQL cannot be asked, StoreUnavailable when Redis cannot."""
        balance, birth = await self._loads.share((org_id, plan))
        can_have = balance.ucredits - balance.set_aside_ucredits
        has = balance.cap_ucredits if balance.birth == birth else 0
        if self._terms.capped and min(need_ucredits, can_have) > has:
            await self.raise_cap(org_id, balance.epoch, birth, need_ucredits)

    async def _load(self, org_and_plan: tuple[str, str]) -> tuple[Balance, str]:
        """The org's state, and the birth of the hash that it was written to."""
        org_id, plan = org_and_plan
        try:
            async with self._at_once:
                await self._arrive()
                balance = await self.periods.load(org_id, plan)
        except StoreUnavailable as exc:
            raise UnknownBalance(detail=exc.detail) from exc
        return balance, await self._built(balance)

    async def _built(self, balance: Balance) -> str:
        """Redis has this state of the org, or a newer one; the birth of the hash that has it."""
        _, birth = await self._put(balance)
        return birth.decode()

    async def known(self, org_id: str) -> Known:
        """Nothing is known to a Redis that cannot be asked."""
        try:
            version, epoch, ucredits = await self._redis.call("HMGET", keys.account(org_id), "v", "ep", "p")
        except StoreUnavailable:
            return Known()
        return Known() if version is None else Known(int(version), int(epoch), int(ucredits))

    async def install(self, balance: Balance, known: Known = Known()) -> None:
        """Redis has this state of the org, or a newer one, and PostgreSQL goes on after what was known to Redis before
        it was asked. Raises StoreUnavailable."""
        await self._put(await self._gone_on(balance, known))

    async def _gone_on(self, balance: Balance, known: Known) -> Balance:
        if not known.contradicts(balance):
            return balance
        if balance.version < known.version:
            log.error("postgres is older than redis knows it, was it restored?", org=balance.org_id)
        async with self._at_once:
            return await books.go_on_after(self._postgres, balance.org_id, known.version, known.epoch)

    async def _put(self, balance: Balance) -> tuple[bytes, bytes]:
        """What install.lua did, and the birth of the hash."""
        org_id = balance.org_id
        short = self._short.get(org_id)
        if short is not None and short.balance.version < balance.version:
            del self._short[org_id]
        if balance.present:
            self.periods.remembered.note_present(org_id)
        ttl_s = limits.mirror_ttl_s(self._terms.mirror_ttl_s)
        account_ttl_s = 0 if balance.present else ABSENT_TTL_S
        status, birth = await self._redis.run(
            self._install,
            [keys.account(org_id), keys.holds(org_id), keys.outbox(org_id), keys.mirror(org_id)],
            [*limits.state_row(balance), ttl_s, account_ttl_s, INCARNATION],
        )
        if status == b"BUILT":
            # What Redis lost may have been the list of active orgs as well, and who uses the org need not know.
            self._redis.send_detached("ZADD", keys.ACTIVE_ORGS, int(time.time() * 1000), org_id)
        return status, birth

    async def refresh(self, org_id: str) -> None:
        """Redis has the org's state as PostgreSQL has it now, or later. Raises StoreUnavailable."""
        known = await self.known(org_id)
        async with self._at_once:
            balance = (await books.read(self._postgres, [org_id]))[org_id]
        await self.install(balance, known)

    async def raise_cap(self, org_id: str, epoch: int, birth: str, need_ucredits: int) -> Balance:
        """The hash of this epoch and birth may owe `need_ucredits`, or what there is of it: the state that says so,
        which Redis has. Of another epoch or birth when something has changed meanwhile.

        Raises UnknownBalance when PostgreSQL cannot be asked, StoreUnavailable when Redis cannot."""
        if (known := self._known_short(org_id, birth, need_ucredits)) is not None:
            return known
        need = self._needs.get(org_id)
        if need is None or epoch > need.epoch or (epoch == need.epoch and birth != need.birth):
            self._needs[org_id] = _Need(epoch, birth, need_ucredits)
        elif (epoch, birth) == (need.epoch, need.birth):
            need.ucredits = max(need.ucredits, need_ucredits)
        return await self._raises.join(org_id)

    def _known_short(self, org_id: str, birth: str, need_ucredits: int) -> Balance | None:
        short = self._short.get(org_id)
        if short is None or short.balance.birth != birth or short.balance.cap_ucredits >= need_ucredits:
            return None
        return short.balance if time.monotonic() - short.at_s < SHORT_S else None

    async def _raise(self, org_id: str) -> Balance:
        # Whoever asks from now on asks for the next round.
        need, known = self._needs.pop(org_id), await self.known(org_id)
        try:
            balance = await self._ask_for(org_id, need)
            if await self._gone_on(balance, known) is not balance:
                balance = await self._ask_for(org_id, need)
        except StoreUnavailable as exc:
            raise UnknownBalance(detail=exc.detail) from exc
        self.raised_count += 1
        if balance.epoch > need.epoch and balance.birth == need.birth and balance.set_aside_ucredits:
            self._on_loss(org_id, balance.epoch)
        await self._put(balance)
        if balance.birth == need.birth and balance.cap_ucredits < need.ucredits:
            if len(self._short) >= SHORT_MAX:
                self._short.clear()
            self._short[org_id] = _Short(balance, time.monotonic())
        return balance

    async def _ask_for(self, org_id: str, need: _Need) -> Balance:
        terms = self._terms
        floor_ucredits, percent = (0, 0) if terms.through else (terms.cap_floor_ucredits, terms.cap_percent)
        async with self._at_once:
            await self._arrive()
            return await books.raise_cap(
                self._postgres,
                org_id,
                need.epoch,
                need.birth,
                need.ucredits,
                floor_ucredits,
                terms.loss_grace_ms,
                percent,
            )

    async def retire(self, org_id: str) -> bool:
        """An org that is idle leaves Redis nothing to owe; its next request asks for a cap again. False: something has
        happened meanwhile. Raises StoreUnavailable."""
        return not self._terms.capped or await self.lower(org_id, 0)

    async def lower(self, org_id: str, least_ucredits: int) -> bool:
        """The org may owe in Redis no more than it does, or than `least_ucredits`. False: something has happened
        meanwhile, and it may as before. Raises StoreUnavailable."""
        version, epoch, cap_ucredits, birth = await self._lowered(org_id, least_ucredits)
        if not birth:
            return True
        async with self._at_once:
            balance = await books.lower_cap(self._postgres, org_id, epoch, birth, version, cap_ucredits)
            if balance is None:
                balance = (await books.read(self._postgres, [org_id]))[org_id]
        balance = await self._gone_on(balance, Known(version, epoch))
        await self._put(balance)
        return balance.birth != birth or balance.cap_ucredits <= cap_ucredits

    async def _lowered(self, org_id: str, least_ucredits: int = 0) -> tuple[int, int, int, str]:
        """Redis may owe no more than it does, or than this: as of which version and epoch, how much (micro-credits), in
        the hash of which birth; an empty birth where there is none."""
        args: limits.Row = [least_ucredits, INCARNATION]
        version, epoch, cap, birth = await self._redis.run(self._lower, [keys.account(org_id)], args)
        return int(version), int(epoch), int(cap), birth.decode()

    async def adopt(self, org_id: str) -> None:
        """The org has an account in Redis, and no other one may owe anything: what might is lost, and told of. Raises
        StoreUnavailable."""
        async with self._at_once:
            balance = (await books.read(self._postgres, [org_id]))[org_id]
        birth = await self._built(balance)
        if birth != balance.birth:
            await self.raise_cap(org_id, balance.epoch, birth, 0)

    async def _owed(self, org_id: str) -> int:
        unposted, held = await self._redis.call("HMGET", keys.account(org_id), "u", "h")
        return int(unposted or 0) + int(held or 0)

    async def close(self) -> None:
        for work in (self._loads, self.periods, self._raises):
            await work.close()

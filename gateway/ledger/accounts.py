"""Balances: from PostgreSQL into Redis, and credits given to orgs."""

import asyncio
import json
import time
from collections.abc import Iterable
from itertools import islice

import structlog

from gateway import keys, limits
from gateway.errors import StoreUnavailable, UnknownBalance
from gateway.ledger.queries import query
from gateway.stores import Postgres, Redis, Row, Script
from gateway.types import UCREDITS_PER_CREDIT, Balance

#: How long an org without an ai_credits row is remembered as having nothing.
ABSENT_TTL_S = 15
#: Balances read in one statement when they are refreshed.
REFRESH_AT_ONCE = 200
REFRESH_RETRY_S = 0.5
#: An org that is refused for want of credits has its balance read again, at most so often.
RECHECK_S = 5.0
RECHECKS_MAX = 10_000

#: Channel on which the database announces the org whose balance somebody changed.
CREDITS_CHANNEL = "gateway_credits"

log = structlog.get_logger("gateway.ledger")


class Accounts:
    """Installs posted balances in Redis, where admission reads them.

    `grants` are the credits a plan starts with, by plan; with `provision` an org that is seen for the first time
    and has no row receives its plan's."""

    def __init__(
        self, redis: Redis, postgres: Postgres, *, mirror_ttl_s: int, grants: dict[str, int], provision: bool
    ) -> None:
        self._redis = redis
        self._postgres = postgres
        self._mirror_ttl_s = mirror_ttl_s
        self._grants = grants
        self._provision = provision
        self._install = Script("install", limits.script_text("install"))
        self._loading: dict[str, asyncio.Task[None]] = {}
        #: Orgs whose balance in Redis may be out of date; `_all_stale` stands for every active one.
        self._stale: set[str] = set()
        self._all_stale = False
        self._refreshing: asyncio.Task[None] | None = None
        self._rechecked: dict[str, float] = {}

    async def load(self, org_id: str, plan: str) -> None:
        """The org's balance is in Redis. One load per org at a time, shared by all who wait for it.

        Raises UnknownBalance when PostgreSQL cannot be asked, StoreUnavailable when Redis cannot."""
        loading = self._loading.get(org_id)
        if loading is None:
            loading = asyncio.create_task(self._load(org_id, plan))
            self._loading[org_id] = loading
            loading.add_done_callback(lambda task: self._loaded(org_id, task))
        # One waiter's cancellation must not end the load that others wait for.
        await asyncio.shield(loading)

    def _loaded(self, org_id: str, task: asyncio.Task[None]) -> None:
        del self._loading[org_id]
        if not task.cancelled():
            task.exception()  # those who waited were told; when all have left, nobody is there to be

    async def _load(self, org_id: str, plan: str) -> None:
        try:
            balance, present = (await _read(self._postgres, [org_id]))[org_id]
            if not present and self._provision and plan in self._grants:
                balance = await grant(self._postgres, org_id, self._grants[plan], grant_id=f"grant:{plan}:initial")
                present = True
                log.info("org provisioned", org=org_id, plan=plan, credits=self._grants[plan])
        except StoreUnavailable as exc:
            raise UnknownBalance(detail=exc.detail) from exc
        await self._put(balance, present)

    async def _put(self, balance: Balance, present: bool) -> None:
        org_id = balance.org_id
        await self._redis.run(
            self._install,
            [keys.account(org_id), keys.holds(org_id), keys.outbox(org_id), keys.mirror(org_id)],
            [balance.ucredits, balance.version, self._mirror_ttl_s, 0 if present else ABSENT_TTL_S],
        )

    def on_notification(self, org_id: str) -> None:
        """Somebody changed this org's balance: Redis has the new one soon."""
        self._stale.add(org_id)
        self._wake()

    def refresh_all(self) -> None:
        """Announcements may have been missed: every active org's balance is as PostgreSQL has it soon."""
        self._all_stale = True
        self._wake()

    def recheck(self, org_id: str) -> None:
        """The org was refused for want of credits. A top-up may have gone unheard, by an org that was not active
        when announcements were missed, so its balance is read again."""
        now = time.monotonic()
        if now - self._rechecked.get(org_id, -RECHECK_S) < RECHECK_S:
            return
        if len(self._rechecked) >= RECHECKS_MAX:
            self._rechecked.clear()
        self._rechecked[org_id] = now
        self.on_notification(org_id)

    def _wake(self) -> None:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        """What is stale is read, however long a store makes us wait: nobody announces it a second time."""
        failing = False
        while self._stale or self._all_stale:
            orgs: list[str] = []
            try:
                if self._all_stale:
                    self._all_stale = False
                    await self._mark_active()
                # Taken off before they are read: a change announced meanwhile is read again.
                orgs = list(islice(self._stale, REFRESH_AT_ONCE))
                self._stale.difference_update(orgs)
                balances = await _read(self._postgres, orgs)
                done = await asyncio.gather(*(self._put(*balances[org]) for org in orgs), return_exceptions=True)
                orgs = [org for org, result in zip(orgs, done, strict=True) if result is not None]
                for failure in filter(None, done):
                    raise failure
                failing = False
            except StoreUnavailable as exc:
                self._stale.update(orgs)
                if not failing:
                    log.warning("balances not refreshed yet", orgs=len(self._stale), error=str(exc))
                failing = True
                await asyncio.sleep(REFRESH_RETRY_S)

    async def _mark_active(self) -> None:
        try:
            active = await self._redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1)
        except StoreUnavailable:
            self._all_stale = True
            raise
        self._stale.update(org.decode() for org in active)

    async def close(self) -> None:
        tasks = [*self._loading.values(), *([self._refreshing] if self._refreshing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_balance(postgres: Postgres, org_id: str) -> Balance | None:
    """The org's posted balance, or None when it has no ai_credits row."""
    row = await postgres.row(query("balance"), org_id)
    return None if row is None else _balance(row)


async def _read(postgres: Postgres, orgs: Iterable[str]) -> dict[str, tuple[Balance, bool]]:
    """Posted balance of every org named, and whether it has an ai_credits row; one without has nothing."""
    rows = await postgres.rows(query("balances"), list(orgs))
    return {row["org_id"]: (_balance(row), row["present"]) for row in rows}


async def grant(postgres: Postgres, org_id: str, credits: int, *, grant_id: str, note: str = "") -> Balance:
    """The org has `credits` more, once per `grant_id`; running gateways learn it by notification."""
    meta = json.dumps({"credits": credits, **({"note": note} if note else {})})
    row = await postgres.row(query("grant"), org_id, grant_id, credits * UCREDITS_PER_CREDIT, meta)
    assert row is not None  # the function returns the org it has just made sure of
    return _balance(row)


def _balance(row: Row) -> Balance:
    return Balance(row["org_id"], row["balance"], row["version"])

"""What others change in PostgreSQL reaches Redis: announced, or found by looking when nobody announced it.

NOTIFY gateway_credits ──▶ that org        (re)connected listener ──▶ every active org: announcements may be missed
refused for want of credits ──▶ that org   now and then ──▶ orgs that were used in the last minute
schema: readonly ──▶ tables are compared several times a second, since there is no trigger to announce anything
"""

import asyncio
import time
from itertools import islice

import structlog

from gateway import keys
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger import books
from gateway.ledger.accounts import Accounts, Known
from gateway.stores import Postgres, Redis
from gateway.types import Balance

#: Channel on which the database announces the org whose balance somebody changed.
CREDITS_CHANNEL = "gateway_credits"

#: Balances read in one statement when they are refreshed.
REFRESH_AT_ONCE = 200
REFRESH_RETRY_S = 0.5
#: An org that is refused for want of credits has its balance read again, at most so often.
RECHECK_S = 5.0
RECHECKS_MAX = 10_000
#: How often orgs that were used in the last USED_MS are read again, by one of the gateways.
LOOK_EVERY_MS = 15_000
USED_MS = 60_000
#: How often the tables are compared where no trigger tells, by one of the gateways.
POLL_EVERY_MS = 800

log = structlog.get_logger("gateway.ledger")


class Freshness:
    """`run()` for ever. State: orgs whose balance in Redis may be out of date; `_all_stale` stands for every active
    one."""

    def __init__(self, redis: Redis, postgres: Postgres, accounts: Accounts, *, polls: bool = False) -> None:
        self._redis = redis
        self._postgres = postgres
        self._accounts = accounts
        self._polls = polls
        self._stale: set[str] = set()
        self._all_stale = False
        self._refreshing: asyncio.Task[None] | None = None
        self._rechecked: dict[str, float] = {}

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

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_looking())
            if self._polls:
                group.create_task(self._keep_polling())

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_MS / 1000)
            try:
                await self.look()
            except StoreUnavailable as exc:
                log.debug("balances not looked at", error=str(exc))

    async def look(self) -> None:
        """Every org that was used in the last minute has its balance read again, unless another gateway does that.
        Raises StoreUnavailable."""
        if await self._is_ours("looked", LOOK_EVERY_MS):
            since_ms = int(time.time() * 1000) - USED_MS
            self._add(await self._redis.call("ZRANGEBYSCORE", keys.ACTIVE_ORGS, since_ms, "+inf"))

    async def _keep_polling(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(POLL_EVERY_MS / 1000)
            try:
                await self.poll()
                failing = False
            except StoreUnavailable as exc:
                if not failing:
                    log.warning("changes of others not looked for", error=str(exc))
                failing = True

    async def poll(self) -> None:
        """What others changed is in the ledger and soon in Redis, unless another gateway looks. Raises
        StoreUnavailable."""
        if not self._redis.usable or await self._is_ours("polled", POLL_EVERY_MS):
            for org_id in await books.poll_external(self._postgres):
                self.on_notification(org_id)

    async def _is_ours(self, what: str, every_ms: int) -> bool:
        """One of the gateways is enough; which, the first to ask each time. Two do no harm."""
        taken = await self._redis.call("SET", keys.turn(what), 1, "NX", "PX", every_ms * 3 // 4)
        return taken is not None

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
                    await self._mark_active()
                # Taken off before they are read: a change announced meanwhile is read again.
                orgs = list(islice(self._stale, REFRESH_AT_ONCE))
                self._stale.difference_update(orgs)
                known = await asyncio.gather(*map(self._accounts.known, orgs))
                balances = await books.read(self._postgres, orgs)
                installs = (self._install(balances[org_id], before) for org_id, before in zip(orgs, known, strict=True))
                done = await asyncio.gather(*installs, return_exceptions=True)
                orgs = [org_id for org_id, result in zip(orgs, done, strict=True) if result is not None]
                for failure in filter(None, done):
                    raise failure
                failing = False
            except StoreUnavailable as exc:
                self._stale.update(orgs)
                if not failing:
                    log.warning("balances not refreshed yet", orgs=len(self._stale), error=str(exc))
                failing = True
                await asyncio.sleep(REFRESH_RETRY_S)

    async def _install(self, balance: Balance, known: Known) -> None:
        try:
            await self._accounts.install(balance, known)
        except StoreRefused as exc:
            # Somebody else's value under our name: a matter for a person, and for this org alone.
            log.error("a balance cannot be installed", org=balance.org_id, error=str(exc))

    async def _mark_active(self) -> None:
        self._all_stale = False
        try:
            active = await self._redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1)
        except StoreUnavailable:
            self._all_stale = True
            raise
        self._stale.update(org_id.decode() for org_id in active)

    def _add(self, orgs: list[bytes]) -> None:
        if orgs:
            self._stale.update(org_id.decode() for org_id in orgs)
            self._wake()

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait({self._refreshing})

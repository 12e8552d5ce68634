"""Balances: from PostgreSQL into Redis, and credits given to orgs."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import structlog

from gateway import keys, limits
from gateway.errors import StoreUnavailable, UnknownBalance
from gateway.ledger.queries import query
from gateway.stores import Postgres, Redis, Row, Script
from gateway.types import UCREDITS_PER_CREDIT, Balance

#: How long an org without an ai_credits row is remembered as having nothing.
ABSENT_TTL_S = 15

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
        self._refreshing: set[asyncio.Task[None]] = set()

    async def load(self, org_id: str, plan: str) -> None:
        """The org's balance is in Redis. One load per org at a time, shared by all who wait for it.

        Raises UnknownBalance when PostgreSQL cannot be asked, StoreUnavailable when Redis cannot."""
        loading = self._loading.get(org_id)
        if loading is None:
            loading = asyncio.create_task(self._load(org_id, plan))
            self._loading[org_id] = loading
            loading.add_done_callback(lambda _: self._loading.pop(org_id, None))
        # One waiter's cancellation must not end the load that others wait for.
        await asyncio.shield(loading)

    async def _load(self, org_id: str, plan: str) -> None:
        try:
            balance = await read_balance(self._postgres, org_id)
            if balance is None and self._provision and plan in self._grants:
                balance = await grant(self._postgres, org_id, self._grants[plan], grant_id=f"grant:{plan}:initial")
                log.info("org provisioned", org=org_id, plan=plan, credits=self._grants[plan])
        except StoreUnavailable as exc:
            raise UnknownBalance(detail=exc.detail) from exc
        await self._put(org_id, balance)

    async def _put(self, org_id: str, balance: Balance | None) -> None:
        known = balance or Balance(org_id, 0, 0)
        await self._redis.run(
            self._install,
            [keys.account(org_id), keys.holds(org_id), keys.outbox(org_id), keys.mirror(org_id)],
            [known.ucredits, known.version, self._mirror_ttl_s, 0 if balance else ABSENT_TTL_S],
        )

    def on_notification(self, org_id: str) -> None:
        """Somebody changed this org's balance: Redis has the new one soon."""
        self._begin(self._refresh(org_id))

    def refresh_all(self) -> None:
        """Announcements may have been missed: every active org's balance is as PostgreSQL has it soon."""
        self._begin(self._refresh_active())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)

    async def _refresh(self, org_id: str) -> None:
        try:
            await self._put(org_id, await read_balance(self._postgres, org_id))
        except StoreUnavailable as exc:
            log.warning("balance not refreshed", org=org_id, error=str(exc))

    async def _refresh_active(self) -> None:
        try:
            active = await self._redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1)
        except StoreUnavailable as exc:
            log.warning("balances not refreshed", error=str(exc))
            return
        for org in active:
            await self._refresh(org.decode())

    async def close(self) -> None:
        for task in self._refreshing:
            task.cancel()
        await asyncio.gather(*self._refreshing, return_exceptions=True)


async def read_balance(postgres: Postgres, org_id: str) -> Balance | None:
    """The org's posted balance, or None when it has no ai_credits row."""
    row = await postgres.row(query("balance"), org_id)
    return None if row is None else _balance(row)


async def grant(postgres: Postgres, org_id: str, credits: int, *, grant_id: str, note: str = "") -> Balance:
    """The org has `credits` more, once per `grant_id`; running gateways learn it by notification."""
    meta = json.dumps({"credits": credits, **({"note": note} if note else {})})
    row = await postgres.row(query("grant"), org_id, grant_id, credits * UCREDITS_PER_CREDIT, meta)
    assert row is not None  # the function returns the org it has just made sure of
    return _balance(row)


def _balance(row: Row) -> Balance:
    return Balance(row["org_id"], row["balance"], row["version"])

"""Caps that have become too large are lowered while their orgs are in use: what an org has spent must not be missing
from what PostgreSQL may hold, while Redis is away or with `write: through`.

    a quarter larger than gateway.raise_cap would make it ahead of need   lowered to that: nobody has to raise it again
    `write: through`                                                      lowered to what is owed, so mostly to nothing

First in Redis, then in PostgreSQL if nothing has changed meanwhile; else by the next sweep.
"""

import asyncio
import random
from collections.abc import Sequence

import structlog

from gateway import keys
from gateway.errors import StoreUnavailable
from gateway.ledger import books
from gateway.ledger.accounts import Accounts, Terms
from gateway.stores import Postgres, Redis

#: Caps that one call lowers: requests want PostgreSQL as well.
LOWERED_MAX = 50

log = structlog.get_logger("gateway.ledger")


class Trimming:
    """`trim` for orgs in use. `terms`: those that the accounts go by."""

    def __init__(self, redis: Redis, postgres: Postgres, accounts: Accounts, terms: Terms) -> None:
        self._redis = redis
        self._postgres = postgres
        self._accounts = accounts
        self._terms = terms

    async def trim(self, orgs: Sequence[str]) -> None:
        """None of these orgs may owe much more in Redis than it would be given now. Of many that may some are dealt
        with, and as far as the stores can be asked. Raises nothing."""
        if not self._terms.capped or not orgs:
            return
        try:
            large = await (self._with_cap(orgs) if self._terms.through else self._with_large_cap(orgs))
        except StoreUnavailable as exc:
            log.debug("caps not looked at", error=str(exc))
            return
        # Not always the same: some may fail for good.
        for org_id, least_ucredits in random.sample(large, min(len(large), LOWERED_MAX)):
            try:
                if self._terms.through:
                    await self._accounts.adopt(org_id)
                await self._accounts.lower(org_id, least_ucredits)
            except StoreUnavailable as exc:
                log.debug("cap not lowered", org=org_id, error=str(exc))

    async def _with_large_cap(self, orgs: Sequence[str]) -> list[tuple[str, int]]:
        """Those whose cap is too large, and what it is to be. One round trip."""
        asked = (self._redis.call("HMGET", keys.account(org_id), "p", "s", "u", "h", "c") for org_id in orgs)
        large: list[tuple[str, int]] = []
        for org_id, fields in zip(orgs, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(fields, StoreUnavailable):
                continue  # its part of a cluster is away, or this is somebody else's value
            if isinstance(fields, BaseException):
                raise fields
            balance, set_aside, unposted, held, cap = (int(field or 0) for field in fields)
            ahead_ucredits = (balance - set_aside) // 100 * self._terms.cap_percent
            least_ucredits = max(2 * (unposted + held), self._terms.cap_floor_ucredits, ahead_ucredits)
            if cap > least_ucredits + least_ucredits // 4:
                large.append((org_id, least_ucredits))
        return large

    async def _with_cap(self, orgs: Sequence[str]) -> list[tuple[str, int]]:
        """Those that may owe anything, by PostgreSQL's word: the account in Redis may be lost, and nobody asks for
        it."""
        balances = await books.read(self._postgres, orgs)
        return [(org_id, 0) for org_id in orgs if balances[org_id].cap_ucredits]

"""A ledger over real servers: migrated database, empty Redis, one org with a balance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from gateway import limits
from gateway.admission import Admission, Rules, Settling
from gateway.ledger import Accounts, Outbox, Sweeper, grant, migrate, post
from gateway.stores import Postgres, Redis, Script
from gateway.types import Principal

ORG = "acme"
ASKER = Principal(ORG, "pro", "ann", "key_1", "api_key")


@dataclass
class House:
    """The parts of the gateway that handle money, wired as `app.py` does."""

    redis: Redis
    postgres: Postgres
    accounts: Accounts
    outbox: Outbox
    sweeper: Sweeper
    admission: Admission

    async def credits(self, amount: int, org_id: str = ORG, grant_id: str = "grant:test") -> None:
        await grant(self.postgres, org_id, amount, grant_id=grant_id)

    async def ledger(self, org_id: str = ORG) -> list[tuple[str, str, int]]:
        rows = await self.postgres.rows(
            "SELECT request_id, kind, amount FROM gateway.ledger WHERE org_id = $1 ORDER BY seq", org_id
        )
        return [(row["request_id"], row["kind"], row["amount"]) for row in rows]

    async def account(self, org_id: str = ORG) -> dict[str, int]:
        flat = await self.redis.call("HGETALL", f"{{ai_credits:org_{org_id}}}:a")
        return {key.decode(): int(value) for key, value in zip(flat[::2], flat[1::2], strict=True)}


def rules(lease_ms: int = 30_000) -> Rules:
    return Rules(
        lease_ms=lease_ms, heartbeat_ms=10_000, settle_timeout_ms=2_000, outbox_entries_max=1_000, mirror_ttl_s=3600
    )


def every_script() -> list[Script]:
    return [Script(name, limits.script_text(name)) for name in (*limits.LOOPS, *limits.PLAIN)]


@asynccontextmanager
async def furnished(redis: Redis, postgres: Postgres) -> AsyncIterator[House]:
    """A house around these stores, which it opens and closes."""
    redis.start()
    await postgres.open()
    await migrate(postgres)
    accounts = Accounts(redis, postgres, mirror_ttl_s=3600, grants={"trial": 100}, provision=False)
    outbox = Outbox(redis, postgres, flush_ms=20, batch_max=500, mirror_ttl_s=3600)
    sweeper = Sweeper(redis, outbox.mark, sweep_ms=50, mirror_ttl_s=3600, on_expiry="checkpoint")
    settling = Settling(redis, rules(), post=lambda entries: post(postgres, entries), mark_dirty=outbox.mark)
    admission = Admission(redis, rules(), settling, load_balance=accounts.load, recheck=accounts.recheck)
    try:
        yield House(redis, postgres, accounts, outbox, sweeper, admission)
    finally:
        await accounts.close()
        await redis.close()
        await postgres.close()


@pytest.fixture
async def house(redis_url: str, database_url: str) -> AsyncIterator[House]:
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    async with furnished(redis, Postgres(database_url, timeout_ms=5_000, pool_max=4)) as house:
        yield house

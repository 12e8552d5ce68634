"""A ledger over real servers: migrated database, empty Redis, one org with a balance."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gateway import limits
from gateway.admission import Admission, Rules, Settling
from gateway.config import Settings, load_text
from gateway.ledger import Accounts, Freshness, Losses, Outbox, Sweeper, grant, migrate
from gateway.money import Money
from gateway.stores import Postgres, Redis, Script
from gateway.types import Principal

SETTINGS = """
upstreams: { router: { targets: [demo] } }
identity: [ { api_key: {} } ]
routes: [ { path: /, upstream: router } ]
"""

PLANS = "{ trial: { credits: 100, policy: trial } }"
ORG = "acme"
ASKER = Principal(ORG, "pro", "ann", "key_1", "api_key")


@dataclass
class House:
    """The parts of the gateway that handle money, wired as `app.py` does."""

    redis: Redis
    postgres: Postgres
    money: Money

    @property
    def accounts(self) -> Accounts:
        return self.money.accounts

    @property
    def freshness(self) -> Freshness:
        return self.money.freshness

    @property
    def outbox(self) -> Outbox:
        return self.money.outbox

    @property
    def sweeper(self) -> Sweeper:
        return self.money.sweeper

    @property
    def losses(self) -> Losses:
        return self.money.losses

    @property
    def admission(self) -> Admission:
        return self.money.admission

    @property
    def settling(self) -> Settling:
        return self.money.settling

    def obey(self, **changes: Any) -> None:
        """From now on admission has these rules in place of some of its own."""
        admission = self.admission
        for part in (admission, admission._asking, admission._leases, admission.settling):
            part._rules = replace(part._rules, **changes)

    async def credits(self, amount: int, org_id: str = ORG, grant_id: str = "grant:test") -> None:
        await grant(self.postgres, org_id, amount, grant_id=grant_id)

    async def ledger(self, org_id: str = ORG) -> list[tuple[str, str, int]]:
        rows = await self.postgres.rows(
            "SELECT request_id, kind, amount FROM gateway.ledger WHERE org_id = $1 ORDER BY seq", org_id
        )
        return [(row["request_id"], row["kind"], row["amount"]) for row in rows]

    async def account(self, org_id: str = ORG) -> dict[str, int]:
        """The fields of the org's account in Redis that are numbers."""
        flat = await self.redis.call("HGETALL", f"{{ai_credits:org_{org_id}}}:a")
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        return {key.decode(): int(value) for key, value in fields.items() if key not in (b"r", b"b")}


def rules(lease_ms: int = 30_000) -> Rules:
    return Rules(
        lease_ms=lease_ms, heartbeat_ms=10_000, settle_timeout_ms=2_000, outbox_entries_max=1_000, mirror_ttl_s=3600
    )


def every_script() -> list[Script]:
    return [Script(name, limits.script_text(name)) for name in (*limits.LOOPS, *limits.PLAIN)]


def settings(plans: object = PLANS, **credits: object) -> Settings:
    """Of a gateway whose section `credits` says this beside what suits tests. plans: YAML."""
    terms = {"lease": "30s", "flush": "20ms", "sweep": "100ms", "outbox_entries_max": 1_000, **credits}
    section = ", ".join(f"{key}: {value}" for key, value in terms.items())
    return load_text(f"{SETTINGS}plans: {plans}\ncredits: {{ {section} }}", {"trial.yaml": "policy: trial"})


@asynccontextmanager
async def furnished(redis: Redis, postgres: Postgres, **credits: object) -> AsyncIterator[House]:
    """A house around these stores, which it opens and closes. credits: keys of that section, and `plans`."""
    redis.start()
    await postgres.open()
    await migrate(postgres)
    money = Money(settings(**credits), redis, redis, postgres)
    await money.open()
    try:
        yield House(redis, postgres, money)
    finally:
        await money.close()
        await redis.close()
        await postgres.close()


@pytest.fixture
async def house(redis_url: str, database_url: str) -> AsyncIterator[House]:
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    async with furnished(redis, Postgres(database_url, timeout_ms=5_000, pool_max=4)) as house:
        yield house

"""The lookup and the announcements against a real PostgreSQL with the real tables."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from gateway.errors import StoreUnavailable, Unauthenticated
from gateway.identity.api_key import CHANNEL, ApiKey, ApiKeySource, key_loader, new_key
from gateway.identity.key_cache import KeyRecord
from gateway.ledger.migrate import migrate
from gateway.stores.postgres import Postgres
from tests.identity.given import Time, facts
from tests.identity.test_api_key import Config


@pytest.fixture
async def postgres(database_url: str) -> AsyncIterator[Postgres]:
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=2)
    await postgres.open()
    await migrate(postgres)
    await postgres.rows("INSERT INTO gateway.org (org_id, name, plan) VALUES ('acme', 'Acme', 'pro')")
    yield postgres
    await postgres.close()


async def stored(postgres: Postgres, user_id: str | None = None, expires_at: str | None = None) -> ApiKey:
    key = new_key()
    await postgres.rows(
        "INSERT INTO gateway.api_key (key_id, sha256, org_id, user_id, expires_at)"
        " VALUES ($1, $2, 'acme', $3, $4::text::timestamptz)",
        key.key_id, key.sha256, user_id, expires_at,
    )  # fmt: skip
    return key


async def test_a_stored_key_is_found_by_its_hash_with_the_plan_of_its_org(postgres: Postgres) -> None:
    key, other = await stored(postgres, user_id="ada"), await stored(postgres)
    load = key_loader(postgres)
    assert await load(key.sha256) == KeyRecord(key.key_id, "acme", "pro", "ada", None)
    assert await load(other.sha256) == KeyRecord(other.key_id, "acme", "pro", None, None)
    assert await load(bytes(32)) is None


@pytest.mark.parametrize(
    ("expires_at", "expected_ms"),
    [
        ("2030-01-02T03:04:05.678+00", int(datetime(2030, 1, 2, 3, 4, 5, 678_000, UTC).timestamp() * 1000)),
        ("2030-01-02T03:04:05.678999+02", int(datetime(2030, 1, 2, 1, 4, 5, 678_000, UTC).timestamp() * 1000)),
        ("infinity", None),
        ("-infinity", 0),
    ],
)
async def test_the_end_of_a_keys_life_arrives_in_milliseconds(
    postgres: Postgres, expires_at: str, expected_ms: int | None
) -> None:
    key = await stored(postgres, expires_at=expires_at)
    record = await key_loader(postgres)(key.sha256)
    assert record is not None
    assert record.expires_at_ms == expected_ms


async def test_a_revoked_key_is_not_found(postgres: Postgres) -> None:
    key = await stored(postgres)
    await postgres.rows("UPDATE gateway.api_key SET revoked_at = now() WHERE sha256 = $1", key.sha256)
    assert await key_loader(postgres)(key.sha256) is None


async def test_a_database_that_is_gone_is_unavailable_not_an_unknown_key(postgres: Postgres) -> None:
    key = await stored(postgres)
    await postgres.close()
    with pytest.raises(StoreUnavailable):
        await key_loader(postgres)(key.sha256)


async def test_a_revoke_and_a_plan_change_reach_a_listening_gateway_at_once(postgres: Postgres) -> None:
    source = ApiKeySource(Config(), key_loader(postgres), monotonic_ms=Time(), wall_ms=Time())
    listening, announced = asyncio.Event(), asyncio.Queue[str]()

    def heard(payload: str) -> None:
        source.on_notification(payload)
        announced.put_nowait(payload)

    def connected() -> None:
        source.drop_all()
        listening.set()

    postgres.listen({CHANNEL: heard}, connected)
    key = await stored(postgres)
    request = facts(("authorization", f"Bearer {key.secret}"))
    async with asyncio.timeout(10):
        await listening.wait()
        assert await source.identify(request) is not None

        await postgres.transaction(
            [
                ("UPDATE gateway.org SET plan = 'enterprise' WHERE org_id = 'acme'", ()),
                ("SELECT pg_notify('gateway_keys', 'org:acme')", ()),
            ]
        )
        assert await announced.get() == "org:acme"
        principal = await source.identify(request)
        assert principal is not None and principal.plan == "enterprise"

        await postgres.transaction(
            [
                ("UPDATE gateway.api_key SET revoked_at = now() WHERE sha256 = $1", (key.sha256,)),
                ("SELECT pg_notify('gateway_keys', encode($1::bytea, 'hex'))", (key.sha256,)),
            ]
        )
        await announced.get()
        with pytest.raises(Unauthenticated):
            await source.identify(request)
    await source.close()

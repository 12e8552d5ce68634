"""A database that an earlier release made goes on with this one, and its books still balance."""

from hashlib import sha256
from pathlib import Path

import pytest

from gateway.ledger import migrate, pending, post
from gateway.ledger.migrate import migrations
from gateway.stores import Postgres
from gateway.types import Entry
from tests import servers
from tests.ledger.audit import books_are_right

CREDIT = 1_000_000
FIRST = (Path(__file__).parent / "releases" / "0001_ledger.sql").read_text()


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """What the schema is made of is what is tested here."""
    return empty_database_url


async def as_it_was(postgres: Postgres, database_url: str) -> None:
    """What the release before this one left: orgs with balances, a charge, and something changed by hand."""
    second = migrations()[1]
    applied = [(1, "ledger", FIRST), (2, second.name, second.sql)]
    await servers.execute(
        database_url,
        "CREATE SCHEMA gateway; CREATE TABLE gateway.migration (version integer PRIMARY KEY, name text NOT NULL,"
        " sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
    )
    for version, name, sql in applied:
        await servers.execute(database_url, sql)
        await postgres.rows(
            "INSERT INTO gateway.migration (version, name, sha256) VALUES ($1, $2, $3)",
            version,
            name,
            sha256(sql.encode()).hexdigest(),
        )
    await postgres.rows("SELECT * FROM gateway.grant_credits('acme', 'grant:first', 7500000, '{}')")
    await postgres.rows(
        "SELECT * FROM gateway.post(ARRAY['acme'], ARRAY['r1'], ARRAY['settle'], ARRAY[-1250000], ARRAY['{}'])"
    )
    await postgres.rows("INSERT INTO ai_credits VALUES ('globex', 40)")


async def test_a_database_of_the_release_before_is_migrated_and_its_books_balance(database_url: str) -> None:
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=1)
    await postgres.open()
    try:
        await as_it_was(postgres, database_url)
        assert await migrate(postgres) == len(migrations()) - 2
        assert await pending(postgres) == ()
        rows = await postgres.rows("SELECT org_id, kind, amount FROM gateway.ledger ORDER BY seq")
        assert [tuple(row) for row in rows] == [
            ("acme", "grant", 7_500_000),
            ("acme", "settle", -1_250_000),
            ("globex", "external", 40 * CREDIT),
        ]
        # What was charged then is not charged again, what is charged now is, and a change by hand is noted once.
        again = await post(
            postgres, [Entry("acme", "r1", "settle", -1_250_000), Entry("acme", "r2", "settle", -CREDIT)]
        )
        assert again[0].ucredits == 5_250_000
        await postgres.rows("UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'globex'")
        rows = await postgres.rows("SELECT amount FROM gateway.ledger WHERE org_id = 'globex' ORDER BY seq")
        assert [row["amount"] for row in rows] == [40 * CREDIT, CREDIT]
        await books_are_right(postgres)
    finally:
        await postgres.close()

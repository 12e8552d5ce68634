"""The ledger on an application's own table: names, modes, rights, and what happens when one of them changes."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest

from gateway.errors import ConfigError
from gateway.ledger import books
from gateway.ledger.migrate import Binding, is_bound, migrate
from gateway.stores import Postgres
from gateway.types import Entry
from tests import servers
from tests.ledger.audit import books_are_right, entries
from tests.waiting import until

CREDIT = 1_000_000
MODES = ("managed", "attach", "readonly")
STRANGE = ("billing.OrgWallet", "orgId", "Amount")


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """What the schema is made of is what is tested here."""
    return empty_database_url


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Postgres]:
    postgres = Postgres(url, timeout_ms=5_000, pool_max=4)
    await postgres.open()
    try:
        yield postgres
    finally:
        await postgres.close()


@pytest.fixture
async def postgres(database_url: str) -> AsyncIterator[Postgres]:
    async with opened(database_url) as postgres:
        yield postgres


async def wallets(postgres: Postgres) -> None:
    """An application's table with names and types of its own."""
    await postgres.rows("CREATE SCHEMA billing")
    await postgres.rows(
        'CREATE TABLE billing."OrgWallet" (id serial PRIMARY KEY, "orgId" varchar(64) UNIQUE, note text, "Amount" int)'
    )
    await postgres.rows(
        """INSERT INTO billing."OrgWallet" ("orgId", "Amount") VALUES ('acme', 5), ('idle', NULL), (NULL, 3)"""
    )


async def balance(postgres: Postgres, org_id: str = "acme") -> int:
    return (await books.read(postgres, [org_id]))[org_id].ucredits


# Names and modes


@pytest.mark.parametrize("mode", MODES)
async def test_everything_works_on_a_table_with_names_of_its_own(postgres: Postgres, mode: str) -> None:
    await wallets(postgres)
    await migrate(postgres, Binding(*STRANGE, mode))
    assert await balance(postgres) == 5 * CREDIT
    assert [state.ucredits for state in await books.post(postgres, [Entry("acme", "r1", "settle", -1)])] == [
        5 * CREDIT - 1
    ]
    assert (await books.grant(postgres, "new", 7, grant_id="g")).ucredits == 7 * CREDIT
    taken = await books.take_hold(postgres, "acme", "r2", CREDIT, CREDIT, 0, instance="i", lease_ms=60_000)
    assert taken.status == "OK"
    await postgres.rows("""UPDATE billing."OrgWallet" SET "Amount" = "Amount" + 2 WHERE "orgId" = 'acme'""")
    assert await books.poll_external(postgres) == (["acme"] if mode == "readonly" else [])
    await books_are_right(postgres)
    assert await entries(postgres, "acme") == [("opening", 5 * CREDIT), ("settle", -1), ("external", 2 * CREDIT)]
    rows = await postgres.rows("""SELECT "orgId", "Amount" FROM billing."OrgWallet" ORDER BY id""")
    assert [tuple(row.values()) for row in rows] == [("acme", 6), ("idle", None), (None, 3), ("new", 7)]


@pytest.mark.parametrize("table", ["wallet", "billing.wallet"])
async def test_a_managed_table_that_is_missing_is_made(postgres: Postgres, table: str) -> None:
    await postgres.rows("CREATE SCHEMA billing")
    await migrate(postgres, Binding(table, "org", "amount"))
    await postgres.rows(f"INSERT INTO {table} (org, amount) VALUES ('acme', 3)")
    assert await balance(postgres) == 3 * CREDIT
    await books_are_right(postgres)


@pytest.mark.parametrize(
    ("binding", "says"),
    [
        (Binding("walet", mode="attach"), "credits.table: there is no table walet"),
        (Binding("walet", mode="readonly"), "credits.table: there is no table walet"),
        (Binding("shown", "org", "amount"), "credits.table: shown is not a table"),
        (Binding("wallet", "organisation", "amount"), "credits.org_column: wallet.organisation is missing"),
        (Binding("wallet", "id", "amount"), "credits.org_column: wallet.id is uuid, not text"),
        (Binding("wallet", "note", "amount"), "credits.org_column: wallet.note is not unique"),
        (Binding("wallet", "org", "price", "readonly"), "credits.credits_column: wallet.price is numeric, not bigint"),
        (Binding("wallet", "org", "credits", "attach"), "credits.credits_column: wallet.credits is missing"),
    ],
)
async def test_a_table_that_does_not_fit_is_a_mistake_in_the_configuration(
    postgres: Postgres, binding: Binding, says: str
) -> None:
    """Of a database that is new, and of one that was bound well before."""
    await postgres.rows(
        "CREATE TABLE wallet (id uuid UNIQUE, org text UNIQUE, note text, amount bigint, price numeric)"
    )
    await postgres.rows("CREATE VIEW shown AS SELECT org, amount FROM wallet")
    with pytest.raises(ConfigError) as error:
        await migrate(postgres, binding)
    assert error.value.problems == (says,)
    await migrate(postgres, Binding("wallet", "org", "amount"))
    with pytest.raises(ConfigError) as error:
        await migrate(postgres, binding)
    assert error.value.problems == (says,)
    assert await is_bound(postgres, Binding("wallet", "org", "amount"))


async def test_a_mistyped_name_takes_nothing_from_anybody(postgres: Postgres) -> None:
    await migrate(postgres)
    await books.grant(postgres, "acme", 5, grant_id="g")
    with pytest.raises(ConfigError, match="credits.table: there is no table ai_credit; .* in ai_credits"):
        await migrate(postgres, Binding("ai_credit"))
    assert await balance(postgres) == 5 * CREDIT


async def test_migrators_of_one_binding_at_once_bind_once(postgres: Postgres, database_url: str) -> None:
    await wallets(postgres)
    async with AsyncExitStack() as stack:
        several = [await stack.enter_async_context(opened(database_url)) for _ in range(5)]
        await asyncio.gather(*(migrate(one, Binding(*STRANGE, "attach")) for one in several))
    before = await postgres.row("SELECT 'gateway.credit'::regclass::oid AS view")
    await migrate(postgres, Binding(*STRANGE, "attach"))
    assert await postgres.row("SELECT 'gateway.credit'::regclass::oid AS view") == before
    await books_are_right(postgres)


# Changing the binding


async def test_no_change_is_lost_or_counted_twice_from_mode_to_mode(postgres: Postgres) -> None:
    await migrate(postgres)
    await books.grant(postgres, "acme", 5, grant_id="g")
    await books.post(postgres, [Entry("acme", "r1", "settle", -1)])
    for mode in ("readonly", "attach", "readonly", "managed", "managed"):
        await postgres.rows("UPDATE ai_credits SET credits = credits + 1")
        await migrate(postgres, Binding(mode=mode))
        await books_are_right(postgres)
    assert (await entries(postgres, "acme"))[2:] == [("external", CREDIT)] * 5


async def test_what_another_table_has_more_or_less_becomes_entries(postgres: Postgres) -> None:
    await migrate(postgres)
    for org_id in ("acme", "gone"):
        await books.grant(postgres, org_id, 5, grant_id="g")
    await books.post(postgres, [Entry("acme", "r1", "settle", -1)])
    await postgres.rows("CREATE TABLE wallet (org text PRIMARY KEY, amount bigint)")
    await postgres.rows("INSERT INTO wallet VALUES ('acme', 9), ('new', 2)")
    await migrate(postgres, Binding("wallet", "org", "amount", "attach"))
    await books_are_right(postgres)
    assert await balance(postgres) == 9 * CREDIT + 999_999  # the fraction is ours
    assert await entries(postgres, "new") == [("opening", 2 * CREDIT)]
    assert await entries(postgres, "gone") == [("grant", 5 * CREDIT), ("external", -5 * CREDIT)]
    await postgres.rows("UPDATE ai_credits SET credits = 1000")  # nobody's concern any more
    assert await balance(postgres) == 9 * CREDIT + 999_999
    await books_are_right(postgres)


@pytest.mark.parametrize(
    "ill",
    [
        "ALTER TABLE ai_credits DISABLE TRIGGER note_external_change",
        "DROP TRIGGER note_external_change ON ai_credits",
        "ALTER TABLE ai_credits DISABLE TRIGGER ALL",
        "DROP VIEW gateway.credit; ALTER TABLE ai_credits DISABLE TRIGGER ALL, ALTER credits TYPE int",
    ],
)
async def test_what_happened_while_nobody_told_is_found_by_the_next_migration(
    postgres: Postgres, database_url: str, ill: str
) -> None:
    await migrate(postgres)
    await books.grant(postgres, "acme", 5, grant_id="g")
    await servers.execute(database_url, ill)
    assert not await is_bound(postgres, Binding())
    await postgres.rows("UPDATE ai_credits SET credits = credits + 2")
    await postgres.rows("INSERT INTO ai_credits (organization_id, credits) VALUES ('new', 3)")
    assert await migrate(postgres) == 0
    assert await is_bound(postgres, Binding())
    await postgres.rows("UPDATE ai_credits SET credits = credits + 1")
    await books_are_right(postgres)
    assert (await entries(postgres, "acme"))[1:] == [("external", 2 * CREDIT), ("external", CREDIT)]


async def test_posting_finds_what_nobody_told(postgres: Postgres, database_url: str) -> None:
    await migrate(postgres)
    await books.grant(postgres, "acme", 5, grant_id="g")
    await servers.execute(database_url, "ALTER TABLE ai_credits DISABLE TRIGGER ALL; UPDATE ai_credits SET credits = 8")
    [state] = await books.post(postgres, [Entry("acme", "r1", "settle", -CREDIT)])
    assert state.ucredits == 7 * CREDIT
    await books_are_right(postgres)


# Readonly


def _all_of(heard: list[str], wanted: list[str]) -> bool:
    return sorted(heard) == wanted


async def test_polling_finds_each_change_once_and_announces_it(postgres: Postgres) -> None:
    await migrate(postgres, Binding(mode="managed"))
    await migrate(postgres, Binding(mode="readonly"))
    heard: list[str] = []
    listening = asyncio.Event()
    postgres.listen({"gateway_credits": heard.append}, listening.set)
    await listening.wait()
    for statement, org_ids in (
        ("INSERT INTO ai_credits VALUES ('acme', 5), ('globex', 0), ('initech', 1)", ["acme", "initech"]),
        ("UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'acme'", ["acme"]),
        (
            "UPDATE ai_credits SET organization_id = 'umbrella' WHERE organization_id = 'initech'",
            ["initech", "umbrella"],
        ),
        ("DELETE FROM ai_credits WHERE organization_id = 'acme'", ["acme"]),
        ("TRUNCATE ai_credits", ["umbrella"]),
    ):
        await postgres.rows(statement)
        found = await asyncio.gather(*(books.poll_external(postgres) for _ in range(4)))
        assert sorted(org for orgs in found for org in orgs) == org_ids
        await until(partial(_all_of, heard, org_ids))
        heard.clear()
        await books_are_right(postgres)
    assert await books.poll_external(postgres) == []


async def test_pollers_and_posters_at_once_count_a_change_once(postgres: Postgres) -> None:
    await migrate(postgres, Binding(mode="managed"))
    await migrate(postgres, Binding(mode="readonly"))
    await postgres.rows("INSERT INTO ai_credits SELECT 'o' || n, 100 FROM generate_series(1, 20) AS n")

    async def poster(worker: int) -> None:
        for number in range(10):
            await books.post(postgres, [Entry(f"o{n}", f"{worker}-{number}", "settle", -1) for n in range(1, 21)])

    async def poller() -> None:
        for _ in range(20):
            await books.poll_external(postgres)

    async def application() -> None:
        for number in range(20):
            await postgres.rows(f"UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'o{number + 1}'")

    await asyncio.gather(poster(1), poster(2), poller(), poller(), application())
    await books.poll_external(postgres)
    await books_are_right(postgres)
    assert [await balance(postgres, f"o{n}") for n in range(1, 21)] == [101 * CREDIT - 20] * 20


# Triggers and rights


async def test_emptying_the_table_is_a_change_too(postgres: Postgres) -> None:
    await migrate(postgres)
    await postgres.rows("INSERT INTO ai_credits VALUES ('acme', 5), ('globex', 0)")
    await postgres.rows("TRUNCATE ai_credits")
    assert await balance(postgres) == 0
    assert await entries(postgres, "acme") == [("external", 5 * CREDIT), ("external", -5 * CREDIT)]
    await books_are_right(postgres)


async def test_a_change_that_a_trigger_of_the_applications_makes_is_noticed(postgres: Postgres) -> None:
    await migrate(postgres)
    await postgres.rows("INSERT INTO ai_credits VALUES ('acme', 5)")
    await postgres.rows(
        "CREATE FUNCTION bonus() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN NEW.credits := NEW.credits + 1; RETURN NEW; END'"
    )
    await postgres.rows("CREATE TRIGGER bonus BEFORE UPDATE ON ai_credits FOR EACH ROW EXECUTE FUNCTION bonus()")
    await postgres.rows("UPDATE ai_credits SET updated_at = now()")
    assert await balance(postgres) == 6 * CREDIT
    await books_are_right(postgres)


@asynccontextmanager
async def role(postgres: Postgres, *rights: str) -> AsyncIterator[str]:
    """A role with these rights and no others; roles belong to the server, so it goes again."""
    name = f"role_{uuid.uuid4().hex}"
    await postgres.rows(f"CREATE ROLE {name}")
    try:
        for right in rights:
            await postgres.rows(f"GRANT {right} TO {name}")
        yield name
    finally:
        await postgres.rows(f"DROP OWNED BY {name} CASCADE")
        await postgres.rows(f"DROP ROLE {name}")


async def test_an_application_without_rights_on_our_schema_changes_its_table(
    postgres: Postgres, database_url: str
) -> None:
    await migrate(postgres)
    async with (
        role(postgres, "ALL ON ai_credits") as name,
        opened(f"{database_url}?role={name}") as application,
    ):
        for statement in (
            "INSERT INTO ai_credits VALUES ('acme', 5)",
            "UPDATE ai_credits SET credits = 7",
            "UPDATE ai_credits SET organization_id = 'globex'",
            "DELETE FROM ai_credits",
            "INSERT INTO ai_credits VALUES ('acme', 1)",
            "TRUNCATE ai_credits",
        ):
            await application.rows(statement)
            await books_are_right(postgres)
    assert len(await entries(postgres, "acme")) == 5


@pytest.mark.parametrize("mode", MODES)
async def test_a_gateway_needs_no_more_rights_than_its_mode_says(
    postgres: Postgres, database_url: str, mode: str
) -> None:
    await postgres.rows("CREATE TABLE wallet (org text PRIMARY KEY, amount bigint)")
    database = database_url.rpartition("/")[2]
    async with (
        role(postgres, f"CREATE ON DATABASE {database}", "SELECT, INSERT, UPDATE ON wallet") as name,
        opened(f"{database_url}?role={name}") as ours,
    ):
        binding = Binding("wallet", "org", "amount", mode)
        if mode != "readonly":
            with pytest.raises(ConfigError, match="credits.schema: .*denied.* needs SELECT, INSERT, UPDATE, TRIGGER"):
                await migrate(ours, binding)
            await postgres.rows(f"GRANT TRIGGER ON wallet TO {name}")
        await migrate(ours, binding)
        await books.grant(ours, "acme", 5, grant_id="g")
        await postgres.rows("UPDATE wallet SET amount = 9")
        await books.post(ours, [Entry("acme", "r1", "settle", -CREDIT)])
        await migrate(ours, binding)
        assert await balance(ours) == 8 * CREDIT
        await books_are_right(ours)

"""What people and circumstances do to the books: plain SQL, missed announcements, lost keys, strange text."""

import asyncio
import random
import time
from contextlib import AsyncExitStack

import pytest

from gateway import keys
from gateway.admission import Hold
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger import migrate, post, read_balance
from gateway.ledger.accounts import Known
from gateway.ledger.migrate import migrations
from gateway.stores import Postgres, Redis
from gateway.stores.link import Link
from gateway.types import Balance, Charge, Entry, Principal, Quote
from tests import servers
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import refusing_writes
from tests.ledger.running import gateway
from tests.ledger.test_credits import CREDIT, PAID, pay
from tests.limits.given import demand
from tests.waiting import until

TABLE = "ai_credits (organization_id text PRIMARY KEY, credits {})"
SLOT = demand("parallel", "concurrent", "concurrent", "org", ORG, 1, 30_000, 1)


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """What the schema is made of is what is tested here."""
    return empty_database_url


async def sql(house: House, statement: str) -> None:
    await house.postgres.rows(statement)


async def refreshed(house: House) -> None:
    """Redis has every balance that somebody was told of."""
    assert house.freshness._refreshing is not None
    await house.freshness._refreshing


# The application's table


@pytest.mark.parametrize("kind", ["bigint NOT NULL", "integer NOT NULL", "integer"])
async def test_the_applications_own_table_is_used_whatever_our_role_is_called(database_url: str, kind: str) -> None:
    """The test's role is called `gateway`, as the schema: its search path begins with the schema."""
    await servers.execute(database_url, "CREATE TABLE public." + TABLE.format(kind))
    await servers.execute(database_url, "INSERT INTO public.ai_credits VALUES ('acme', 5000)")
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=2)
    await postgres.open()
    try:
        await migrate(postgres)
        assert await read_balance(postgres, ORG) == Balance(ORG, 5_000 * CREDIT, 1)
        assert await post(postgres, [Entry(ORG, "r1", "settle", -1)]) == [Balance(ORG, 5_000 * CREDIT - 1, 2)]
        rows = await postgres.rows("SELECT credits FROM public.ai_credits")
        assert [row["credits"] for row in rows] == [4_999]
        await books_are_right(postgres)
    finally:
        await postgres.close()


async def test_no_value_at_all_is_no_credits(database_url: str) -> None:
    await servers.execute(database_url, "CREATE TABLE " + TABLE.format("bigint"))
    await servers.execute(database_url, "INSERT INTO ai_credits VALUES ('acme', NULL), ('globex', 5)")
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=2)
    await postgres.open()
    try:
        await migrate(postgres)
        assert await read_balance(postgres, ORG) == Balance(ORG, 0, 1)
        await postgres.rows("UPDATE ai_credits SET credits = CASE WHEN credits IS NULL THEN 7 END")
        assert await read_balance(postgres, ORG) == Balance(ORG, 7 * CREDIT, 2)
        assert await read_balance(postgres, "globex") == Balance("globex", 0, 2)
        await post(postgres, [Entry("globex", "r1", "settle", -CREDIT)])
        assert await read_balance(postgres, "globex") == Balance("globex", -CREDIT, 3)
        await books_are_right(postgres)
    finally:
        await postgres.close()


async def test_changes_by_hand_keep_the_books(house: House) -> None:
    await house.credits(3)
    await post(house.postgres, [Entry(ORG, "r1", "settle", -1)])
    for statement in (
        "UPDATE ai_credits SET credits = -7",
        "UPDATE ai_credits SET organization_id = 'globex'",
        "UPDATE ai_credits SET organization_id = 'initech', credits = credits + 9",
        "UPDATE ai_credits SET organization_id = 'initech'",
        "DELETE FROM ai_credits",
        "INSERT INTO ai_credits (organization_id, credits) VALUES ('acme', 4)",
    ):
        await sql(house, statement)
        await books_are_right(house.postgres)
    balance = await read_balance(house.postgres, ORG)
    assert balance is not None and balance.ucredits == 4 * CREDIT + 999_999  # the fraction had stayed behind


async def test_what_an_org_had_is_not_spendable_once_its_row_is_gone(house: House) -> None:
    await house.credits(5)
    assert await pay(house, "r1") is None
    await sql(house, "DELETE FROM ai_credits")
    house.freshness.on_notification(ORG)

    async def penniless() -> bool:
        return (await house.account())["p"] == 0

    await until(penniless)
    refusal = await pay(house, "r2")
    assert refusal is not None and refusal.code == "insufficient_credits"


async def test_posting_to_an_org_whose_row_is_gone_takes_away_what_it_had(house: House) -> None:
    """Also when nobody heard of it: or the outbox would empty itself into the dead letters, and the org spend on."""
    await house.credits(5)
    assert await pay(house, "r1") is None
    await sql(house, "DELETE FROM ai_credits")
    await house.outbox.flush()
    account = await house.account()
    assert (account["p"], account["u"]) == (0, 0)
    assert await pay(house, "r2") is not None
    await sql(house, "INSERT INTO ai_credits (organization_id, credits) VALUES ('acme', 2)")
    house.freshness.on_notification(ORG)

    async def paid() -> bool:
        return await pay(house, f"r{time.monotonic_ns()}") is None

    await until(paid)


# Several at once


async def test_any_number_of_migrators_at_once(database_url: str) -> None:
    async with AsyncExitStack() as stack:
        several = [Postgres(database_url, timeout_ms=5_000, pool_max=2) for _ in range(5)]
        for postgres in several:
            await postgres.open()
            stack.push_async_callback(postgres.close)
        assert sum(await asyncio.gather(*(migrate(postgres) for postgres in several))) == len(migrations())


async def test_eight_posters_of_the_same_entries_post_each_once(house: House) -> None:
    """In any order, with orgs that exist and orgs that do not, while the application changes balances too."""
    await sql(house, "INSERT INTO ai_credits SELECT 'o' || n, 1000 FROM generate_series(1, 12) AS n")
    dice = random.Random(7)
    entries = [Entry(f"o{dice.randint(1, 15)}", f"r{n}", "settle", -dice.randint(1, 3 * CREDIT)) for n in range(200)]

    async def poster(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(10):
            await post(house.postgres, mine.sample(entries, 40))
        await post(house.postgres, mine.sample(entries, len(entries)))

    async def application() -> None:
        for number in range(20):
            await sql(
                house, f"UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'o{number % 12 + 1}'"
            )

    await asyncio.gather(*(poster(seed) for seed in range(8)), application())
    await books_are_right(house.postgres)
    posted = await house.postgres.rows(
        "SELECT request_id FROM gateway.ledger WHERE kind = 'settle'"
        " UNION ALL SELECT request_id FROM gateway.dead_letter"
    )
    assert sorted(row["request_id"] for row in posted) == sorted(entry.request_id for entry in entries)


# Announcements


async def test_a_top_up_that_nobody_announced_is_found_when_its_org_is_refused(house: House) -> None:
    """The listening connection was away, and the org not among the active ones that are read after such a gap."""
    assert await pay(house, "r1") is not None
    await refreshed(house)
    await house.credits(1)  # announced, and this house does not listen
    house.freshness._rechecked.clear()
    await house.redis.call("DEL", keys.ACTIVE_ORGS)
    assert await pay(house, "r2") is not None

    async def paid() -> bool:
        return await pay(house, f"r{time.monotonic_ns()}") is None

    await until(paid)


async def test_an_org_that_asks_for_ever_is_read_again_only_now_and_then(house: House) -> None:
    for number in range(50):
        assert await pay(house, f"r{number}") is not None
    assert len(house.freshness._rechecked) == 1
    await refreshed(house)
    assert not house.freshness._stale


async def test_a_thousand_orgs_topped_up_in_one_statement_are_all_refreshed(redis_url: str, database_url: str) -> None:
    """With a pool and deadlines that a read for each org at once would run into."""
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = Postgres(database_url, timeout_ms=500, pool_max=2)
    async with furnished(redis, postgres) as house:
        await postgres.rows(
            "INSERT INTO ai_credits SELECT 'o' || n, n FROM generate_series(1, 1000) AS n", timeout_ms=5_000
        )
        for number in range(1, 1001):
            house.freshness.on_notification(f"o{number}")
        await refreshed(house)
        for number in (1, 500, 1000):
            assert await redis.call("HGET", keys.account(f"o{number}"), "p") == b"%d" % (number * CREDIT)


async def test_a_refresh_that_fails_is_repeated(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.credits(1)
    assert await pay(house, "r1") is None
    await house.outbox.flush()
    await sql(house, "UPDATE ai_credits SET credits = credits + 1")
    failed = asyncio.Event()
    install = house.accounts.install

    async def noticed(balance: Balance, known: Known) -> None:
        try:
            await install(balance, known)
        except StoreUnavailable:
            failed.set()
            raise

    monkeypatch.setattr(house.accounts, "install", noticed)
    async with refusing_writes(house.redis):
        house.freshness.on_notification(ORG)
        await failed.wait()
    await refreshed(house)
    assert await pay(house, "r2") is None


# Strange entries


async def test_a_name_with_a_nul_in_it_holds_up_nobody(house: House) -> None:
    await house.credits(5)
    async with house.admission.hold("r1", ASKER, (), Quote.flat(CREDIT)) as hold:
        assert isinstance(hold, Hold)
        hold.charge, hold.meta = PAID, {"model": "a\0b", "user": "\\u0000"}
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
    rows = await house.postgres.rows("SELECT meta->>'model' AS model, meta->>'user' AS user FROM gateway.ledger")
    assert (rows[-1]["model"], rows[-1]["user"]) == ("a\ufffdb", "\\u0000")


async def test_an_entry_the_ledger_refuses_holds_up_nobody_else(house: House) -> None:
    await house.credits(5)
    rich = Principal("rich", "pro", None, None, "api_key")
    await house.credits(1, "rich", "grant:rich")
    for asker, hold_id in ((ASKER, "r1"), (rich, "r2"), (rich, "r3"), (ASKER, "r4")):
        async with house.admission.hold(hold_id, asker, (), Quote.flat(1)) as hold:
            if isinstance(hold, Hold):
                hold.charge = Charge(1, None, True, "exact")
    # More than a balance in micro-credits can be: nothing can be added to it or taken from it.
    for _ in range(2):
        await sql(house, "UPDATE ai_credits SET credits = credits + 9000000000000 WHERE organization_id = 'rich'")
    with pytest.raises(StoreRefused):
        await post(house.postgres, [Entry("rich", "r2", "settle", -1)])
    await house.outbox.flush()
    assert [entry[0] for entry in await house.ledger() if entry[1] == "settle"] == ["r1", "r4"]
    # Nor does its balance hold up the refreshing of others.
    for org_id in ("rich", ORG):
        house.freshness.on_notification(org_id)
    await refreshed(house)
    for _ in range(2):
        await sql(house, "UPDATE ai_credits SET credits = credits - 9000000000000 WHERE organization_id = 'rich'")
    house.outbox.mark("rich")
    await house.outbox.flush()
    assert [entry[0] for entry in await house.ledger("rich") if entry[1] == "settle"] == ["r2", "r3"]


# Lost keys and old requests


async def test_a_settle_whose_account_was_evicted_frees_its_slot_at_once(redis_url: str, database_url: str) -> None:
    """And its org goes on as soon as everybody has told what the account may have owed."""
    async with gateway(redis_url, database_url) as house:
        await house.credits(5)
        async with house.admission.hold("r1", ASKER, (SLOT,), Quote.flat(CREDIT)) as hold:
            assert isinstance(hold, Hold)
            await house.redis.call("DEL", keys.account(ORG))
            hold.charge = PAID
        assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)
        assert await house.redis.call("EXISTS", keys.holds(ORG), keys.deadlines(ORG), hold.counters[0]) == 0

        async def admitted() -> bool:
            hold_id = f"r{time.monotonic_ns()}"
            async with house.admission.hold(hold_id, ASKER, (SLOT,), Quote.flat(CREDIT)) as again:
                return isinstance(again, Hold) and again.available_ucredits == 3 * CREDIT

        await until(admitted)
        account = await house.account()
        assert (account["p"], account["u"], account["h"]) == (4 * CREDIT, 0, 0)


@pytest.mark.parametrize("charge", [PAID, None])
async def test_a_swept_request_that_settles_after_a_quarter_of_an_hour(house: House, charge: Charge | None) -> None:
    """Every key whose time is up by then is gone; the sweeper's charge is corrected all the same."""
    await house.credits(5)
    context = house.admission.hold("r1", ASKER, (SLOT,), Quote.flat(CREDIT))
    hold = await context.__aenter__()
    assert isinstance(hold, Hold)
    await house.redis.call("ZADD", keys.deadlines(ORG), 1, "r1")
    assert await house.sweeper.sweep() == 1
    await house.outbox.flush()
    for key in await house.redis.call("KEYS", "*"):
        if 0 < await house.redis.call("TTL", key) <= 1_000:
            await house.redis.call("DEL", key)
    hold.charge = charge
    await context.__aexit__(None, None, None)
    await house.sweeper.sweep()
    await house.outbox.flush()
    account = await house.account()
    left = 4 * CREDIT if charge else 5 * CREDIT
    assert (account["p"], account["u"], account["h"]) == (left, 0, 0)


async def test_what_the_sweeper_charged_too_much_cannot_be_spent_twice(house: House) -> None:
    """It comes back with the posting; a balance that is read in between has it already."""
    await house.credits(1)
    context = house.admission.hold("r1", ASKER, (), Quote.flat(CREDIT))
    hold = await context.__aenter__()
    assert isinstance(hold, Hold)
    await house.redis.call("ZADD", keys.deadlines(ORG), 1, "r1")
    await house.sweeper.sweep()
    await house.outbox.flush()
    await context.__aexit__(None, None, None)  # released: the upstream never saw it
    house.outbox.mark(ORG)
    found, _ = await house.outbox._read([ORG], 10)
    await post(house.postgres, [item.entry for item in found])
    house.freshness.on_notification(ORG)
    await refreshed(house)
    assert await pay(house, "r2") is None
    assert await pay(house, "r3") is not None


async def test_one_sweep_ends_all_the_holds_a_lost_gateway_left(house: House) -> None:
    await house.credits(1000)
    holds = [house.admission.hold(f"r{number}", ASKER, (), Quote.flat(CREDIT)) for number in range(450)]
    for hold in holds:
        assert isinstance(await hold.__aenter__(), Hold)
    for number in range(450):
        await house.redis.call("ZADD", keys.deadlines(ORG), 1, f"r{number}")
    assert await house.sweeper.sweep() == 450
    account = await house.account()
    assert (account["h"], account["u"]) == (0, 450 * CREDIT)
    for hold in holds:
        await hold.__aexit__(None, None, None)


# Many at once


async def test_renewing_thousands_of_leases_never_stands_in_front_of_an_admission(house: House) -> None:
    """They travel on the same connection: what is queued there is what an admission waits for."""
    await house.credits(10_000)
    admission = house.admission
    for start in range(0, 2000, 500):
        holds = [Hold(f"r{number}", ASKER, (), Quote.flat(CREDIT)) for number in range(start, start + 500)]
        assert await asyncio.gather(*(admission.take(hold) for hold in holds)) == [None] * 500
    last = (keys.deadlines(ORG), "r1999")
    before = await house.redis.call("ZSCORE", *last)
    house.obey(heartbeat_ms=10)
    renewing = asyncio.create_task(admission._keep_renewing())
    queued = 0

    async def renewed() -> bool:
        nonlocal queued
        assert isinstance(house.redis._link, Link)
        for _ in range(20):
            await asyncio.sleep(0)
            queued = max(queued, house.redis._link.waiting_count)
        return bool(await house.redis.call("ZSCORE", *last) > before)

    try:
        await until(renewed)
    finally:
        renewing.cancel()
        admission._open.clear()
    assert 50 < queued < 200

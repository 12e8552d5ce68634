"""PostgreSQL comes back older than Redis knows it: restored from a backup, or a standby that had not got everything."""

import asyncio
import random

import pytest

from gateway.ledger import books
from gateway.ledger.outbox import OutboxEntry
from gateway.types import Balance, Entry
from tests.ledger.conftest import ORG, House
from tests.ledger.running import CREDIT, Request, gateway, is_whole, pay, state
from tests.waiting import until

TABLES = ("gateway.account", "gateway.ledger", "gateway.hold", "ai_credits")


async def back_up(house: House) -> None:
    await house.postgres.rows("CREATE SCHEMA backup")
    for table in TABLES:
        await house.postgres.rows(f"CREATE TABLE backup.{table.split('.')[-1]} AS TABLE {table}")


async def restore(house: House) -> None:
    """Every row is as it was when `back_up` was called, and nobody is told."""
    puts = [
        f"ALTER TABLE {table} DISABLE TRIGGER USER; DELETE FROM {table}; "
        f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM backup.{table.split('.')[-1]}; "
        f"ALTER TABLE {table} ENABLE TRIGGER USER;"
        for table in TABLES
    ]
    await house.postgres.rows(f"DO $$ BEGIN {' '.join(puts)} END $$")


async def go_through(house: House, requests: int, ucredits: int, name: str) -> int:
    """Requests one after the other, each posted before the next: how many were paid."""
    paid = 0
    for number in range(requests):
        paid += await pay(house, f"{name}{number}", ucredits) == "paid"
        await house.outbox.flush()
    return paid


async def is_settled(house: House) -> None:
    """Nothing is held and unposted, and both stores have the same account."""
    await house.outbox.flush()
    known, row = await house.account(), await state(house)
    assert known["u"] == known["h"] == 0
    assert (known["p"], known["v"], known["ep"]) == (
        row["credits"] * CREDIT + row["micro"], row["version"], row["epoch"],
    )  # fmt: skip


async def test_credits_are_spent_once_and_not_for_ever(house: House) -> None:
    await house.credits(100)
    assert await go_through(house, 1, 10 * CREDIT, "kept") == 1
    await back_up(house)
    assert await go_through(house, 10, CREDIT, "lost") == 10
    await restore(house)
    assert await go_through(house, 30, 10 * CREDIT, "after") == 9
    assert (await state(house))["credits"] == 0
    await is_settled(house)


async def test_what_a_lost_top_up_brought_is_gone_with_the_first_posting(house: House) -> None:
    await house.credits(10)
    assert await go_through(house, 1, CREDIT, "kept") == 1
    await back_up(house)
    await house.credits(991, grant_id="grant:lost")
    assert await go_through(house, 10, CREDIT, "lost") == 10
    await restore(house)
    assert await go_through(house, 30, 9 * CREDIT, "after") == 1
    assert (await state(house))["credits"] == 0
    await is_settled(house)


async def test_no_more_is_overspent_than_was_in_flight_or_unposted(house: House) -> None:
    await house.credits(10)
    await back_up(house)
    await house.credits(40, grant_id="grant:lost")
    assert await go_through(house, 10, CREDIT, "lost") == 10
    open_ones = [Request(house, f"open{number}", 10 * CREDIT) for number in range(3)]
    assert all([await request.begin() for request in open_ones])
    assert await pay(house, "unposted", 10 * CREDIT) == "paid"
    await restore(house)
    assert await go_through(house, 5, CREDIT, "meanwhile") == 0
    for request in open_ones:
        await request.end()
    assert await go_through(house, 30, CREDIT, "after") == 0
    assert (await state(house))["credits"] == -30
    await is_settled(house)


async def test_a_top_up_is_seen_at_once(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url) as house:
        await house.credits(2)
        await back_up(house)
        assert await go_through(house, 2, CREDIT, "lost") == 2
        await house.credits(20, grant_id="grant:lost")
        await until(lambda: has(house, 20 * CREDIT))
        assert await go_through(house, 20, CREDIT, "lost too") == 20
        await restore(house)
        await house.postgres.rows("UPDATE ai_credits SET credits = credits + 5")
        await until(lambda: has(house, 7 * CREDIT))


async def has(house: House, ucredits: int) -> bool:
    return (await house.account()).get("p") == ucredits


async def test_who_connects_again_reads_every_active_org(house: House) -> None:
    """The end of a database is the end of all connections to it."""
    await house.credits(2)
    await back_up(house)
    await house.credits(50, grant_id="grant:lost")
    assert await go_through(house, 10, CREDIT, "lost") == 10
    await restore(house)
    house.freshness.refresh_all()
    await until(lambda: has(house, 2 * CREDIT))
    await is_settled(house)


async def test_an_idle_org_is_noticed_when_it_asks_for_a_cap(house: House) -> None:
    await house.credits(5)
    await back_up(house)
    await house.credits(50, grant_id="grant:lost")
    assert await go_through(house, 10, CREDIT, "lost") == 10
    assert await house.accounts.retire(ORG)
    await restore(house)
    assert await pay(house, "greedy", 20 * CREDIT) == "request_exceeds_balance"
    assert await pay(house, "modest", 5 * CREDIT) == "paid"
    await is_settled(house)


async def test_an_epoch_that_is_forgotten_never_comes_again(redis_url: str, database_url: str) -> None:
    """Gateways that have heard of it would not believe what is admitted in an older one."""
    async with gateway(redis_url, database_url) as house:
        await house.credits(20)
        assert await pay(house, "kept") == "paid"
        await house.outbox.flush()
        await back_up(house)
        for number in range(2):
            await house.redis.call("FLUSHALL")
            assert await go_through(house, 3, CREDIT, f"lost{number}-") == 3
            await until(lambda: is_whole(house))
        assert (await state(house))["epoch"] == 3
        await restore(house)
        assert await go_through(house, 3, CREDIT, "after") == 3
        await until(lambda: is_whole(house))
        await until(lambda: is_believed(house))


async def is_believed(house: House) -> bool:
    """What Redis admits is admitted in the newest epoch that this gateway has heard of."""
    return not house.admission._leases.is_stale(ORG, (await house.account())["ep"])


async def test_a_flusher_that_dies_before_the_database_goes_on_leaves_it_to_the_next(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.credits(20)
    await back_up(house)
    assert await go_through(house, 10, CREDIT, "lost") == 10
    await restore(house)
    assert await pay(house, "r1") == "paid"
    with monkeypatch.context() as patched:
        patched.setattr(books, "go_on_after", dies)
        with pytest.raises(asyncio.CancelledError):
            await house.outbox.flush()
    assert (await state(house))["credits"] == 19
    assert (await house.account())["u"] == CREDIT
    await is_settled(house)
    assert (await state(house))["credits"] == 19


async def dies(*args: object) -> Balance:
    raise asyncio.CancelledError


async def test_gateways_that_notice_together_go_on_once(redis_url: str, database_url: str) -> None:
    async with (
        gateway(redis_url, database_url, works=False, listens=False) as one,
        gateway(redis_url, database_url, works=False, listens=False) as other,
    ):
        await one.credits(20)
        await back_up(one)
        assert await go_through(one, 10, CREDIT, "lost") == 10
        await restore(one)
        for house in (one, other):
            assert await pay(house, f"r{id(house)}") == "paid"
        known = await one.account()
        await asyncio.gather(one.outbox.flush(), other.outbox.flush(), one.accounts.refresh(ORG))
        await is_settled(one)
        assert (await state(one))["credits"] == 18
        # One version for going on, and at most what two postings make after it.
        assert (await state(one))["version"] <= known["v"] + 3


class Flusher:
    """An outbox whose three steps are taken one by one."""

    def __init__(self, house: House) -> None:
        self._outbox = house.outbox
        self._batch: list[OutboxEntry] = []
        self._answer: tuple[list[OutboxEntry], list[Balance]] | None = None

    async def step(self, chance: random.Random) -> None:
        if chance.random() < 0.1:
            self._batch, self._answer = [], None  # it dies
        elif self._answer is not None:
            entries, balances = self._answer
            await self._outbox._apply({ORG: entries}, {balance.org_id: balance for balance in balances})
            self._batch, self._answer = [], None
        elif self._batch:
            self._answer = await self._outbox._post(self._batch)
        else:
            self._batch, _ = await self._outbox._read([ORG], chance.randint(1, 4))


async def anything(house: House, chance: random.Random, name: str) -> None:
    """Something that gives the account a new version, or has Redis told of one."""
    match chance.randrange(6):
        case 0 | 1:
            await pay(house, name, chance.randint(1, 3 * CREDIT))
        case 2:
            await house.postgres.rows("UPDATE ai_credits SET credits = credits + 1")
        case 3:
            await house.accounts.refresh(ORG)
        case 4:
            await house.accounts.retire(ORG)
        case 5:
            # As a gateway does that heard no reply from Redis.
            entry = Entry(ORG, name, "settle", -CREDIT, {})
            await house.accounts.install((await books.post(house.postgres, [entry]))[0])


@pytest.mark.parametrize("seed", range(6))
async def test_postings_told_in_any_order_are_no_older_database(
    house: House, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    async def never(*args: object) -> Balance:
        raise AssertionError(f"nothing was restored: {args}")

    monkeypatch.setattr(books, "go_on_after", never)
    chance = random.Random(seed)
    await house.credits(1_000)
    flushers = [Flusher(house) for _ in range(3)]
    for number in range(150):
        if chance.random() < 0.4:
            await anything(house, chance, f"r{number}")
        else:
            await chance.choice(flushers).step(chance)
    house.outbox.mark(ORG)
    await house.accounts.refresh(ORG)
    await is_settled(house)

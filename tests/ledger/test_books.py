"""Every function of the books by itself: what it does, and that doing it again does nothing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import pytest

from gateway.errors import StoreUnavailable
from gateway.ledger import books
from gateway.ledger.migrate import migrate
from gateway.stores import Postgres
from gateway.types import Balance, Entry
from tests.ledger.audit import books_are_right, entries
from tests.waiting import until

CREDIT = 1_000_000
ORG = "acme"
GRACE_MS = 60_000


@pytest.fixture
async def postgres(database_url: str) -> AsyncIterator[Postgres]:
    """A migrated database with one org that has ten credits."""
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    await books.grant(postgres, ORG, 10, grant_id="g")
    try:
        yield postgres
        await books_are_right(postgres)
    finally:
        await postgres.close()


async def state(postgres: Postgres, org_id: str = ORG) -> Balance:
    return (await books.read(postgres, [org_id]))[org_id]


async def raised(
    postgres: Postgres, credits: int, birth: str = "b1", floor: int = 0, epoch: int | None = None
) -> Balance:
    epoch = (await state(postgres)).epoch if epoch is None else epoch
    return await books.raise_cap(postgres, ORG, epoch, birth, credits * CREDIT, floor * CREDIT, GRACE_MS)


async def hold(postgres: Postgres, request: str, want: int, least: int = 1, capped: bool = True) -> books.Taken:
    return await books.take_hold(
        postgres, ORG, request, want * CREDIT, least * CREDIT, CREDIT, instance="i1", lease_ms=60_000, capped=capped
    )


async def overdue(postgres: Postgres) -> None:
    """Every lease is over."""
    await postgres.rows("UPDATE gateway.hold SET deadline = deadline - interval '1 hour'")


# States


async def test_an_org_without_a_row_has_nothing(postgres: Postgres) -> None:
    assert await books.read(postgres, ["nobody", ORG]) == {
        "nobody": Balance("nobody", 0, 0, present=False),
        ORG: Balance(ORG, 10 * CREDIT, 1),
    }
    assert await books.read_balance(postgres, "nobody") is None


async def test_a_grant_counts_once(postgres: Postgres) -> None:
    assert (await books.grant(postgres, ORG, 10, grant_id="g")).ucredits == 10 * CREDIT
    assert (await books.grant(postgres, ORG, 1, grant_id="g2", note="sorry")).ucredits == 11 * CREDIT


@pytest.mark.parametrize("statement", ["UPDATE gateway.ledger SET amount = 0", "DELETE FROM gateway.ledger"])
async def test_what_is_in_the_ledger_stays_as_it_is(postgres: Postgres, statement: str) -> None:
    for forbidden in (statement, "TRUNCATE gateway.ledger"):
        with pytest.raises(StoreUnavailable, match="append-only"):
            await postgres.rows(forbidden)


# Posting


async def test_each_entry_counts_once_whatever_the_order(postgres: Postgres) -> None:
    """A settle outranks an orphan: the difference is posted, and an orphan that comes later is nothing."""
    late = [Entry(ORG, "a", "settle", -3), Entry(ORG, "b", "orphan", -5)]
    early = [Entry(ORG, "a", "orphan", -1), Entry(ORG, "b", "settle", -2), Entry(ORG, "c", "expire", -7)]
    for batch in (early, late, early, late + early):
        [after] = await books.post(postgres, batch)
    assert after.ucredits == 10 * CREDIT - 12
    assert await entries(postgres, ORG) == [
        ("grant", 10 * CREDIT), ("orphan", -1), ("expire", -7), ("settle", -2), ("settle", -2),
    ]  # fmt: skip


async def test_an_entry_of_an_org_that_is_gone_is_kept_for_a_person(postgres: Postgres) -> None:
    await hold(postgres, "r1", 2)
    await postgres.rows("DELETE FROM ai_credits")
    for _ in range(2):
        states = await books.post(postgres, [Entry(ORG, "r1", "settle", -1), Entry("nobody", "r2", "settle", -2)])
    assert {one.org_id: (one.ucredits, one.set_aside_ucredits, one.present) for one in states} == {
        ORG: (0, 0, False),
        "nobody": (0, 0, False),
    }
    rows = await postgres.rows("SELECT org_id, amount FROM gateway.dead_letter ORDER BY org_id")
    assert [tuple(row.values()) for row in rows] == [(ORG, -1), ("nobody", -2)]


async def test_whole_credits_are_written_only_when_they_change(postgres: Postgres) -> None:
    await books.post(postgres, [Entry(ORG, "r1", "settle", -1)])
    before = await postgres.row("SELECT ctid::text, credits FROM ai_credits")
    await books.post(postgres, [Entry(ORG, "r2", "settle", -1)])
    assert await postgres.row("SELECT ctid::text, credits FROM ai_credits") == before


@pytest.mark.parametrize("amount", [-CREDIT, -1, 1, -11 * CREDIT - 1, -CREDIT - 999_999])
async def test_the_fraction_is_never_negative(postgres: Postgres, amount: int) -> None:
    [after] = await books.post(postgres, [Entry(ORG, "r1", "settle", amount)])
    assert after.ucredits == 10 * CREDIT + amount
    row = await postgres.row(
        "SELECT credits * 1000000 + micro AS sum FROM gateway.credit JOIN gateway.account USING (org_id)"
    )
    assert row is not None and row["sum"] == after.ucredits


# The cap


async def test_the_cap_is_twice_the_need_as_far_as_there_is_so_much(postgres: Postgres) -> None:
    first = await raised(postgres, 2)
    assert (first.cap_ucredits, first.birth, first.epoch) == (4 * CREDIT, "b1", 1)
    again = await raised(postgres, 2)  # a new state all the same: Redis may have lowered its own
    assert again == replace(first, version=first.version + 1)
    assert (await raised(postgres, 1, floor=5)).cap_ucredits == 5 * CREDIT
    assert (await raised(postgres, 1)).cap_ucredits == 5 * CREDIT
    await hold(postgres, "r1", 3)
    assert (await raised(postgres, 9)).cap_ucredits == 7 * CREDIT


async def test_a_hash_of_another_epoch_or_without_birth_gets_nothing(postgres: Postgres) -> None:
    before = await state(postgres)
    for epoch, birth in ((0, "b1"), (2, "b1"), (1, "")):
        assert await raised(postgres, 2, birth, epoch=epoch) == before


async def test_the_cap_is_lowered_only_in_the_state_that_redis_lowered_it_in(postgres: Postgres) -> None:
    now = await raised(postgres, 2)
    for epoch, birth, version in ((2, "b1", now.version), (1, "b2", now.version), (1, "b1", now.version - 1)):
        assert await books.lower_cap(postgres, ORG, epoch, birth, version, CREDIT) is None
    lowered = await books.lower_cap(postgres, ORG, 1, "b1", now.version, CREDIT)
    assert lowered is not None and (lowered.cap_ucredits, lowered.version) == (CREDIT, now.version + 1)
    assert await books.lower_cap(postgres, ORG, 1, "b1", now.version, CREDIT) is None


# Loss


async def test_another_hash_means_that_one_is_lost(postgres: Postgres) -> None:
    for instance in ("i1", "i2"):
        await books.beat(postgres, instance)
    await raised(postgres, 2)
    after = await raised(postgres, 1, "b2")
    assert (after.epoch, after.birth) == (2, "b2")
    assert (after.set_aside_ucredits, after.cap_ucredits) == (4 * CREDIT, 2 * CREDIT)
    assert await raised(postgres, 9, "b1", epoch=1) == after  # the lost one is too late
    assert await books.beat(postgres, "i1") == books.Beat(2, ((ORG, 2),))
    assert await books.beat(postgres, "i3") == books.Beat(3, ())


async def test_a_hash_that_nobody_owed_to_is_replaced_quietly(postgres: Postgres) -> None:
    await books.beat(postgres, "i1")
    now = await raised(postgres, 2)
    await books.lower_cap(postgres, ORG, 1, "b1", now.version, 0)
    after = await raised(postgres, 2, "b2")
    assert (after.epoch, after.birth, after.set_aside_ucredits, after.cap_ucredits) == (2, "b2", 0, 4 * CREDIT)
    assert (await books.beat(postgres, "i1")).waiting == ()


async def test_the_last_word_ends_the_loss(postgres: Postgres) -> None:
    for instance in ("i1", "i2", "i3"):
        await books.beat(postgres, instance)
    await raised(postgres, 4)
    lost = await raised(postgres, 0, "b2")
    assert lost.set_aside_ucredits == 8 * CREDIT

    async def says(instance: str, birth: str, owed: int, epoch: int = 2) -> Balance:
        return await books.acknowledge(postgres, instance, ORG, epoch, birth, owed * CREDIT, GRACE_MS)

    for instance, birth, epoch in (("i4", "b2", 2), ("i1", "b2", 1), ("i4", "b3", 2)):
        assert await says(instance, birth, 9, epoch) == lost  # nobody waits for that
    first = await says("i1", "b2", 1)
    assert (first.cap_ucredits, first.set_aside_ucredits) == (CREDIT, 8 * CREDIT)
    assert await says("i1", "b2", 1) == first
    assert (await says("i2", "", 0)).set_aside_ucredits == 8 * CREDIT
    last = await says("i3", "b2", 3)
    assert (last.cap_ucredits, last.set_aside_ucredits) == (3 * CREDIT, 0)


async def test_a_word_from_yet_another_hash_is_another_loss(postgres: Postgres) -> None:
    await books.beat(postgres, "i1")
    await raised(postgres, 2)
    await raised(postgres, 1, "b2")
    after = await books.acknowledge(postgres, "i1", ORG, 2, "b3", CREDIT, GRACE_MS)
    assert (after.epoch, after.birth, after.cap_ucredits, after.set_aside_ucredits) == (3, "b3", 0, 6 * CREDIT)
    assert (await books.beat(postgres, "i1")).waiting == ((ORG, 3),)


async def test_a_loss_that_nobody_can_tell_of_ends_with_its_time(postgres: Postgres) -> None:
    """Also when no gateway was known to live: it does not end before."""
    await raised(postgres, 2)
    assert (await raised(postgres, 0, "b2")).set_aside_ucredits == 4 * CREDIT
    await books.beat(postgres, "i1")
    assert (await state(postgres)).set_aside_ucredits == 4 * CREDIT
    await postgres.rows("UPDATE gateway.account SET lost_until = clock_timestamp() - interval '1 s'")
    await books.beat(postgres, "i1")
    assert (await state(postgres)).set_aside_ucredits == 0


async def test_nobody_waits_for_an_instance_that_has_left(postgres: Postgres) -> None:
    for instance in ("i1", "i2"):
        await books.beat(postgres, instance)
    await raised(postgres, 2)
    await raised(postgres, 0, "b2")
    for _ in range(2):
        await books.leave(postgres, "i1")
    assert await books.beat(postgres, "i2") == books.Beat(1, ((ORG, 2),))
    await books.leave(postgres, "i2")
    assert (await state(postgres)).set_aside_ucredits == 0


async def test_instances_that_were_not_seen_lately_neither_count_nor_are_waited_for(postgres: Postgres) -> None:
    for instance in ("i1", "i2", "i3"):
        await books.beat(postgres, instance)
    await postgres.rows("UPDATE gateway.instance SET seen_at = seen_at - interval '16 s' WHERE instance_id = 'i2'")
    await postgres.rows("UPDATE gateway.instance SET seen_at = seen_at - interval '2 days' WHERE instance_id = 'i3'")
    assert (await books.beat(postgres, "i1")).instances == 1
    await raised(postgres, 2)
    await raised(postgres, 0, "b2")
    row = await postgres.row("SELECT waiting, (SELECT count(*) FROM gateway.instance) AS known FROM gateway.account")
    assert row is not None and tuple(row.values()) == (["i1"], 2)


# Holds


async def test_a_hold_is_of_what_redis_may_not_owe(postgres: Postgres) -> None:
    await raised(postgres, 3)
    taken = await hold(postgres, "r1", 9)
    assert (taken.status, taken.held_ucredits, taken.available_ucredits) == ("OK", 4 * CREDIT, 4 * CREDIT)
    assert (taken.owned_ucredits, taken.balance.set_aside_ucredits) == (10 * CREDIT, 4 * CREDIT)
    again = await hold(postgres, "r1", 9)
    assert (again.status, again.held_ucredits, again.balance) == ("DUP", 4 * CREDIT, taken.balance)
    assert (await hold(postgres, "r2", 1)).status == "INFLIGHT"
    assert (await hold(postgres, "r3", 20, 11)).status == "NOCREDIT"
    assert (await hold(postgres, "r4", 6, 6, capped=False)).status == "OK"
    await books.post(postgres, [Entry(ORG, "r1", "settle", -CREDIT), Entry(ORG, "r4", "orphan", 0)])
    assert (await hold(postgres, "r1", 1)).status == (await hold(postgres, "r4", 1)).status == "GONE"
    assert (await state(postgres)).set_aside_ucredits == 0


async def test_nobody_holds_for_an_org_without_a_row(postgres: Postgres) -> None:
    taken = await books.take_hold(postgres, "nobody", "r1", 1, 0, 0, instance="i1", lease_ms=1_000)
    assert (taken.status, taken.balance) == ("NOCREDIT", Balance("nobody", 0, 0, present=False))


async def test_a_hold_grows_as_far_as_there_is_something(postgres: Postgres) -> None:
    await hold(postgres, "r1", 3)
    for status, granted in (("OK", 5 * CREDIT), ("OK", 2 * CREDIT), ("REFUSED", 0)):
        more = await books.extend_hold(postgres, ORG, "r1", 5 * CREDIT)
        assert (more.status, more.held_ucredits) == (status, granted)
    for request in ("r1", "r2"):
        await books.post(postgres, [Entry(ORG, "r1", "settle", -CREDIT)])
        assert (await books.extend_hold(postgres, ORG, request, 1)).status == "GONE"


async def test_a_hold_grows_beside_what_redis_may_owe(postgres: Postgres) -> None:
    await hold(postgres, "r1", 3)
    await raised(postgres, 3)
    more = await books.extend_hold(postgres, ORG, "r1", 5 * CREDIT)
    assert (more.held_ucredits, more.balance.set_aside_ucredits) == (CREDIT, 4 * CREDIT)
    more = await books.extend_hold(postgres, ORG, "r1", 5 * CREDIT, capped=False)
    assert (more.held_ucredits, more.balance.set_aside_ucredits) == (5 * CREDIT, 9 * CREDIT)


@pytest.mark.parametrize(("on_expiry", "charge"), [("checkpoint", 2 * CREDIT), ("hold", 4 * CREDIT), ("release", 0)])
async def test_a_hold_whose_lease_is_over_is_charged_as_configured(
    postgres: Postgres, on_expiry: str, charge: int
) -> None:
    await hold(postgres, "r1", 4)
    await hold(postgres, "r2", 4)
    assert await books.sweep_holds(postgres, on_expiry) == []
    await books.renew_holds(postgres, [(ORG, "r1", 2 * CREDIT), (ORG, "gone", 1)], 60_000)
    await books.renew_holds(postgres, [(ORG, "r1", CREDIT)], 60_000)  # late: it had used more already
    await overdue(postgres)
    await books.renew_holds(postgres, [(ORG, "r2", 9 * CREDIT)], 60_000)
    assert await books.sweep_holds(postgres, on_expiry) == [(ORG, "r1", charge)]
    assert await books.sweep_holds(postgres, on_expiry) == []
    after = await state(postgres)
    assert (after.ucredits, after.set_aside_ucredits) == (10 * CREDIT - charge, 4 * CREDIT)
    [after] = await books.post(postgres, [Entry(ORG, "r1", "settle", -3 * CREDIT), Entry(ORG, "r2", "settle", -CREDIT)])
    assert (after.ucredits, after.set_aside_ucredits) == (6 * CREDIT, 0)


async def test_sweeping_ends_so_many_at_once_and_the_rest_the_next_time(postgres: Postgres) -> None:
    await books.grant(postgres, ORG, 1_000, grant_id="more")
    for number in range(30):
        await hold(postgres, f"r{number}", 1)
    await overdue(postgres)
    rows = await postgres.rows("SELECT * FROM gateway.sweep_holds('checkpoint', 20)")
    assert len(rows) == 20 and len(await books.sweep_holds(postgres, "checkpoint")) == 10


# Announcements


def _note(heard: list[str], channel: str, payload: str) -> None:
    heard.append(f"{channel}: {payload}")


async def test_what_others_must_learn_is_announced_and_nothing_else(postgres: Postgres) -> None:
    heard: list[str] = []
    listening = asyncio.Event()
    channels = ("gateway_credits", "gateway_epochs", "end")
    postgres.listen({name: partial(_note, heard, name) for name in channels}, listening.set)
    await listening.wait()

    async def so_far() -> list[str]:
        await postgres.rows("SELECT pg_notify('end', '')")
        await until(lambda: "end: " in heard)
        said = [line for line in heard if line != "end: "]
        heard.clear()
        return said

    await books.beat(postgres, "i1")
    now = await raised(postgres, 2)
    await books.lower_cap(postgres, ORG, 1, "b1", now.version, 3 * CREDIT)
    await hold(postgres, "r1", 1)
    await books.extend_hold(postgres, ORG, "r1", 1)
    await books.post(postgres, [Entry(ORG, "r1", "settle", -CREDIT)])
    assert await so_far() == []
    await books.grant(postgres, ORG, 1, grant_id="g2")
    assert await so_far() == [f"gateway_credits: {ORG}"]
    await postgres.rows("UPDATE ai_credits SET credits = credits + 1")
    assert await so_far() == [f"gateway_credits: {ORG}"]
    await raised(postgres, 1, "b2")
    assert await so_far() == [f"gateway_epochs: {ORG} 2"]
    await books.acknowledge(postgres, "i1", ORG, 2, "", 0, GRACE_MS)
    assert await so_far() == [f"gateway_credits: {ORG}"]
    await raised(postgres, 1, "b3")
    await postgres.rows("UPDATE gateway.account SET lost_until = clock_timestamp() - interval '1 s'")
    await books.beat(postgres, "i1")
    assert await so_far() == [f"gateway_epochs: {ORG} 3", f"gateway_credits: {ORG}"]

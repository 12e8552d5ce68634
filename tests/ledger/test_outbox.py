"""Charges on their way to PostgreSQL: whatever dies and whenever, each arrives once."""

import asyncio
from collections.abc import Sequence

import asyncpg
import pytest

from gateway.errors import StoreLocked, StoreUnavailable
from gateway.ledger import Outbox, books
from gateway.ledger.outbox import OutboxEntry
from gateway.types import Balance, Entry
from tests.ledger.conftest import ORG, House
from tests.ledger.running import CREDIT, Request, gateway, pay, state
from tests.waiting import until


async def settles(house: House, org_id: str = ORG) -> list[str]:
    return sorted(request_id for request_id, kind, _ in await house.ledger(org_id) if kind == "settle")


class Died(Exception):
    """What the flusher does not catch."""


@pytest.mark.parametrize("dies", ["before the commit", "after the commit", "before Redis knows", "after Redis knows"])
async def test_a_flusher_that_dies_anywhere_repeats_with_one_effect(
    dies: str, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.credits(10)
    for number in range(3):
        assert await pay(house, f"r{number}") == "paid"
    post, apply = books.post, Outbox._apply

    async def dying_post(postgres: object, entries: Sequence[Entry]) -> list[Balance]:
        if dies == "before the commit":
            raise Died
        done = await post(postgres, entries)  # type: ignore[arg-type]
        if dies == "after the commit":
            raise Died
        return done

    async def dying_apply(*args: object) -> None:
        if dies == "after Redis knows":
            await apply(*args)  # type: ignore[arg-type]
        raise Died

    with monkeypatch.context() as patched:
        patched.setattr(books, "post", dying_post)
        if "Redis" in dies:
            patched.setattr(Outbox, "_apply", dying_apply)
        with pytest.raises(Died):
            await house.outbox.flush()
    await house.outbox.flush()
    assert await settles(house) == ["r0", "r1", "r2"]
    account = await house.account()
    assert (account["p"], account["u"], account["h"]) == (7 * CREDIT, 0, 0)
    assert (await state(house))["credits"] == 7
    assert house.money.settling.unconfirmed_count == 0


async def test_two_flushers_of_the_same_entries_post_them_once(redis_url: str, database_url: str) -> None:
    async with (
        gateway(redis_url, database_url, works=False) as one,
        gateway(redis_url, database_url, works=False) as other,
    ):
        await one.credits(50)
        for number in range(20):
            assert await pay(one, f"r{number}") == "paid"
        other.outbox.mark(ORG)
        await asyncio.gather(one.outbox.flush(), other.outbox.flush())
        assert len(await settles(one)) == 20
        account = await one.account()
        assert (account["p"], account["u"]) == (30 * CREDIT, 0)


async def test_a_full_batch_is_posted_at_once(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, flush="1m", sweep="1m", batch_max=5) as house:
        await house.credits(50)
        for number in range(4):
            assert await pay(house, f"r{number}") == "paid"
        assert await settles(house) == []
        assert await pay(house, "r4") == "paid"

        async def all_posted() -> bool:
            return len(await settles(house)) == 5

        await until(all_posted)


async def test_what_is_posted_is_told_before_redis_is(house: House) -> None:
    """A flusher that dies in between leaves nobody to think that the charge may be lost."""
    await house.credits(10)
    assert await pay(house, "r0") == "paid"
    assert house.money.settling.unconfirmed_count == 1
    run = house.redis.run
    seen: list[int] = []

    async def noting(script: object, *args: object) -> object:
        if getattr(script, "name", "") == "applied":
            seen.append(house.money.settling.unconfirmed_count)
        return await run(script, *args)  # type: ignore[arg-type]

    house.redis.run = noting  # type: ignore[method-assign, assignment]
    await house.outbox.flush()
    assert seen == [0]


async def test_entries_that_nobody_marked_are_found_by_the_sweeper(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.credits(10)
        assert await pay(house, "r0") == "paid"
        async with gateway(redis_url, database_url) as other:

            async def posted() -> bool:
                return await settles(other) == ["r0"]

            await until(posted)


async def test_a_process_that_ends_posts_what_redis_has_lost(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.credits(10)
        assert await pay(house, "r0") == "paid"
        await house.redis.call("FLUSHALL")
    async with gateway(redis_url, database_url, works=False) as house:
        assert await settles(house) == ["r0"]


async def test_one_org_that_cannot_be_told_does_not_hide_the_others(house: House) -> None:
    """Its key is of a foreign type: it alone waits, for a person."""
    for org_id in ("one", "two"):
        await house.credits(10, org_id, f"grant:{org_id}")
        assert await pay(house, f"{org_id}.r", org_id=org_id) == "paid"
    await house.redis.call("DEL", "{ai_credits:org_one}:a")
    await house.redis.call("SET", "{ai_credits:org_one}:a", "foreign")
    await house.outbox.flush()
    assert (await settles(house, "one"), await settles(house, "two")) == (["one.r"], ["two.r"])
    assert (await house.account("two"))["u"] == 0


async def test_nobody_is_refused_for_charges_that_count_twice_until_redis_knows_that_they_are_posted(
    house: House,
) -> None:
    """The balance lacks them already, and they still wait in the outbox: for a moment Redis sees too little."""
    await house.credits(30)
    for number in range(20):
        assert await pay(house, f"r{number}") == "paid"
    found, _ = await house.outbox._read([ORG], 500)
    await books.post(house.postgres, [item.entry for item in found])
    await house.accounts.refresh(ORG)
    account = await house.account()
    assert (account["p"], account["u"]) == (10 * CREDIT, 20 * CREDIT)
    together = [pay(house, f"s{number}") for number in range(10)]
    assert await asyncio.gather(*together) == ["paid"] * 10
    assert await pay(house, "one too many") == "insufficient_credits"
    assert (await state(house))["credits"] == 0


async def test_no_answer_is_ended_for_charges_that_count_twice(house: House) -> None:
    await house.credits(22)
    stream = Request(house, "stream")
    assert await stream.begin() and stream.hold is not None
    for number in range(20):
        assert await pay(house, f"r{number}") == "paid"
    found, _ = await house.outbox._read([ORG], 500)
    await books.post(house.postgres, [item.entry for item in found])
    await house.accounts.refresh(ORG)
    assert await house.admission.extend(stream.hold, CREDIT) == CREDIT
    assert await house.admission.extend(stream.hold, CREDIT) == 0
    await stream.end()


async def test_a_refusal_does_not_wait_for_postgresql(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is away nothing is posted, so nothing can count twice."""
    await house.credits(1)
    assert await pay(house, "r1") == "paid"

    async def away(*_: object) -> list[Balance]:
        raise StoreUnavailable(detail="away")

    with monkeypatch.context() as patched:
        patched.setattr(books, "post", away)
        assert await pay(house, "r2") == "insufficient_credits"
    await house.outbox.flush()
    assert await settles(house) == ["r1"]


async def test_a_flush_ends_while_others_go_on_settling(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    await house.credits(5)
    assert await pay(house, "r1") == "paid"
    post = Outbox._post

    async def post_while_another_settles(outbox: Outbox, batch: list[OutboxEntry]) -> object:
        house.outbox.mark(ORG)
        return await post(outbox, batch)

    monkeypatch.setattr(Outbox, "_post", post_while_another_settles)
    async with asyncio.timeout(10):
        assert await house.outbox.flush() == 1
    assert house.outbox.posted_count == 1
    assert await house.outbox.flush() == 0  # whoever settled meanwhile was looked after now


async def test_a_row_that_somebody_keeps_locked_keeps_back_its_own_org_alone(house: House, database_url: str) -> None:
    """And no statement of ours stays behind, in the way of everybody else."""
    orgs = [f"org{number}" for number in range(5)]
    for org in orgs:
        await house.credits(5, org, f"grant:{org}")
        assert await pay(house, f"r-{org}", org_id=org) == "paid"
    someone: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database_url)
    try:
        transaction = someone.transaction()
        await transaction.start()
        await someone.execute("UPDATE ai_credits SET credits = credits + 1 WHERE organization_id = 'org2'")
        assert await house.outbox.flush() == 4
        assert [await settles(house, org) for org in orgs] == [["r-org0"], ["r-org1"], [], ["r-org3"], ["r-org4"]]
        with pytest.raises(StoreLocked):
            await house.outbox.flush()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        assert await someone.fetchval(waiting) == 0
        await transaction.commit()
    finally:
        await someone.close()
    assert await house.outbox.flush() == 1
    assert await settles(house, "org2") == ["r-org2"]

"""Who waits for whom, two transactions at a time: what is under way elsewhere is waited for, and always in one order.

In each test another transaction has got somewhere first; the function under test is seen to wait for it.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias

import asyncpg
import pytest

from gateway.ledger import books
from gateway.ledger.migrate import Binding, migrate
from gateway.stores import Postgres
from gateway.types import Entry
from tests.ledger.audit import books_are_right
from tests.waiting import until

CREDIT = 1_000_000

Call: TypeAlias = Callable[[Postgres], Awaitable[object]]


@pytest.fixture
async def postgres(database_url: str) -> AsyncIterator[Postgres]:
    """Two orgs with ten credits each, and a hold of each that is overdue."""
    postgres = Postgres(database_url, timeout_ms=20_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    for org in ("a", "b"):
        await books.grant(postgres, org, 10, grant_id="g")
        await books.take_hold(postgres, org, "r1", CREDIT, CREDIT, 0, instance="i1", lease_ms=60_000)
    await postgres.rows("UPDATE gateway.hold SET deadline = deadline - interval '1 hour'")
    try:
        yield postgres
        await books_are_right(postgres)
    finally:
        await postgres.close()


@asynccontextmanager
async def another(url: str, *statements: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A transaction that has done this, and commits with the block."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement)
            yield connection
    finally:
        await connection.close()


async def waits(postgres: Postgres, call: Awaitable[object]) -> "asyncio.Task[object]":
    """The call is under way, and waits for a lock."""

    async def blocked() -> bool:
        rows = await postgres.rows(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return bool(rows)

    task: asyncio.Task[object] = asyncio.ensure_future(call)
    await until(lambda: task.done() or blocked())
    assert not task.done()
    return task


async def post_both(postgres: Postgres) -> object:
    return await books.post(postgres, [Entry("b", "r1", "settle", -1), Entry("a", "r1", "settle", -1)])


async def renew_both(postgres: Postgres) -> None:
    await books.renew_holds(postgres, [("b", "r1", 1), ("a", "r1", 1)], 60_000)


async def sweep(postgres: Postgres) -> object:
    return await books.sweep_holds(postgres, "checkpoint")


async def leave(postgres: Postgres) -> None:
    await books.leave(postgres, "i1")


CREDITS, ACCOUNT, HOLD = "ai_credits WHERE organization_id", "gateway.account WHERE org_id", "gateway.hold WHERE org_id"


@pytest.mark.parametrize(
    ("call", "first", "then"),
    [
        (post_both, f"{CREDITS} = 'a'", [f"{CREDITS} = 'b'", f"{ACCOUNT} = 'a'", f"{HOLD} = 'a'"]),
        (post_both, f"{ACCOUNT} = 'a'", [f"{ACCOUNT} = 'b'", f"{HOLD} = 'a'"]),
        (post_both, f"{HOLD} = 'a'", [f"{HOLD} = 'b'"]),
        (sweep, f"{CREDITS} = 'a'", [f"{CREDITS} = 'b'", f"{ACCOUNT} = 'a'", f"{HOLD} = 'a'"]),
        (sweep, f"{ACCOUNT} = 'a'", [f"{ACCOUNT} = 'b'", f"{HOLD} = 'a'"]),
        (sweep, f"{HOLD} = 'a'", [f"{HOLD} = 'b'"]),
        (renew_both, f"{HOLD} = 'a'", [f"{HOLD} = 'b'"]),
        (leave, f"{ACCOUNT} = 'a'", [f"{ACCOUNT} = 'b'"]),
    ],
)
async def test_locks_are_taken_in_one_order(
    postgres: Postgres, database_url: str, call: Call, first: str, then: list[str]
) -> None:
    """The application's rows, accounts, holds, each by org: whoever waits for one has none of those that come after."""
    await postgres.rows("UPDATE gateway.account SET waiting = '{i1}', lost = 1, lost_until = now() + interval '1 hour'")
    async with another(database_url, f"SELECT FROM {first} FOR UPDATE") as other:
        task = await waits(postgres, call(postgres))
        for row in then:
            await other.execute(f"SELECT FROM {row} FOR UPDATE NOWAIT")
    await task


async def test_a_cap_is_of_what_a_hold_under_way_leaves(postgres: Postgres, database_url: str) -> None:
    await books.raise_cap(postgres, "a", 1, "b1", CREDIT, 0, 1_000)
    async with another(database_url, "SELECT gateway.take_hold('a', 'r2', 7000000, 1, 0, 'i1', 1000, true)"):
        task = await waits(postgres, books.raise_cap(postgres, "a", 1, "b1", 9 * CREDIT, 0, 1_000))
    await task
    assert (await books.read(postgres, ["a"]))["a"].cap_ucredits == 2 * CREDIT


async def test_a_hold_is_of_what_a_cap_and_a_charge_under_way_leave(postgres: Postgres, database_url: str) -> None:
    charge = "SELECT gateway.post('{a}', '{x}', '{settle}', ARRAY[-3000000], ARRAY['{}'])"
    async with another(database_url, "SELECT gateway.raise_cap('a', 1, 'b1', 2000000, 0, 1000)", charge):
        task = await waits(
            postgres, books.take_hold(postgres, "a", "r2", 9 * CREDIT, 1, 0, instance="i", lease_ms=60_000)
        )
    taken = await task
    assert isinstance(taken, books.Taken) and taken.held_ucredits == 2 * CREDIT


async def test_a_hold_that_is_being_renewed_is_not_swept(postgres: Postgres, database_url: str) -> None:
    async with another(database_url, "SELECT gateway.renew_holds('{a}', '{r1}', '{5}', 60000)"):
        task = await waits(postgres, sweep(postgres))
    assert await task == [("b", "r1", 0)]


async def test_what_a_grant_under_way_has_noticed_is_not_noticed_again(postgres: Postgres, database_url: str) -> None:
    await migrate(postgres, Binding(mode="readonly"))
    await postgres.rows("DELETE FROM ai_credits WHERE organization_id = 'a'")
    async with another(database_url, "SELECT gateway.grant_credits('a', 'g2', 1000000, '{}')"):
        task = await waits(postgres, books.poll_external(postgres))
    assert await task == []


async def test_two_sweepers_end_a_hold_once(postgres: Postgres, database_url: str) -> None:
    async with another(database_url, "SELECT gateway.sweep_holds('checkpoint', 10)"):
        task = await waits(postgres, sweep(postgres))
    assert await task == []


async def test_one_request_asked_for_twice_at_once_holds_once(postgres: Postgres, database_url: str) -> None:
    async with another(database_url, "SELECT gateway.take_hold('a', 'r2', 1000000, 1, 0, 'i1', 1000, true)"):
        call = books.take_hold(postgres, "a", "r2", CREDIT, 1, 0, instance="i1", lease_ms=60_000)
        task = await waits(postgres, call)
    taken = await task
    assert isinstance(taken, books.Taken) and taken.status == "DUP"


async def test_binding_gives_up_while_a_transaction_holds_the_table(postgres: Postgres, database_url: str) -> None:
    """Those who come after it must not wait for long; the gateway tries again."""
    async with another(database_url, "UPDATE ai_credits SET credits = credits + 1"):
        await postgres.rows("ALTER FUNCTION gateway.bind(text, text, text, text) SET lock_timeout = '50ms'")
        with pytest.raises(Exception, match="lock timeout"):
            await migrate(postgres, Binding(mode="readonly"))
    await migrate(postgres, Binding(mode="managed"))

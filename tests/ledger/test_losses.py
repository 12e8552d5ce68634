"""Redis forgets. Nobody spends what it may have owed until every gateway has told what it knows; nobody pays twice."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.ledger import books
from gateway.stores import Postgres
from tests.chaos.stores import RedisServer
from tests.ledger.conftest import ORG, House
from tests.ledger.running import CREDIT, Request, gateway, is_whole, pay, state
from tests.waiting import until
from tests.walk.raw import Relay


async def pays(house: House, name: str, ucredits: int = CREDIT, org_id: str = ORG) -> None:
    """A request is admitted in the end, however often it is told to come again."""
    attempts = iter(range(10_000))

    async def once() -> bool:
        return await pay(house, f"{name}.{next(attempts)}", ucredits, org_id) == "paid"

    await until(once)


async def can_spend(credits: int, *houses: House) -> None:
    """Single credits can be paid by any house, so many in all and not one more."""
    paid = 0

    async def buyer(house: House, name: str) -> None:
        nonlocal paid
        extra = 0
        for number in range(10_000):
            is_enough = paid >= credits
            verdict = await pay(house, f"{name}.{number}")
            paid += verdict == "paid"
            extra += is_enough
            if extra == 3:
                return
            if verdict != "paid":
                await asyncio.sleep(0.01)  # the pace of the load

    await asyncio.gather(*(buyer(house, f"b{n}.{k}") for n, house in enumerate(houses) for k in range(20)))
    assert paid == credits


async def are_whole(house: House, orgs: list[str]) -> bool:
    return all([await is_whole(house, org_id) for org_id in orgs])


async def test_what_open_requests_hold_is_not_spent_again(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url) as one, gateway(redis_url, database_url) as other:
        await one.credits(20)
        open_requests = [Request(house, f"open{n}") for n, house in enumerate((one, one, other, other, other))]
        for request in open_requests:
            assert await request.begin()
        await one.redis.call("FLUSHALL")
        await can_spend(15, one, other)
        await until(lambda: is_whole(one))
        for request in open_requests:
            await request.end()
        for house in (one, other):
            await house.outbox.flush()
        now = await state(one)
        assert (now["credits"], now["micro"], now["held"]) == (0, 0, 0)
        assert (await one.account())["h"] == 0


async def test_charges_that_were_not_posted_are_not_lost(redis_url: str, database_url: str) -> None:
    async with (
        gateway(redis_url, database_url, flush="1m", sweep="1m") as one,
        gateway(redis_url, database_url, sweep="1m") as other,
    ):
        await one.credits(20)
        for number in range(7):
            assert await pay(one, f"r{number}") == "paid"
        await one.redis.call("FLUSHALL")
        await can_spend(13, other)
        await until(lambda: is_whole(one))
        await other.outbox.flush()
        assert (await state(one))["credits"] == 0
        assert len(await one.ledger()) == 21


async def test_a_loss_is_over_though_nobody_hears_of_it(redis_url: str, database_url: str) -> None:
    """The beats tell."""
    async with (
        gateway(redis_url, database_url, listens=False) as one,
        gateway(redis_url, database_url, listens=False) as other,
    ):
        await one.credits(20)
        request = Request(one, "open", 8 * CREDIT)
        assert await request.begin()
        await until(lambda: other.losses.instances_count == 2)
        await one.redis.call("FLUSHALL")
        await pays(other, "after")
        await until(lambda: is_whole(one))
        assert (await one.account())["h"] == 8 * CREDIT
        await request.end()


async def test_a_gateway_that_cannot_tell_is_waited_for_until_the_grace_is_over(
    redis_url: str, database_url: str
) -> None:
    async with gateway(redis_url, database_url, loss_grace="1s") as one:
        await one.credits(20)
        await pays(one, "before", 6 * CREDIT)
        await one.outbox.flush()
        await books.beat(one.postgres, "dead")
        cap = (await state(one))["cap"]
        await one.redis.call("FLUSHALL")
        await pays(one, "small")
        now = await state(one)
        assert (now["lost"], now["waiting"] >= 1) == (cap, True)
        assert await pay(one, "large", 8 * CREDIT) == "credits_in_flight"
        await until(lambda: is_whole(one))
        await pays(one, "later", 8 * CREDIT)


async def test_a_gateway_that_has_left_is_not_waited_for(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url) as one:
        await one.credits(20)
        async with gateway(redis_url, database_url) as other:
            await pays(other, "before")
            await until(lambda: one.losses.instances_count == 2 or one.losses.beat())
        rows = await one.postgres.rows("SELECT instance_id FROM gateway.instance")
        assert [row["instance_id"] for row in rows] in ([], [one.losses.instance])


async def test_postgresql_away_while_it_is_told_delays_the_end_and_loses_nothing(
    redis_url: str, database_url: str
) -> None:
    relay = Relay(database_url)
    await relay.open()
    try:
        async with gateway(redis_url, database_url) as one, gateway(redis_url, relay.url) as other:
            await one.credits(20)
            request = Request(other, "open", 8 * CREDIT)
            assert await request.begin()
            await until(lambda: one.losses.instances_count == 2)
            relay.freeze()
            await one.redis.call("FLUSHALL")
            await pays(one, "small")
            assert (await state(one))["lost"] > 0
            assert await pay(one, "large", 12 * CREDIT) == "credits_in_flight"
            relay.thaw()
            await until(lambda: is_whole(one))
            assert (await one.account())["h"] == 8 * CREDIT
            await request.end()
            assert await pay(one, "more", 12 * CREDIT) == "request_exceeds_balance"
    finally:
        await relay.close()


@pytest.mark.parametrize("kind", ["none", "aof"])
async def test_a_server_that_dies_and_comes_back(kind: str, tmp_path: Path, database_url: str) -> None:
    """Empty, or with what it had written a second ago."""
    server = RedisServer(tmp_path / "redis", kind, "secret")
    await server.start()
    try:
        async with gateway(server.url, database_url) as one, gateway(server.url, database_url) as other:
            await one.credits(30)
            open_requests = [Request(house, f"open{n}") for n, house in enumerate((one, other, other))]
            for request in open_requests:
                assert await request.begin()
            for number in range(7):
                assert await pay(one, f"r{number}") == "paid"
            await server.kill()
            await server.start()
            await until(lambda: one.redis.usable and other.redis.usable)
            await can_spend(20, one, other)
            await until(lambda: is_whole(one))
            for request in open_requests:
                await request.end()
            for house in (one, other):
                await house.outbox.flush()
            await until(lambda: one.money.settling.unconfirmed_count + other.money.settling.unconfirmed_count == 0)
            now = await state(one)
            assert (now["credits"], now["micro"], now["held"]) == (0, 0, 0)
            settles = [entry for entry in await one.ledger() if entry[1] == "settle"]
            assert len(settles) == 30
    finally:
        await server.kill()


async def test_one_line_tells_that_a_server_forgot_all_orgs(redis_url: str, database_url: str) -> None:
    orgs = [f"org{number}" for number in range(30)]
    async with AsyncExitStack() as stack:
        with capture_logs() as lines:
            one = await stack.enter_async_context(gateway(redis_url, database_url))
            for org_id in orgs:
                await one.credits(20, org_id, f"grant:{org_id}")
                await pays(one, "before", org_id=org_id)
            for _ in range(2):
                await one.redis.call("FLUSHALL")
                for org_id in orgs:
                    await pays(one, "after", org_id=org_id)
            await until(lambda: are_whole(one, orgs))
        assert one.losses.told_count >= 2 * len(orgs)
        assert len([line for line in lines if line["event"].startswith("redis has lost")]) == 1


async def given_a_cap_of_half(house: House) -> None:
    """What was half of the balance then: sixty of a hundred credits are spent and posted since."""
    await house.credits(100)
    for number in range(6):
        assert await pay(house, f"spent{number}", 10 * CREDIT) == "paid"
        await house.outbox.flush()
    assert (await state(house))["cap"] == (await house.account())["c"] == 50 * CREDIT


async def test_a_cap_follows_a_balance_that_falls_and_is_not_asked_for_again(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, works=False) as one:
        await given_a_cap_of_half(one)
        asked = one.accounts.raised_count
        await one.sweeper.sweep()
        lowered = await state(one)
        assert lowered["cap"] == (await one.account())["c"] == 20 * CREDIT
        for _ in range(3):
            await one.sweeper.sweep()
        assert await state(one) == lowered
        for number in range(3):
            assert await pay(one, f"more{number}") == "paid"
            await one.outbox.flush()
            await one.sweeper.sweep()
        assert (await state(one))["cap"] == 20 * CREDIT
        assert one.accounts.raised_count == asked


async def test_a_cap_that_is_lowered_leaves_what_is_owed(redis_url: str, database_url: str) -> None:
    """And as much again, as it was given."""
    async with gateway(redis_url, database_url, works=False, cap_percent=0, cap_floor=1) as one:
        await one.credits(100)
        small, large = Request(one, "small", 4 * CREDIT), Request(one, "large", 20 * CREDIT)
        assert await small.begin() and await large.begin()
        assert (await state(one))["cap"] == 48 * CREDIT
        await one.sweeper.sweep()
        assert (await state(one))["cap"] == 48 * CREDIT
        await large.end()
        await one.outbox.flush()
        await one.sweeper.sweep()
        assert (await state(one))["cap"] == (await one.account())["c"] == 8 * CREDIT
        await small.end()


async def test_an_org_goes_on_though_postgresql_goes_away_while_its_cap_is_lowered(
    redis_url: str, database_url: str
) -> None:
    async with gateway(redis_url, database_url, works=False) as one:
        await given_a_cap_of_half(one)
        postgres = one.accounts._postgres
        one.accounts._postgres = Postgres("postgresql://127.0.0.1:1/none", timeout_ms=500, pool_max=1)
        await one.sweeper.sweep()
        assert (await one.account())["c"] == 20 * CREDIT
        assert await pay(one, "next", 20 * CREDIT) == "paid"
        one.accounts._postgres = postgres


async def test_without_the_cap_a_loss_only_builds_the_account_again(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, on_state_loss="optimistic") as one:
        await one.credits(20)
        await pays(one, "before")
        await one.outbox.flush()
        await one.redis.call("FLUSHALL")
        assert await pay(one, "after") == "paid"
        now = await state(one)
        assert (now["cap"], now["lost"], now["epoch"], one.accounts.raised_count) == (0, 0, 1, 0)

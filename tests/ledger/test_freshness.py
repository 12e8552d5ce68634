"""What others change in PostgreSQL is seen, announced or not; an account is loaded and given its cap once for all."""

import asyncio
import time

import pytest

from gateway import keys
from gateway.errors import UnknownBalance
from gateway.ledger import Binding, books, migrate
from gateway.types import Entry
from tests.ledger.conftest import ORG, House
from tests.ledger.running import CREDIT, Request, gateway, pay, state
from tests.waiting import until
from tests.walk.raw import Relay


async def sql(house: House, statement: str) -> None:
    await house.postgres.rows(statement)


async def known(house: House) -> int:
    return (await house.account()).get("p", -1)


async def test_a_top_up_by_hand_is_seen_at_once(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url) as house:
        await house.credits(1)
        assert await pay(house, "r1") == "paid"
        await sql(house, "UPDATE ai_credits SET credits = credits + 5")
        await until(lambda: pay_is(house, "paid"))


async def pay_is(house: House, verdict: str) -> bool:
    return await pay(house, f"p{time.monotonic_ns()}") == verdict


async def test_a_top_up_that_nobody_announces_is_found_by_looking(house: House) -> None:
    await house.credits(1)
    assert await pay(house, "r1") == "paid"
    await house.outbox.flush()
    await sql(house, "UPDATE ai_credits SET credits = credits + 5")
    assert await known(house) == 0
    await house.freshness.look()
    await until(lambda: known_is(house, 5 * CREDIT))


async def known_is(house: House, ucredits: int) -> bool:
    return await known(house) == ucredits


async def test_one_of_the_gateways_looks(redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read = books.read

    async def counted(*args: object) -> object:
        nonlocal reads
        reads += 1
        return await read(*args)  # type: ignore[arg-type]

    async with (
        gateway(redis_url, database_url, works=False, listens=False) as one,
        gateway(redis_url, database_url, works=False, listens=False) as other,
    ):
        await one.credits(1)
        assert await pay(one, "r1") == "paid"
        monkeypatch.setattr(books, "read", counted)
        await one.freshness.look()
        await other.freshness.look()
        await until(lambda: reads == 1)


async def test_without_a_trigger_changes_are_found_by_comparing(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url) as owner:
        await owner.credits(1)
    async with gateway(redis_url, database_url, schema="readonly") as house:
        await migrate(house.postgres, Binding(mode="readonly"))
        assert await pay(house, "r1") == "paid"
        await sql(house, "UPDATE ai_credits SET credits = credits + 5")
        await until(lambda: pay_is(house, "paid"))
        assert ("external", 5 * CREDIT) in [(kind, amount) for _, kind, amount in await house.ledger()]


async def test_a_rush_of_an_unknown_org_loads_it_once_and_raises_its_cap_a_few_times(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.credits(1000)
    loads = 0
    load = house.accounts.periods.load

    async def counted(*args: object) -> object:
        nonlocal loads
        loads += 1
        return await load(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(house.accounts.periods, "load", counted)
    requests = [Request(house, f"r{number}", 3 * CREDIT) for number in range(200)]
    assert all(await asyncio.gather(*(request.begin() for request in requests)))
    assert loads == 1
    assert house.accounts.raised_count <= 10
    assert (await state(house))["cap"] >= 600 * CREDIT
    await asyncio.gather(*(request.end() for request in requests))


async def test_who_cannot_be_given_more_does_not_ask_again_and_again(house: House) -> None:
    await house.credits(5)
    request = Request(house, "open", 4 * CREDIT)
    assert await request.begin()
    before = house.accounts.raised_count
    for number in range(50):
        assert await pay(house, f"r{number}", 2 * CREDIT) == "credits_in_flight"
    # Whatever the machine's speed: once each tenth of a second at most.
    assert house.accounts.raised_count - before <= 50
    await request.end()


async def test_a_cap_that_was_lowered_in_redis_alone_is_given_again(house: House) -> None:
    """A gateway that died between the two steps."""
    await house.credits(20)
    assert await pay(house, "r1", 8 * CREDIT) == "paid"
    await house.outbox.flush()
    await house.accounts._lowered(ORG)
    assert (await house.account())["c"] == 0
    assert await pay(house, "r2", 8 * CREDIT) == "paid"


async def test_a_cap_is_not_lowered_under_what_was_admitted_meanwhile(house: House) -> None:
    await house.credits(20)
    assert await pay(house, "r1") == "paid"
    await house.outbox.flush()
    version, epoch, cap, birth = await house.accounts._lowered(ORG)
    request = Request(house, "r2", 8 * CREDIT)
    assert await request.begin()
    assert await books.lower_cap(house.postgres, ORG, epoch, birth, version, cap) is None
    assert (await state(house))["cap"] >= 8 * CREDIT
    await request.end()


async def test_an_idle_org_leaves_redis_nothing_to_owe(house: House) -> None:
    await house.credits(20)
    assert await pay(house, "r1") == "paid"
    await house.outbox.flush()
    assert (await state(house))["cap"] > 0
    await house.sweeper.sweep()
    assert (await state(house))["cap"] > 0
    await house.redis.call("ZADD", keys.ACTIVE_ORGS, 1, ORG)
    await house.sweeper.sweep()
    assert ((await state(house))["cap"], (await house.account())["c"]) == (0, 0)
    assert await house.redis.call("ZCARD", keys.ACTIVE_ORGS) == 0
    await house.redis.call("FLUSHALL")
    assert await pay(house, "r2") == "paid"
    assert (await state(house))["lost"] == 0


async def test_an_org_that_a_top_up_alone_brought_back_after_a_loss_is_active(house: House) -> None:
    """Who had marked it does not again for a while: its holds would not be swept, its next top-up not be found."""
    await house.credits(20)
    assert await pay(house, "r1") == "paid"
    await house.redis.call("FLUSHALL")
    await house.accounts.refresh(ORG)
    assert await house.redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1) == [ORG.encode()]


async def test_an_org_that_is_used_again_while_it_is_retired_stays(house: House) -> None:
    await house.credits(20)
    assert await pay(house, "r1") == "paid"
    await house.outbox.flush()
    request = Request(house, "r2")
    assert await request.begin()
    assert await house.accounts.retire(ORG)
    assert ((await state(house))["cap"], (await house.account())["c"]) == (CREDIT, CREDIT)
    assert await pay(house, "r3") == "paid"
    await request.end()


async def test_a_hold_of_a_dead_gateway_is_not_given_up_before_its_charge_is_known(
    redis_url: str, database_url: str
) -> None:
    """It had reached PostgreSQL alone, the gateway died before Redis was told."""
    async with gateway(redis_url, database_url, works=False, listens=False, lease="1s", heartbeat="500ms") as house:
        await house.credits(3)
        request = Request(house, "r0", 2 * CREDIT)
        assert await request.begin()
        await books.post(house.postgres, [Entry(ORG, "r0", "settle", -2 * CREDIT)])

        async def swept() -> bool:
            return await house.sweeper.sweep() == 1

        await until(swept)
        # The sweeper's own charge waits in the outbox, to be found a repetition: so much less is there until then.
        assert await pay(house, "r1", 2 * CREDIT) in ("request_exceeds_balance", "insufficient_credits")
        await house.outbox.flush()
        assert (await house.account())["p"] == CREDIT
        house.admission._open.clear()


async def test_known_orgs_go_on_without_postgresql_up_to_their_cap(redis_url: str, database_url: str) -> None:
    relay = Relay(database_url)
    await relay.open()
    try:
        async with gateway(redis_url, relay.url, works=False, listens=False, cap_percent=0) as house:
            await house.credits(100)
            assert await pay(house, "r0") == "paid"
            await relay.close()
            verdicts = [await pay(house, f"r{number}") for number in range(1, 15)]
            assert verdicts == ["paid"] * 9 + ["credits_unavailable"] * 5
            with pytest.raises(UnknownBalance):
                await house.accounts.load("globex", "trial")
            await relay.open()
            await house.outbox.flush()
            assert await pay(house, "r99") == "paid"
    finally:
        await relay.close()

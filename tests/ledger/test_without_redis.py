"""Redis away: holds and charges in PostgreSQL beside what Redis may owe, and of one mind again when it is back.

what may be held in PostgreSQL = balance - cap of Redis - what Redis may have lost - what is held there already
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import cast

import httpx
import pytest
import redis.asyncio as redis_client

from gateway import keys
from gateway.admission import Hold
from gateway.errors import StoreUnavailable, UnknownBalance
from gateway.ledger import migrate
from gateway.stores import Postgres
from gateway.types import Price, Quote, Refusal
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyRedis
from tests.ledger.running import CREDIT, Request, paid, pay, state
from tests.limits.given import demand
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House as WholeHouse
from tests.walk.house import Running, chat_body, in_process
from tests.walk.raw import Relay

FREE = Quote.flat(0)
RPH = demand("rph", "sliding", "requests", "org", ORG, 5, 3_600_000, 1)
SLOT = demand("parallel", "concurrent", "concurrent", "org", ORG, 3, 30_000, 1)


@asynccontextmanager
async def fleet(redis_url: str, database_url: str, count: int, **credits: object) -> AsyncIterator[list[House]]:
    """Gateways at work, whose Redis is away when a test says so. At the end of the block it is back, and everything
    must agree."""
    async with AsyncExitStack() as stack:
        houses = []
        for _ in range(count):
            redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
            redis.arm(0, "")
            postgres = Postgres(database_url, timeout_ms=2_000, pool_max=6)
            house = await stack.enter_async_context(furnished(redis, postgres, **credits))
            await house.losses.beat()
            houses.append(house)
        tasks = [asyncio.create_task(work()) for house in houses for _, work in house.money.work]
        try:
            yield houses
            is_away(False, *houses)
            await until(lambda: agrees(houses))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def is_away(away: bool, *houses: House) -> None:
    for house in houses:
        cast(FaultyRedis, house.redis).away = away


async def agrees(houses: list[House]) -> bool:
    """Nothing is held or owed anywhere, and Redis shows the balance that the ledger adds up to."""
    if not all(house.settling.idle and not house.settling.unconfirmed_count for house in houses):
        return False
    one = houses[0]
    now, account = await state(one), await one.account()
    if now["held"] or now["lost"] or now["waiting"] or account.get("h", 0) or account.get("u", 0):
        return False
    await books_are_right(one.postgres)
    if await one.redis.call("EXISTS", keys.outbox(ORG), keys.holds(ORG), keys.deadlines(ORG)):
        return False
    return not account or account["p"] == now["credits"] * CREDIT + now["micro"]


async def charges(house: House) -> dict[str, int]:
    """By request: what it was charged, in credits, each once."""
    entries = [(rid, -amount // CREDIT) for rid, kind, amount in await house.ledger() if kind in ("settle", "orphan")]
    assert len(dict(entries)) == len(entries)
    return {rid: credits for rid, credits in entries if credits}


async def rest_can_be_spent(house: House, credits: int) -> None:
    """So many credits are left, and not one more."""
    names = iter(range(1_000))
    count = 0

    async def one_more() -> bool:
        nonlocal count
        count += await pay(house, f"rest{next(names)}") == "paid"
        return count >= credits

    await until(one_more)
    assert await pay(house, "too much") in ("insufficient_credits", "request_exceeds_balance")


# Never more than there is


async def test_gateways_without_redis_admit_exactly_what_there_is(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, 2) as houses:
        await houses[0].credits(20)
        is_away(True, *houses)
        verdicts = await asyncio.gather(*(pay(houses[number % 2], f"r{number}") for number in range(200)))
        assert verdicts.count("paid") == 20
        assert set(verdicts) <= {"paid", "insufficient_credits", "credits_in_flight"}
        assert len(await charges(houses[0])) == 20
        assert (await state(houses[0]))["credits"] == 0


async def test_one_that_sees_redis_and_one_that_does_not_spend_one_balance(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, 2, cap_floor=4, cap_percent=0) as houses:
        here, apart = houses
        await here.credits(30)
        assert await pay(here, "first") == "paid"
        is_away(True, apart)
        verdicts = await asyncio.gather(*(pay(houses[number % 2], f"r{number}") for number in range(200)))
        there = [verdict for number, verdict in enumerate(verdicts) if number % 2]
        assert 0 < there.count("paid") and verdicts.count("paid") <= 29
        is_away(False, apart)
        await until(lambda: agrees(houses))
        await rest_can_be_spent(apart, 29 - verdicts.count("paid"))
        await until(lambda: agrees(houses))
        assert sum((await charges(here)).values()) == 30


async def test_what_redis_may_owe_is_left_to_it_though_nobody_can_ask_it(redis_url: str, database_url: str) -> None:
    """Two holds, and room for more: its cap is all of that."""
    async with fleet(redis_url, database_url, 2, cap_floor=8, cap_percent=0) as houses:
        await houses[0].credits(20)
        held = [Request(house, f"held{number}", 2 * CREDIT) for number, house in enumerate(houses)]
        assert [await request.begin() for request in held] == [True, True]
        assert (await state(houses[0]))["cap"] == 8 * CREDIT
        is_away(True, *houses)
        verdicts = [await pay(houses[number % 2], f"r{number}", 4 * CREDIT) for number in range(5)]
        assert verdicts == ["paid"] * 3 + ["credits_in_flight"] * 2
        for request in held:
            await request.end()
        # Their charges were Redis's to owe, and are in PostgreSQL now. The cap stays until Redis can be told.
        await until(lambda: all(held_charges(house) for house in houses))
        assert await pay(houses[0], "r9") == "credits_in_flight"


async def test_what_was_spent_is_not_kept_for_a_redis_that_is_away(redis_url: str, database_url: str) -> None:
    """Its cap was half of a hundred; of the forty that are left it is half soon."""
    async with fleet(redis_url, database_url, 1) as (house,):
        await house.credits(100)
        for number in range(6):
            assert await pay(house, f"spent{number}", 10 * CREDIT) == "paid"
            await house.outbox.flush()
        await until(lambda: cap_is(house, 20))
        is_away(True, house)
        assert [await pay(house, f"r{number}", 10 * CREDIT) for number in range(3)] == ["paid"] * 2 + [
            "credits_in_flight"
        ]


async def cap_is(house: House, credits: int) -> bool:
    return (await state(house))["cap"] == credits * CREDIT


def held_charges(house: House) -> set[str]:
    """Requests that began in Redis and whose charges went past it."""
    return {hold.hold_id for hold in house.settling._backlog.values() if hold.posted is not None}


async def test_redis_that_has_forgotten_everything_when_it_is_back_owes_what_it_owed(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, 2, cap_floor=8, cap_percent=0) as houses:
        one, other = houses
        await one.credits(20)
        runs, ends = Request(one, "runs", 3 * CREDIT), Request(other, "ends", 2 * CREDIT)
        assert await runs.begin() and await ends.begin()
        is_away(True, *houses)
        await ends.end()
        assert await pay(one, "there", 4 * CREDIT) == "paid"
        server = redis_client.Redis.from_url(redis_url)
        await server.flushall()
        await server.aclose()
        is_away(False, *houses)
        names = iter(range(1_000))

        async def admitted() -> bool:
            return await pay(other, f"back{next(names)}") == "paid"

        await until(admitted)
        await until(lambda: (one.losses.waiting_count, other.losses.waiting_count) == (0, 0))
        await until(lambda: held_is(one, 3))
        await runs.end()
        await until(lambda: agrees(houses))
        await rest_can_be_spent(one, 10)
        await until(lambda: agrees(houses))
        assert sum((await charges(one)).values()) == 20


async def held_is(house: House, credits: int) -> bool:
    return (await house.account()).get("h") == credits * CREDIT


@pytest.mark.parametrize("seed", range(3))
async def test_whoever_sees_redis_and_whenever_nobody_overspends(redis_url: str, database_url: str, seed: int) -> None:
    """Each gateway loses and finds it at random, in the middle of requests."""
    dice = random.Random(seed)
    async with fleet(redis_url, database_url, 3, cap_floor=2, cap_percent=0) as houses:
        await houses[0].credits(40)
        names = iter(range(100_000))
        over = asyncio.Event()
        owed: dict[str, int] = {}

        async def client(house: House) -> None:
            while not over.is_set():
                name, credits = f"r{next(names)}", dice.choice((1, 1, 2))
                request = Request(house, name, credits * CREDIT)
                try:
                    admitted = await request.begin()
                except StoreUnavailable:
                    continue
                if admitted:
                    await asyncio.sleep(dice.random() * 0.01)
                    owed[name] = credits
                    await request.end()
                else:
                    await asyncio.sleep(0.002)  # the pace of the load

        clients = [asyncio.create_task(client(house)) for house in houses for _ in range(4)]
        for _ in range(25):
            is_away(dice.random() < 0.5, dice.choice(houses))
            await asyncio.sleep(0.01)  # the pace of the changes
            await books_are_right(houses[0].postgres)
        is_away(False, *houses)
        over.set()
        await asyncio.gather(*clients)
        await until(lambda: agrees(houses))
        assert await charges(houses[0]) == owed
        assert 0 < sum(owed.values()) <= 40
        await rest_can_be_spent(houses[0], 40 - sum(owed.values()))


# What began in one of them


async def test_what_began_in_redis_is_charged_past_it_and_ends_there_later(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, 1) as (house,):
        await house.credits(5)
        async with house.admission.hold("r1", ASKER, (SLOT,), Quote.flat(2 * CREDIT)) as hold:
            assert isinstance(hold, Hold) and (hold.where, hold.judged_by) == ("redis", "redis")
            is_away(True, house)
            hold.charge = paid(2 * CREDIT)
        await until(lambda: house.settling.backlog_count and held_charges(house))
        assert await charges(house) == {"r1": 2}
        assert (await state(house))["credits"] == 3
        is_away(False, house)
        await until(lambda: agrees([house]))
        async with house.admission.hold("r2", ASKER, (SLOT,), FREE) as hold:
            assert isinstance(hold, Hold) and hold.states[0].used == 0


async def test_what_began_in_postgres_ends_there_though_redis_is_back(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, 1) as (house,):
        await house.credits(5)
        is_away(True, house)
        async with house.admission.hold("r1", ASKER, (RPH,), Quote.flat(2 * CREDIT)) as hold:
            assert isinstance(hold, Hold) and (hold.where, hold.judged_by) == ("postgres", "local")
            is_away(False, house)
            # What is held there Redis may not spend.
            assert await pay(house, "more", 4 * CREDIT) == "credits_in_flight"
            assert await pay(house, "enough", 3 * CREDIT) == "paid"
            hold.charge = paid(2 * CREDIT)
        await until(lambda: agrees([house]))
        assert await charges(house) == {"r1": 2, "enough": 3}


async def test_a_hold_grows_where_it_is(redis_url: str, database_url: str) -> None:
    """One in Redis cannot while it is away; one in PostgreSQL can, also when Redis is back."""
    grows = Quote(Price(0, CREDIT, CREDIT), CREDIT, CREDIT, CREDIT, CREDIT)
    async with fleet(redis_url, database_url, 1, cap_floor=1, cap_percent=0) as (house,):
        await house.credits(6)
        async with house.admission.hold("in redis", ASKER, (), grows) as there:
            assert isinstance(there, Hold)
            is_away(True, house)
            assert await house.admission.extend(there, CREDIT) == 0
            async with house.admission.hold("in postgres", ASKER, (), grows) as here:
                assert isinstance(here, Hold) and here.where == "postgres"
                assert await house.admission.extend(here, 2 * CREDIT) == 2 * CREDIT
                is_away(False, house)
                assert await house.admission.extend(here, CREDIT) == CREDIT
                assert await house.admission.extend(there, 9 * CREDIT) == CREDIT
                assert await house.admission.extend(here, CREDIT) == 0
                here.charge = paid(here.ucredits)
            there.charge = paid(there.ucredits)
        await until(lambda: agrees([house]))
        assert await charges(house) == {"in redis": 2, "in postgres": 4}


# Who wants nothing to stand in


async def test_where_no_hold_may_stand_in_only_what_costs_nothing_is_admitted(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, 1, without_redis="refuse") as (house,):
        await house.credits(5)
        is_away(True, house)
        with pytest.raises(StoreUnavailable) as refused:
            await pay_or_raise(house, "r1")
        assert (refused.value.status, refused.value.code) == (503, "store_unavailable")
        async with house.admission.hold("free", ASKER, (RPH,), FREE) as hold:
            assert isinstance(hold, Hold) and hold.judged_by == "local"
        assert (await state(house))["held"] == 0
        assert house.settling.backlog_count == 0


async def test_where_no_count_may_stand_in_only_what_meets_no_limit_is_admitted(
    redis_url: str, database_url: str
) -> None:
    async with fleet(redis_url, database_url, 1) as (house,):
        house.obey(counts_locally=False)
        await house.credits(5)
        is_away(True, house)
        with pytest.raises(StoreUnavailable):
            async with house.admission.hold("r1", ASKER, (RPH,), Quote.flat(CREDIT)):
                pass
        assert await pay(house, "r2") == "paid"
        assert await charges(house) == {"r2": 1}


async def test_a_refusal_by_credits_gives_the_local_limit_back(redis_url: str, database_url: str) -> None:
    async with fleet(redis_url, database_url, 1) as (house,):
        await house.credits(1)
        is_away(True, house)
        for number in range(10):
            async with house.admission.hold(f"r{number}", ASKER, (RPH,), Quote.flat(2 * CREDIT)) as verdict:
                assert isinstance(verdict, Refusal) and verdict.code == "request_exceeds_balance"
        async with house.admission.hold("last", ASKER, (RPH,), Quote.flat(CREDIT)) as hold:
            assert isinstance(hold, Hold) and hold.states[0].used == 0


async def pay_or_raise(house: House, hold_id: str) -> None:
    async with house.admission.hold(hold_id, ASKER, (), Quote.flat(CREDIT)) as hold:
        assert isinstance(hold, Hold)
        hold.charge = paid(CREDIT)


# As its clients see it


@pytest.fixture
async def whole(tmp_path: Path, redis_url: str, database_url: str, demo_router_url: str) -> AsyncIterator[WholeHouse]:
    postgres = Postgres(database_url, timeout_ms=10_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    redis = redis_client.Redis.from_url(redis_url)
    house = WholeHouse(tmp_path, redis_url, database_url, postgres, redis, upstream_url=demo_router_url)
    house.secret = await house.add_key(house.org_id, "ann")
    yield house
    await redis.aclose()
    await postgres.close()


@asynccontextmanager
async def served(
    house: WholeHouse, **relayed: str
) -> AsyncIterator[tuple[Running, httpx.AsyncClient, dict[str, Relay]]]:
    """A gateway, a client of it, and what stands between the gateway and each of these stores."""
    async with AsyncExitStack() as stack:
        relays = {name: await stack.enter_async_context(raw.relay(url)) for name, url in relayed.items()}
        house.settings.update({name: relay.url for name, relay in relays.items()})
        gateway = await stack.enter_async_context(in_process(house))
        yield gateway, await stack.enter_async_context(house.client(gateway.address)), relays


async def chat(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=chat_body())


@pytest.mark.parametrize("fields", ["on", "off"])
async def test_answers_and_refusals_say_that_this_gateway_counted_alone(whole: WholeHouse, fields: str) -> None:
    whole.limits = [{"name": "rph", "count": "requests", "limit": 5, "window": "1h", "per": "org"}]
    whole.settings["limit_rules"] = f"{{ headers: {fields} }}"
    await whole.credits(50)
    async with served(whole, redis=whole.redis_url) as (_, client, relays):
        assert "x-gateway-limits" not in (await chat(client)).headers
        await relays["redis"].close()
        await until(lambda: is_away_for(client))
        answers = [await chat(client) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 3  # of four one was asked for above
        assert {answer.headers["x-gateway-limits"] for answer in answers} == {"local"}
        assert [("ratelimit" in answer.headers) for answer in answers] == [fields == "on"] * 6
        assert {answer.headers.get("retry-after") is None for answer in answers[3:]} == {False}
        await relays["redis"].open()

        async def judged_there() -> bool:
            answer = await chat(client)
            return bool(answer.is_success) and "x-gateway-limits" not in answer.headers

        await until(judged_there)
        await whole.settled()


async def is_away_for(client: httpx.AsyncClient) -> bool:
    """The gateway has noticed, and counts by itself."""
    answer = await chat(client)
    return bool(answer.headers.get("x-gateway-limits") == "local")


async def test_where_nothing_may_stand_in_clients_are_told_to_come_back(whole: WholeHouse) -> None:
    whole.settings["credits"] = ", without_redis: refuse"
    await whole.credits(5)
    async with served(whole, redis=whole.redis_url) as (_, client, relays):
        assert (await chat(client)).status_code == 200
        await relays["redis"].close()
        refused = await chat(client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["x-should-retry"] == "true" and int(refused.headers["retry-after"]) in (1, 2)
        await relays["redis"].open()

        async def served_again() -> bool:
            return (await chat(client)).status_code == 200

        await until(served_again)
        await whole.settled()


@pytest.mark.parametrize("bound", ["outbox_entries_max", "unconfirmed_entries_max"])
async def test_with_too_much_owed_to_postgres_nothing_more_is_sold_until_it_has_taken_it(
    whole: WholeHouse, bound: str
) -> None:
    whole.settings["credits"] = f", {bound}: 3"
    await whole.credits(50)
    async with served(whole, postgres=whole.database_url) as (gateway, client, relays):
        assert (await chat(client)).status_code == 200
        await whole.settled()
        await relays["postgres"].close()
        answers = []
        for _ in range(6):
            answers.append(await chat(client))
            # What still runs is not owed yet.
            await until(lambda: gateway.gateway.admission.open_count == 0 and gateway.gateway.settling.idle)
        assert [answer.status_code for answer in answers] == [200] * 3 + [503] * 3
        assert {answer.json()["error"]["code"] for answer in answers[3:]} == {"credits_unavailable"}
        assert len(await whole.charges()) == 1
        await relays["postgres"].open()

        async def sold_again() -> bool:
            return (await chat(client)).status_code == 200

        await until(sold_again)
        await whole.settled()
    assert await whole.charges() == [("settle", CREDIT)] * 5


async def test_without_either_store_clients_are_told_that_nobody_knows_their_credits(whole: WholeHouse) -> None:
    await whole.credits(5)
    async with served(whole, redis=whole.redis_url, postgres=whole.database_url) as (_, client, relays):
        assert (await chat(client)).status_code == 200
        await whole.settled()
        for relay in relays.values():
            await relay.close()
        refused = await chat(client)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "credits_unavailable"
        for relay in relays.values():
            await relay.open()

        async def served_again() -> bool:
            return (await chat(client)).status_code == 200

        await until(served_again)
        await whole.settled()
    assert UnknownBalance.code == "credits_unavailable"

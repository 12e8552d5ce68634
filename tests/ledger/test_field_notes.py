"""What went wrong with budgets and credits in gateways like this one, as it was reported to them: each symptom once.

Named after the symptom; the comment above each names the public threads. What is tested here in one line is tested in
depth elsewhere, and a row that has both keeps both: these say what must never come back.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from gateway import charge, keys
from gateway.admission import Hold
from gateway.config import Credits, Settings, load_text
from gateway.errors import ConfigError, StoreUnavailable
from gateway.ledger import books
from gateway.ledger.outbox import OutboxEntry
from gateway.meter import Meter
from gateway.policy import Asking, CompiledPolicy, PolicySet, demands, message_demands, quote
from gateway.stores import Postgres
from gateway.telemetry import Record
from gateway.types import (
    Balance,
    Charge,
    Demand,
    Entry,
    Facts,
    Limit,
    Outcome,
    Peek,
    Price,
    Principal,
    Quote,
    Refusal,
    Usage,
)
from gateway.usage import READERS
from tests.ledger import planned
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis
from tests.ledger.running import CREDIT, Request, gateway, paid, pay, state
from tests.waiting import until

PRICE = Quote.flat(CREDIT)
#: A credit is a thousand tokens of output.
BY_TOKEN = Quote(Price(0, 0, 1_000 * CREDIT), CREDIT, 1, CREDIT)
TOKEN = CREDIT // 1_000


@pytest.fixture
async def fleet(redis_url: str, database_url: str) -> AsyncIterator[list[House]]:
    """Gateways at work, each with connections of its own."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(gateway(redis_url, database_url)) for _ in range(4)]


async def all_that_can_be_sold(houses: Sequence[House]) -> int:
    """In credits: with many requests at once, spread over the fleet, until there is nothing left."""
    sold, numbers = 0, itertools.count()

    async def storm() -> bool:
        nonlocal sold
        verdicts = await asyncio.gather(*(pay(houses[n % len(houses)], f"storm{next(numbers)}") for n in range(60)))
        sold += verdicts.count("paid")
        # Just after a loss a charge may be in the balance and wait in Redis as well: less seems to be left than is.
        return set(verdicts) == {"insufficient_credits"} and await has(houses[0], 0)

    await until(storm)
    return sold


async def has(house: House, ucredits: int) -> bool:
    return await balance(house) == ucredits


async def settles(house: House) -> list[tuple[str, int]]:
    """Request and micro-credits of every charge."""
    return sorted((rid, -amount) for rid, kind, amount in await house.ledger() if kind in ("settle", "orphan"))


async def balance(house: House, org_id: str = ORG) -> int:
    """In PostgreSQL, in micro-credits."""
    now = await state(house, org_id)
    return now["credits"] * CREDIT + now["micro"]


async def ended(house: House, hold_id: str, ended_as: Charge, asked: Quote = PRICE) -> None:
    async with house.admission.hold(hold_id, ASKER, (), asked) as hold:
        assert isinstance(hold, Hold)
        hold.charge = ended_as
    await house.outbox.flush()


# What was spent


# litellm #30661
async def test_what_a_gateway_has_sold_is_not_forgotten_with_its_process(redis_url: str, database_url: str) -> None:
    for number in range(3):
        async with gateway(redis_url, database_url, works=False) as house:
            if not number:
                await house.credits(5)
            verdicts = [await pay(house, f"life{number}.{n}") for n in range(2)]
            assert verdicts == (["paid"] * 2 if number < 2 else ["paid", "insufficient_credits"])


# litellm #28247, #30460
async def test_counters_of_an_expired_account_are_never_added_up_by_many_gateways(fleet: list[House]) -> None:
    one = fleet[0]
    await one.credits(40)
    for round_ in range(3):
        assert await pay(one, f"before{round_}") == "paid"
        await one.outbox.flush()
        await one.redis.call("DEL", keys.account(ORG))
        await asyncio.gather(*(house.accounts.load(ORG, "pro") for house in fleet for _ in range(3)))
        account = await one.account()
        assert (account["p"], account["u"], account["h"]) == (await balance(one), 0, 0)
    assert await all_that_can_be_sold(fleet) == 37


# litellm #33325, #34238
async def test_no_gateway_admits_by_what_it_remembers_of_a_balance(redis_url: str, database_url: str) -> None:
    """Nobody announces anything here, and nothing runs in the background."""
    async with AsyncExitStack() as stack:
        one, other = [
            await stack.enter_async_context(gateway(redis_url, database_url, listens=False, works=False))
            for _ in range(2)
        ]
        await one.credits(3)
        assert await pay(one, "r1") == "paid"
        assert [await pay(other, f"r{number}") for number in (2, 3)] == ["paid"] * 2
        assert await pay(one, "r4") == "insufficient_credits"


# new-api #6609, one-api #2440
async def test_many_at_once_cannot_all_pass_the_check_before_one_of_them_has_paid(fleet: list[House]) -> None:
    await fleet[0].credits(7)
    assert await all_that_can_be_sold(fleet) == 7


# litellm #34732, #34733
async def test_parallel_turns_of_an_agent_cannot_all_pass_the_budget_of_their_session(fleet: list[House]) -> None:
    await fleet[0].credits(100)
    budget = Demand(Limit("session", "sliding", "ucredits", "session", 3 * CREDIT, 3_600_000), "talk", CREDIT)

    async def turn(number: int) -> bool:
        async with fleet[number % 4].admission.hold(f"turn{number}", ASKER, (budget,), PRICE) as hold:
            if isinstance(hold, Hold):
                hold.charge = paid(CREDIT)
            return isinstance(hold, Hold)

    assert sum(await asyncio.gather(*(turn(number) for number in range(20)))) == 3


# one-api #925
async def test_a_rich_org_is_held_like_any_other(house: House) -> None:
    await house.credits(1_000_000_000)
    async with house.admission.hold("r1", ASKER, (), Quote.flat(1_000 * CREDIT)) as hold:
        assert isinstance(hold, Hold)
        assert hold.ucredits == (await house.account())["h"] == 1_000 * CREDIT


# What was held and never came back


# litellm #27639, #30522
async def test_requests_that_are_cancelled_leave_nothing_held_and_nothing_spent(house: House) -> None:
    await house.credits(10)
    begun = asyncio.Semaphore(0)

    async def stream(number: int) -> AsyncIterator[bytes]:
        async with house.admission.hold(f"r{number}", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold)
            while True:
                yield b"data: 1\n\n"

    async def client(number: int) -> None:
        async for _ in stream(number):
            begun.release()
            await asyncio.Event().wait()

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    for _ in clients:
        await begun.acquire()
    assert (await house.account())["h"] == 8 * CREDIT
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    # And one whose reader just stops reading.
    generator = stream(8)
    await anext(generator)
    await generator.aclose()  # type: ignore[attr-defined]
    await until(lambda: house.admission.open_count == 0 and house.settling.idle)
    account = await house.account()
    assert (account["h"], account["u"]) == (0, 0)
    assert await pay(house, "all of it", 10 * CREDIT) == "paid"


# litellm #27735, #36926
async def test_credits_held_by_requests_in_flight_are_not_called_spent(house: House) -> None:
    await house.credits(3)
    running = [Request(house, f"r{number}") for number in range(3)]
    assert [await request.begin() for request in running] == [True] * 3
    late = Request(house, "late")
    assert not await late.begin() and late.refusal is not None
    assert (late.refusal.status, late.refusal.code) == (429, "credits_in_flight")
    assert late.refusal.details == {"required_credits": 1.0, "available_credits": 0.0, "held_credits": 3.0}
    # It heals when one of them ends, not minutes later.
    await running[0].end(0)
    assert await pay(house, "now") == "paid"


# otari #128, #129, #1277
async def test_an_answer_that_fails_before_its_first_byte_is_given_back(house: House) -> None:
    await house.credits(1)
    for outcome in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED):
        await ended(house, f"r-{outcome}", charge.settle(outcome, None, PRICE, 0, CREDIT))
    with pytest.raises(ConnectionResetError):
        async with house.admission.hold("r-reset", ASKER, (), PRICE):
            raise ConnectionResetError
    assert await balance(house) == CREDIT
    assert await pay(house, "r9") == "paid"


# new-api #4429, #4424
async def test_a_gateway_that_crashes_between_hold_and_charge_takes_no_money_with_it(house: House) -> None:
    """By the token, nothing was delivered yet."""
    await house.credits(5)
    house.obey(lease_ms=1)
    holding = house.admission.hold("r1", ASKER, (), BY_TOKEN)
    assert isinstance(await holding.__aenter__(), Hold)
    assert (await house.account())["h"] == CREDIT
    await until(house.sweeper.sweep)
    await house.outbox.flush()
    assert (await balance(house), (await house.account())["h"]) == (5 * CREDIT, 0)
    house.admission._open.clear()


# What an answer costs that did not end well


# new-api #5235
async def test_a_client_that_leaves_before_the_usage_comes_pays_for_what_it_got(house: House) -> None:
    await house.credits(5)
    meter = Meter(READERS["openai_chat"].reader("text/event-stream", ""), Peek(4, stream=True), 200)
    meter.see(b'data: {"choices":[{"index":0,"delta":{"content":"' + b"abcd" * 300 + b'"}}]}\n\n')
    left = charge.settle(Outcome.CLIENT_LEFT, meter.usage(complete=False), BY_TOKEN, 0, CREDIT)
    assert left.basis == "under_estimate"
    await ended(house, "r1", left, BY_TOKEN)
    assert await settles(house) == [("r1", 300 * TOKEN)]
    # Of one that nobody could count the estimate is owed, not nothing.
    await ended(house, "r2", charge.settle(Outcome.CLIENT_LEFT, None, BY_TOKEN, 0, CREDIT), BY_TOKEN)
    assert await settles(house) == [("r1", 300 * TOKEN), ("r2", CREDIT)]


# new-api #5288, #5289
async def test_the_text_of_an_error_is_not_sold_as_output(house: House) -> None:
    await house.credits(5)
    meter = Meter(READERS["openai_chat"].reader("application/json", ""), Peek(4), 500)
    meter.see(b'{"error":{"message":"' + b"abcd" * 300 + b'"},"usage":{"prompt_tokens":1,"completion_tokens":300}}')
    refused = charge.settle(Outcome.UPSTREAM_REFUSED, meter.usage(complete=True), BY_TOKEN, 0, CREDIT)
    await ended(house, "r1", refused, BY_TOKEN)
    # Input is sold as input: this price has none for it.
    counted = charge.settle(Outcome.CLIENT_LEFT, Usage(400, 10), BY_TOKEN, 0, CREDIT)
    await ended(house, "r2", counted, BY_TOKEN)
    assert await settles(house) == [("r2", 10 * TOKEN)]


# Who may not be asked


# litellm #33923, #26672
async def test_no_answer_and_no_row_are_not_a_yes(redis_url: str, database_url: str) -> None:
    postgres = FaultyPostgres(database_url, timeout_ms=2_000, pool_max=4)
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    postgres.arm(0, "")
    async with furnished(redis, postgres) as house:
        assert await pay(house, "no row") == "insufficient_credits"
        await house.credits(20)
        await house.redis.call("FLUSHALL")
        for fault in ("before", "after"):
            for number in range(1, 4):
                postgres.arm(number, fault)
                verdict = await pay(house, f"{fault}{number}")
                assert verdict == ("credits_unavailable" if postgres.asked >= number else "paid")
        postgres.arm(0, "")
        redis.arm(1, "reply lost")
        assert await pay(house, "lost") == "store_unavailable"
        await house.admission.drain(5)
        assert (await house.account())["h"] == 0


# litellm #42653
async def test_nothing_is_decided_for_good_when_a_gateway_starts(redis_url: str, database_url: str) -> None:
    """One starts while Redis is away, another while it is there: soon they share it all the same."""
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    redis.away = True
    async with (
        gateway(redis_url, database_url, works=False) as other,
        furnished(redis, Postgres(database_url, timeout_ms=2_000, pool_max=4)) as house,
    ):
        await house.credits(10)
        async with house.admission.hold("r1", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold) and hold.where == "postgres"
        redis.away = False
        async with house.admission.hold("r2", ASKER, (), PRICE) as hold:
            assert isinstance(hold, Hold) and hold.where == "redis"
            assert await pay(other, "r3", 10 * CREDIT) == "credits_in_flight"


# redis-py #2624
async def test_a_cancelled_admission_leaves_its_answer_to_nobody_else(house: House) -> None:
    """Each org sees its own balance, however many questions were given up half-way."""
    for credits in range(1, 6):
        await house.credits(credits * 100, f"org{credits}", f"grant:org{credits}")

    async def available(credits: int, number: int) -> int | None:
        asker = Principal(f"org{credits}", "pro", None, None, "api_key")
        async with house.admission.hold(f"o{credits}.{number}", asker, (), PRICE) as hold:
            assert isinstance(hold, Hold)
            return hold.available_ucredits

    for number in range(30):
        given_up = [asyncio.create_task(available(credits, number)) for credits in range(1, 6)]
        for _ in range(number % 4 + 1):
            await asyncio.sleep(0)
        for task in given_up:
            task.cancel()
        asked = [asyncio.create_task(available(credits, 1_000 + number)) for credits in range(1, 6)]
        seen = [await one for one in asked]
        for credits, ucredits in enumerate(seen, 1):
            assert ucredits is not None and (credits - 1) * 100 * CREDIT < ucredits < credits * 100 * CREDIT
        await asyncio.gather(*given_up, return_exceptions=True)


# Charges on their way


# litellm #35531, #34820, #27704
async def test_charges_survive_a_database_that_fails_a_flush_that_is_cancelled_and_a_deploy(
    redis_url: str, database_url: str
) -> None:
    postgres = FaultyPostgres(database_url, timeout_ms=2_000, pool_max=4)
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    postgres.arm(0, "")
    async with furnished(redis, postgres) as house:
        await house.credits(10)
        for number in range(3):
            assert await pay(house, f"r{number}") == "paid"
        for fault in ("before", "after"):
            postgres.arm(1, fault)
            with pytest.raises(StoreUnavailable):
                await house.outbox.flush()
        for turns in range(1, 8):
            flush = asyncio.create_task(house.outbox.flush())
            for _ in range(turns):
                await asyncio.sleep(0)
            flush.cancel()
            await asyncio.wait({flush})
    # That process is gone; nobody has marked the org for the next one.
    async with gateway(redis_url, database_url, works=False) as house:
        await house.sweeper.sweep()
        await house.outbox.flush()
        assert await settles(house) == [(f"r{number}", CREDIT) for number in range(3)]
        assert (await house.account())["u"] == 0


# No thread: an orphan of the same request was taken for the charge itself.
async def test_a_charge_is_not_taken_for_posted_because_its_requests_orphan_is(
    redis_url: str, database_url: str
) -> None:
    async with gateway(redis_url, database_url, works=False) as house:
        await house.losses.beat()
        await house.credits(10)
        house.obey(lease_ms=1)
        stalled = Request(house, "r1")
        assert await stalled.begin()
        await until(house.sweeper.sweep)
        post = house.outbox._post

        async def posted_while_it_wakes_up(batch: list[OutboxEntry]) -> tuple[list[OutboxEntry], list[Balance]]:
            done = await post(batch)
            if batch:
                await stalled.end(4 * CREDIT)
                await house.redis.call("FLUSHALL")
            return done

        house.outbox._post = posted_while_it_wakes_up  # type: ignore[method-assign]
        await house.outbox.flush()
        assert await settles(house) == [("r1", CREDIT)]
        await house.settling.post_unconfirmed()
        assert await settles(house) == [("r1", CREDIT), ("r1", 3 * CREDIT)]


# autumn #3230, #3232
async def test_a_top_up_while_charges_wait_brings_none_of_them_back(redis_url: str, database_url: str) -> None:
    async with gateway(redis_url, database_url, flush="1m") as house:
        await house.credits(10)
        assert [await pay(house, f"r{number}") for number in range(6)] == ["paid"] * 6
        await house.postgres.rows("UPDATE ai_credits SET credits = credits + 10 WHERE organization_id = $1", ORG)

        async def seen() -> bool:
            return (await house.account())["p"] == 20 * CREDIT

        await until(seen)
        assert await pay(house, "too much", 15 * CREDIT) == "request_exceeds_balance"
        assert await pay(house, "what is there", 14 * CREDIT) == "paid"
        await house.outbox.flush()
        assert await balance(house) == 0


# unkey: the balance is read again every ten minutes, while charges wait to be replayed
async def test_a_balance_that_is_read_again_while_charges_wait_is_not_spent_twice(house: House) -> None:
    await house.losses.beat()
    await house.credits(10)
    assert [await pay(house, f"r{number}") for number in range(6)] == ["paid"] * 6
    await house.redis.call("DEL", keys.account(ORG))
    await house.accounts.load(ORG, "pro")
    account = await house.account()
    assert (account["p"], account["u"]) == (10 * CREDIT, 6 * CREDIT)
    assert await pay(house, "too much", 5 * CREDIT) != "paid"
    await house.outbox.flush()
    assert await balance(house) == 4 * CREDIT


# autumn #2159, midaz #2499
async def test_a_flusher_that_dies_between_the_stores_neither_loses_a_charge_nor_repeats_it(
    redis_url: str, database_url: str
) -> None:
    """And what it had half done expires before anybody looks."""
    async with gateway(redis_url, database_url, works=False) as house:
        await house.losses.beat()
        await house.credits(10)
        assert await pay(house, "r1", 4 * CREDIT) == "paid"

        async def dies(*_: object) -> None:
            raise ConnectionResetError

        apply = house.outbox._apply
        house.outbox._apply = dies  # type: ignore[assignment, method-assign]
        with pytest.raises(ConnectionResetError):
            await house.outbox.flush()
        house.outbox._apply = apply  # type: ignore[method-assign]
        await house.redis.call("DEL", keys.account(ORG))
        await house.accounts.load(ORG, "pro")
        # The entry still waits, so what it says is not there to be spent: less than there is, never more.
        account = await house.account()
        assert (account["p"], account["u"]) == (6 * CREDIT, 4 * CREDIT)
        await house.outbox.flush()
        account = await house.account()
        assert (account["p"], account["u"]) == (6 * CREDIT, 0)
        assert await settles(house) == [("r1", 4 * CREDIT)]


# eliza #22478
async def test_a_sweep_and_a_late_settle_charge_what_the_settle_says_in_either_order(house: House) -> None:
    await house.credits(10)
    for name, order in (("r1", "orphan settle orphan"), ("r2", "settle orphan settle")):
        for kind in order.split():
            await books.post(house.postgres, [Entry(ORG, name, kind, -CREDIT * (5 if kind == "orphan" else 2))])
    assert await balance(house) == 6 * CREDIT
    await books_are_right(house.postgres)


# What is given


# eliza #11512
async def test_a_grant_that_fails_half_way_is_given_once_however_often_it_is_repeated(
    redis_url: str, database_url: str
) -> None:
    postgres = FaultyPostgres(database_url, timeout_ms=2_000, pool_max=4)
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    postgres.arm(0, "")
    async with furnished(redis, postgres) as house:
        for fault in ("before", "after", "arrives late"):
            postgres.arm(1, fault)
            with pytest.raises(StoreUnavailable):
                await house.credits(10)
        await asyncio.gather(*(house.credits(10) for _ in range(5)))
        await postgres.let_late_ones_arrive()
        assert await balance(house) == 10 * CREDIT


async def given_before(house: House, hours: int, ucredits: int) -> None:
    """The org got its ten credits of an hour so many hours ago, and has used as many of them."""
    await planned.insert(house.postgres)
    await house.postgres.rows("UPDATE gateway.account SET created_at = created_at - interval '1 day'")
    now_ms = (await planned.at(house.postgres)).clock_ms
    await planned.give(house.postgres, "pro", planned.plan(), now_ms - hours * planned.HOUR_MS)
    await books.post(house.postgres, [Entry(ORG, "before", "settle", -ucredits)])


# litellm #3515
async def test_purchased_credits_are_spent_last_and_outlive_the_period(redis_url: str, database_url: str) -> None:
    async with planned.planned(redis_url, database_url) as house:
        await given_before(house, 1, 4 * CREDIT)
        await house.credits(30, grant_id="purchase:1")
        assert await planned.pockets(house.postgres) == (6 * CREDIT, 30 * CREDIT)
        await books.post(house.postgres, [Entry(ORG, "more", "settle", -8 * CREDIT)])
        assert await planned.pockets(house.postgres) == (0, 28 * CREDIT)
        assert await planned.pay(house, "r1", "pro") == "paid"
        await house.outbox.flush()
        assert await planned.pockets(house.postgres) == (9 * CREDIT, 28 * CREDIT)


# litellm #34896, #38938, #10288, #5651, #24675
async def test_a_period_is_over_when_it_is_asked_for_and_nobody_has_to_run_at_midnight(
    redis_url: str, database_url: str
) -> None:
    """Nothing works in the background here, and the org slept over several periods."""
    async with planned.planned(redis_url, database_url) as house:
        await given_before(house, 5, 10 * CREDIT)
        assert await balance(house) == 0
        assert await planned.pay(house, "r1", "pro", 10 * CREDIT) == "paid"
        assert await planned.pay(house, "r2", "pro") == "insufficient_credits"


# What has to be paid for


GATEWAY = """
upstreams: { router: { targets: [demo] } }
identity: [ { api_key: {} } ]
plans: { trial: { credits: 100, policy: trial } }
routes:
  - { path: /v1/chat/completions, upstream: router, dialect: openai, usage: openai_chat }
  - { path: /v1/messages, upstream: router, dialect: anthropic, usage: openai_chat }
  - { path: /v1/responses, upstream: router, dialect: openai }
  - { path: /v1/embeddings, upstream: router, dialect: openai }
  - { path: /trpc/*, upstream: router }
  - { path: /live, upstream: router, websocket: { count_messages: true } }
  - { path: /*, upstream: router }
"""


def loaded(policy: str, gateway_yaml: str = GATEWAY) -> Settings:
    return load_text(gateway_yaml, {"trial.yaml": f"policy: trial\n{policy}\n"})


def compiled(settings: Settings) -> CompiledPolicy:
    found = PolicySet.compile(settings).plan("trial")
    assert found is not None
    return found


# litellm #10750, #12789, #38176, #36646, bifrost #2873
async def test_no_route_escapes_the_budget(house: House) -> None:
    """What nobody exempted is paid for, on every route there is, whatever is known of its bodies."""
    settings = loaded(
        "limits: [ { name: daily, count: credits, limit: 50, window: 24h } ]\nprice: { per_request: 1, per_message: 1 }"
    )
    rules = compiled(settings)
    facts = Facts("r", "POST", "/", b"/", (), "192.0.2.1", "192.0.2.1")
    assert len(settings.routes) == 7
    for route in settings.routes:
        peek = None if route.usage is None else Peek(100, "some-model")
        asked = quote(rules, route, peek, settings.credits)
        assert isinstance(asked, Quote) and asked.want_ucredits == CREDIT, route.path
        asking = Asking(ASKER, facts, route, peek)
        assert [(one.limit.name, one.cost) for one in demands(rules, asking)] == [("daily", CREDIT)], route.path
        if route.websocket is not None:
            assert [one.cost for one in message_demands(rules, asking)] == [CREDIT]
        async with house.admission.hold(f"r{route.name}", ASKER, (), asked) as verdict:
            assert isinstance(verdict, Refusal) and verdict.status == 402, route.path


# litellm #25874, #14004, #29912, #38515
async def test_a_model_has_a_price_or_is_free_or_unknown_and_never_one_for_another(house: House) -> None:
    """For an org that is broke: what is free goes on, and nothing is free by mistake."""
    for unknown, model, expected in (
        ("deny", "mine", "insufficient_credits"),
        ("deny", "gift", "admitted"),
        ("deny", "other", "unknown_model_price"),
        ("flat", "other", "insufficient_credits"),
        ("free", "other", "admitted"),
    ):
        settings = loaded(
            f"price: {{ per_request: 2, unknown_model: {unknown}, models: "
            "[ { model: mine, per_million_output_tokens: 3 }, { model: gift } ] }"
        )
        asked = quote(compiled(settings), settings.routes[0], Peek(100, model), Credits())
        if isinstance(asked, Refusal):
            assert (asked.code, asked.status) == (expected, 403)
            continue
        async with house.admission.hold(f"{unknown}-{model}", ASKER, (), asked) as verdict:
            assert (verdict.code if isinstance(verdict, Refusal) else "admitted") == expected


# bifrost #5673
@pytest.mark.parametrize(
    ("where", "written"),
    [
        ("policy", "budget: 5"),
        ("policy", "price: { per_request: 1, max_budget: 5 }"),
        ("policy", "limits: [ { name: b, count: credits, limit: 5, window: 24h, budget: 5 } ]"),
        ("gateway", "credits: { budget: 5 }"),
        ("gateway", "budget: 5"),
    ],
)
def test_a_budget_that_would_not_be_enforced_is_a_mistake(where: str, written: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        loaded(*((written,) if where == "policy" else ("", f"{GATEWAY}{written}\n")))


# macprovider #762, #200, ComfyUI #16204
async def test_a_request_that_its_client_sends_again_is_charged_once(house: House) -> None:
    facts = Facts("r", "POST", "/v1/chat/completions", b"/v1/chat/completions", (), "192.0.2.1", "192.0.2.1")
    await house.credits(10)

    async def send(number: int) -> str:
        record = Record(f"x{number}", "POST", facts.path, facts.client_ip)
        async with house.money.idempotency.once("job-1", ASKER, facts, b"{}", f"r{number}", record) as told:
            if told is not None:
                return told.code
            assert await pay(house, f"r{number}") == "paid"
            record.outcome, record.status, record.charged_ucredits = Outcome.COMPLETE.value, 200, CREDIT
            return "ran"

    together = await asyncio.gather(*(send(number) for number in range(10)))
    assert together.count("ran") == 1 and set(together) <= {"ran", "request_in_progress", "request_finished"}
    assert [await send(number) for number in range(10, 13)] == ["request_finished"] * 3
    await house.outbox.flush()
    assert await balance(house) == 9 * CREDIT


def test_every_row_of_the_notes_has_its_test() -> None:
    """The first thread of each row, and what of the list of regressions is about credits."""
    rows = (
        "litellm #30661, litellm #28247, litellm #33325, litellm #34732, litellm #27639, litellm #27735, otari #128, "
        "litellm #33923, new-api #4429, new-api #5235, new-api #5288, one-api #925, litellm #35531, autumn #3230, "
        "autumn #2159, litellm #3515, litellm #34896, litellm #25874, litellm #10750, bifrost #5673, macprovider #762"
    ).split(", ")
    listed = "#30460, #34238, #34733, litellm #42653, new-api #6609, unkey, eliza #11512, eliza #22478, redis-py #2624"
    comments = "\n".join(line for line in Path(__file__).read_text().splitlines() if line.startswith("# "))
    assert [thread for thread in (*rows, *listed.split(", ")) if thread not in comments] == []

"""Plans at work: what an org's first request in a period brings, whichever gateway it comes to and whatever is away."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest

from gateway.admission import Hold
from gateway.errors import StoreLocked, StoreRefused, StoreUnavailable
from gateway.ledger import books, grants
from gateway.ledger.grants import Facts
from gateway.stores import Postgres
from gateway.types import Charge, Entry, Quote, Refusal
from tests.ledger.audit import books_are_right, entries
from tests.ledger.conftest import ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis
from tests.ledger.planned import (
    CREDIT,
    HOUR_MS,
    PLANS,
    begin_the_hour_before,
    insert,
    let_an_hour_pass,
    member,
    pay,
    plan,
    planned,
    pockets,
)
from tests.ledger.test_book_locks import another
from tests.waiting import until

PAID = Charge(CREDIT, None, keep_requests=True, basis="exact")


async def kinds(house: House, org_id: str = ORG) -> list[str]:
    return [kind for kind, _ in await entries(house.postgres, org_id)]


async def given_an_hour_ago(house: House) -> None:
    """The org has what its plan brought an hour ago; nobody has asked in this hour yet."""
    await insert(house.postgres)
    await begin_the_hour_before(house.postgres, "pro", plan())


async def test_a_first_request_brings_what_the_plan_brings(redis_url: str, database_url: str) -> None:
    async with planned(redis_url, database_url) as house:
        await insert(house.postgres)
        assert await pay(house, "r1", "pro") == "paid"
        assert await kinds(house) == ["external", "grant"]
        assert (await house.account())["p"] == 10 * CREDIT
        noted = (await grants.look(house.postgres, ORG)).period
        assert noted is not None and (await house.account())["pe"] == noted.ends_ms


async def test_an_unknown_org_gets_its_row_and_its_plans_credits_once(redis_url: str, database_url: str) -> None:
    """Two gateways, sixty requests at once of ten credits."""
    async with AsyncExitStack() as stack:
        houses = [
            await stack.enter_async_context(planned(redis_url, database_url, works=True, provision=True)) for _ in "12"
        ]
        asked = [pay(houses[number % 2], f"r{number}", "pro", org_id="fresh") for number in range(60)]
        verdicts = await asyncio.gather(*asked)
        assert verdicts.count("paid") == 10
        assert set(verdicts) <= {"paid", "insufficient_credits", "credits_in_flight"}

        async def all_charged() -> bool:
            return (await kinds(houses[0], "fresh")).count("settle") == 10

        await until(all_charged)
        assert (await kinds(houses[0], "fresh")).count("grant") == 1
        await books_are_right(houses[0].postgres)


async def test_without_provision_an_unknown_org_is_left_to_the_application(redis_url: str, database_url: str) -> None:
    async with planned(redis_url, database_url, works=True) as house:
        for number in range(20):
            assert await pay(house, f"r{number}", "pro") == "insufficient_credits"
        assert await house.ledger() == []
        await insert(house.postgres)  # and now it has a row, of nothing

        async def brought() -> bool:
            return await pay(house, "again", "pro") == "paid"

        await until(brought)
        assert (await kinds(house)).count("grant") == 1


async def test_an_org_that_ran_dry_gets_the_next_periods_credits(redis_url: str, database_url: str) -> None:
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        verdicts = [await pay(house, f"r{number}", "pro", 3 * CREDIT) for number in range(4)]
        assert verdicts == ["paid"] * 3 + ["request_exceeds_balance"]
        await house.outbox.flush()
        await let_an_hour_pass(house)
        assert await pay(house, "next", "pro", 3 * CREDIT) == "paid"
        rows = await house.ledger()
        assert [(kind, amount) for _, kind, amount in rows[-2:]] == [("expire", -CREDIT), ("grant", 10 * CREDIT)]
        assert rows[-1][0] == rows[-2][0]
        await books_are_right(house.postgres)


@pytest.mark.parametrize("rush", ["one period", "asked in no order"])
async def test_a_period_is_turned_once_however_many_gateways_find_it_over(
    redis_url: str, database_url: str, rush: str
) -> None:
    async with AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(planned(redis_url, database_url, works=True)) for _ in "12"]
        await given_an_hour_ago(houses[0])
        assert [await pay(house, f"first{n}", "pro") for n, house in enumerate(houses)] == ["paid"] * 2
        await until(lambda: two_are_charged(houses[0]))
        await let_an_hour_pass(houses[0])
        names = ["pro"] * 40 if rush == "one period" else ["pro", "team"] * 20
        asked = [pay(houses[number % 2], f"r{number}", names[number]) for number in range(40)]
        verdicts = await asyncio.gather(*asked)
        found = await kinds(houses[0])
        if rush == "one period":
            assert (found.count("grant"), found.count("expire")) == (2, 1)
            assert verdicts.count("paid") == 10
        else:
            assert found.count("grant") == 3
            # What `pro` brings is in place of what is left, of what `team` brought as well if that came first.
            assert 10 <= verdicts.count("paid") <= 38
        await books_are_right(houses[0].postgres)


async def two_are_charged(house: House) -> bool:
    return (await kinds(house)).count("settle") == 2 and (await house.account())["u"] == 0


async def test_what_is_in_flight_at_the_end_of_a_period_does_not_expire(redis_url: str, database_url: str) -> None:
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        running = house.admission.hold("running", member("pro"), (), Quote.flat(3 * CREDIT))
        hold = await running.__aenter__()
        assert isinstance(hold, Hold)
        await let_an_hour_pass(house)
        assert await pay(house, "next", "pro") == "paid"
        assert ("expire", -7 * CREDIT) in await entries(house.postgres, ORG)
        hold.charge = replace(PAID, ucredits=2 * CREDIT)
        await running.__aexit__(None, None, None)
        await house.outbox.flush()
        # Thirteen, two for the one that was running, one for the next.
        assert await pockets(house.postgres) == (10 * CREDIT, 0)
        await books_are_right(house.postgres)


@pytest.mark.parametrize("where", ["optimistic", "through"])
async def test_what_is_in_flight_does_not_expire_where_redis_has_no_cap(
    redis_url: str, database_url: str, where: str
) -> None:
    terms: Any = {"optimistic": {"on_state_loss": "optimistic"}, "through": {"write": "through"}}[where]
    async with planned(redis_url, database_url, **terms) as house:
        await given_an_hour_ago(house)
        running = house.admission.hold("running", member("pro"), (), Quote.flat(3 * CREDIT))
        hold = await running.__aenter__()
        assert isinstance(hold, Hold) and hold.where == ("postgres" if where == "through" else "redis")
        await let_an_hour_pass(house)
        await house.accounts.periods.turn(ORG, "pro", 1)
        assert (await entries(house.postgres, ORG))[-2:] == [("expire", -7 * CREDIT), ("grant", 10 * CREDIT)]
        hold.charge = replace(PAID, ucredits=3 * CREDIT)
        await running.__aexit__(None, None, None)
        await house.outbox.flush()
        assert await pockets(house.postgres) == (10 * CREDIT, 0)


async def test_all_that_redis_does_not_owe_expires_whatever_it_has_heard(redis_url: str, database_url: str) -> None:
    """It had a cap of ten, and knows of no top-up: nobody listens here."""
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        assert await pay(house, "r1", "pro") == "paid"
        await house.outbox.flush()
        await let_an_hour_pass(house)
        await house.credits(5)
        await house.accounts.periods.turn(ORG, "pro", 1)
        assert ("expire", -9 * CREDIT) in await entries(house.postgres, ORG)
        assert await pockets(house.postgres) == (10 * CREDIT, 5 * CREDIT)
        assert (await house.account())["p"] == 15 * CREDIT
        assert await pay(house, "r2", "pro", 15 * CREDIT) == "paid"


@pytest.mark.parametrize("what", ["posted", "raised"])
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_the_old_credits_expire_though_the_account_changes_while_it_is_turned(
    redis_url: str, database_url: str, what: str, times: int
) -> None:
    """Between the word of Redis and that of PostgreSQL. What changes a third time is left as it is."""
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        assert await pay(house, "r1", "pro") == "paid"
        await house.outbox.flush()
        await let_an_hour_pass(house)
        side, left = house.accounts.periods._redis, iter(range(times))

        async def lowered_and_changed(org_id: str) -> tuple[int, int, int, str]:
            version, epoch, cap, birth = await side.lower(org_id)
            if (number := next(left, None)) is not None:
                if what == "posted":
                    await books.post(house.postgres, [Entry(org_id, f"late{number}", "settle", -1)])
                else:
                    await house.accounts.raise_cap(org_id, epoch, birth, CREDIT)
            return version, epoch, cap, birth

        house.accounts.periods._redis = replace(side, lower=lowered_and_changed)
        await house.accounts.periods.turn(ORG, "pro", 1)
        found = await entries(house.postgres, ORG)
        posted = times if what == "posted" else 0
        expired = [-amount for kind, amount in found if kind == "expire"]
        assert expired == ([] if times == 3 else [9 * CREDIT - posted])
        assert [kind for kind, _ in found].count("grant") == 2
        assert await pockets(house.postgres) == (10 * CREDIT if times < 3 else 19 * CREDIT - posted, 0)
        await books_are_right(house.postgres)


async def test_another_plan_brings_its_credits_with_the_first_request_under_it(
    redis_url: str, database_url: str
) -> None:
    """Redis knows the org, and of no end of any period."""
    async with planned(redis_url, database_url) as house:
        await insert(house.postgres, 1)
        assert await pay(house, "r1", "trial") == "paid"
        assert await pay(house, "r2", "trial") == "insufficient_credits"
        assert await pay(house, "r3", "pro") == "paid"
        assert await pay(house, "r4", "team") == "paid"
        assert [kind for kind in await kinds(house) if kind == "grant"] == ["grant"] * 2


async def test_users_of_two_plans_in_one_org_do_not_turn_it_with_every_request(
    redis_url: str, database_url: str
) -> None:
    async with planned(redis_url, database_url) as house:
        await insert(house.postgres)
        for name in ("pro", "team"):
            assert await pay(house, f"first-{name}", name) == "paid"
        turned = await grants.look(house.postgres, ORG)
        asked = 0
        turn = grants.turn

        async def counted(*args: object, **more: object) -> object:
            nonlocal asked
            asked += 1
            return await turn(*args, **more)  # type: ignore[arg-type]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grants, "turn", counted)
            for number in range(20):
                assert await pay(house, f"r{number}", ("pro", "team")[number % 2]) == "paid"
        assert asked == 0
        assert (await grants.look(house.postgres, ORG)).plan == turned.plan
        assert (await kinds(house)).count("grant") == 2


async def test_a_redis_whose_clock_goes_ahead_is_content(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the database it is still the hour before."""
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        assert await pay(house, "r1", "pro") == "paid"
        await let_an_hour_pass(house)
        look = grants.look

        async def an_hour_behind(postgres: Postgres, org_id: str) -> Facts:
            facts = await look(postgres, org_id)
            return replace(facts, clock_ms=facts.clock_ms - HOUR_MS)

        monkeypatch.setattr(grants, "look", an_hour_behind)
        for number in range(5):
            assert await pay(house, f"ahead{number}", "pro") == "paid"
        assert (await kinds(house)).count("grant") == 2


async def test_a_redis_whose_clock_is_behind_goes_on_with_the_last_period(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the database it is the next hour already: whoever asks it turns, and nobody turns back."""
    async with planned(redis_url, database_url) as house, planned(redis_url, database_url) as other:
        await insert(house.postgres)
        assert await pay(house, "r1", "pro") == "paid"
        look = grants.look

        async def an_hour_ahead(postgres: Postgres, org_id: str) -> Facts:
            facts = await look(postgres, org_id)
            return replace(facts, clock_ms=facts.clock_ms + HOUR_MS)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grants, "look", an_hour_ahead)
            assert await pay(house, "r2", "pro") == "paid"  # it has asked in this hour
            assert (await kinds(house)).count("grant") == 1
            assert await pay(other, "r3", "pro") == "paid"
        assert (await kinds(house)).count("grant") == 2
        for number in range(3):
            assert await pay(other, f"again{number}", "pro") == "paid"
        assert (await kinds(house)).count("grant") == 2


@pytest.mark.parametrize("through", [False, True])
async def test_while_redis_is_away_or_has_no_say_postgres_brings_it(
    redis_url: str, database_url: str, through: bool
) -> None:
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    redis.arm(0, "")
    postgres = Postgres(database_url, timeout_ms=2_000, pool_max=4)
    terms = {"write": "through"} if through else {}
    async with furnished(redis, postgres, plans=PLANS, provision=True, **terms) as house:
        redis.away = True
        assert await pay(house, "r1", "pro") == "paid"
        assert await pay(house, "r2", "trial", org_id="globex") == "paid"
        assert (await kinds(house))[0] == (await kinds(house, "globex"))[0] == "grant"


async def test_while_postgres_is_away_an_org_goes_on_with_what_redis_has(redis_url: str, database_url: str) -> None:
    """This process has never seen it, and cannot ask whether anything is due."""
    async with planned(redis_url, database_url) as house:
        await insert(house.postgres)
        for number in range(2):
            assert await pay(house, f"r{number}", "pro") == "paid"
    async with planned(redis_url, database_url) as other:
        other.accounts.periods._postgres = Postgres("postgresql://127.0.0.1:1/none", timeout_ms=500, pool_max=1)
        assert await pay(other, "r3", "pro") == "paid"


async def test_an_org_that_is_locked_keeps_no_other_from_its_credits(redis_url: str, database_url: str) -> None:
    """Nor the same one from those of another plan, when it is not locked any more."""
    async with planned(redis_url, database_url) as house:
        for org_id in (ORG, "globex"):
            await insert(house.postgres, 1, org_id)
            assert await pay(house, f"{org_id}.1", "trial", org_id=org_id) == "paid"
        periods = house.accounts.periods
        periods._postgres = Postgres(database_url, timeout_ms=200, pool_max=2)
        await periods._postgres.open()
        async with another(database_url, f"SELECT FROM gateway.account WHERE org_id = '{ORG}' FOR UPDATE"):
            await periods.begin(ORG, "pro")
            assert periods.remembered.knows(ORG, "pro")
            assert not periods.remembered.knows("globex", "pro")
            await periods.begin("globex", "pro")
            assert (await kinds(house, "globex")).count("grant") == 1
        await periods.begin(ORG, "team")
        assert (await grants.look(house.postgres, ORG)).plan == "team"
        await periods._postgres.close()


@pytest.mark.parametrize("failure", [StoreRefused(), StoreLocked(), StoreUnavailable()])
async def test_only_a_postgres_that_is_away_is_everybodys_trouble(
    redis_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch, failure: StoreUnavailable
) -> None:
    async with planned(redis_url, database_url) as house:
        await insert(house.postgres)

        async def fails(*args: object, **more: object) -> None:
            raise failure

        monkeypatch.setattr(grants, "turn", fails)
        periods = house.accounts.periods
        await periods.begin(ORG, "pro")
        assert periods.remembered.knows(ORG, "pro")
        is_away = type(failure) is StoreUnavailable
        assert [periods.remembered.knows(*other) for other in ((ORG, "team"), ("globex", "pro"))] == [is_away] * 2


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
async def test_a_turn_whose_answer_is_lost_is_asked_for_again(
    redis_url: str, database_url: str, fault: str, at: int
) -> None:
    postgres = FaultyPostgres(database_url, timeout_ms=2_000, pool_max=4)
    postgres.arm(0, "")
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        assert await pay(house, "r1", "pro") == "paid"
        await house.outbox.flush()
        await let_an_hour_pass(house)
        await postgres.open()
        house.accounts.periods._postgres = postgres
        postgres.arm(at, fault)
        try:
            await pay(house, "r2", "pro")
        except StoreUnavailable as exc:
            assert exc.code == "credits_unavailable"
        postgres.arm(0, "")
        assert await pay(house, "r3", "pro") == "paid"
        found = await entries(house.postgres, ORG)
        assert [amount for kind, amount in found if kind in ("grant", "expire")] == [
            10 * CREDIT,
            -9 * CREDIT,
            10 * CREDIT,
        ]
        await books_are_right(house.postgres)
        await postgres.close()


async def test_a_refused_request_of_a_new_period_has_turned_it_all_the_same(redis_url: str, database_url: str) -> None:
    """More than the plan brings: it is the first of its period."""
    async with planned(redis_url, database_url) as house:
        await given_an_hour_ago(house)
        await let_an_hour_pass(house)
        async with house.admission.hold("r1", member("pro"), (), Quote.flat(11 * CREDIT)) as verdict:
            assert isinstance(verdict, Refusal)
            assert verdict.code == "request_exceeds_balance"
        assert (await kinds(house)).count("grant") == 2


async def test_free_requests_bring_nothing(redis_url: str, database_url: str) -> None:
    async with planned(redis_url, database_url, provision=True) as house:
        async with house.admission.hold("r1", member("pro"), (), Quote.flat(0)) as verdict:
            assert isinstance(verdict, Hold)
        assert await house.ledger() == []

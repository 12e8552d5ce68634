"""The audit: silent while gateways work and after every kind of loss, and not silent about anything that is wrong."""

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway import keys
from gateway.ledger import post
from gateway.ledger.audit import Auditor, Report
from gateway.stores import Redis
from gateway.types import Entry
from tests.ledger.conftest import ORG, House
from tests.ledger.running import Request, gateway, pay
from tests.waiting import until

CREDIT = 1_000_000
ORGS = ("acme", "globex", "initech")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be seen in passing is looked at again as soon as that."""
    monkeypatch.setattr("gateway.ledger.audit.LOOK_AGAIN_S", 0.2)


async def audit(house: House, org_id: str | None = None) -> Report:
    report = await Auditor(house.postgres, house.redis).audit(org_id)
    assert report.trouble is None
    return report


def codes(report: Report) -> list[str]:
    return [one.code for one in report.wrong]


# Nothing is wrong


async def test_nothing_has_happened(house: House) -> None:
    assert await audit(house) == Report((), (), (), None)


async def test_every_stage_of_a_request_is_accounted_for(house: House) -> None:
    await house.credits(5)
    request = Request(house, "r1", 3 * CREDIT // 2)
    seen = []
    for step in (request.begin, request.end, house.outbox.flush):
        await step()
        report = await audit(house)
        assert (report.wrong, report.remarks) == ((), ())
        [books] = report.orgs
        assert books.ledger_ucredits == books.balance_ucredits
        seen.append((books.entries, books.balance_ucredits, books.unposted_ucredits, books.held_ucredits))
    half = CREDIT // 2
    assert seen == [
        (1, 5 * CREDIT, 0, 3 * half),
        (1, 5 * CREDIT, 3 * half, 0),
        (2, 7 * half, 0, 0),
    ]


@pytest.mark.parametrize("terms", [{}, {"write": "through"}, {"on_state_loss": "optimistic"}, {"schema": "readonly"}])
async def test_an_audit_of_gateways_at_work_finds_nothing(
    redis_url: str, database_url: str, terms: dict[str, Any]
) -> None:
    """Requests, top-ups by hand, a sweeper and losses of Redis's state under way, and an audit at every moment."""
    dice = random.Random(7)
    async with AsyncExitStack() as stack:
        houses = [await stack.enter_async_context(gateway(redis_url, database_url, **terms)) for _ in range(2)]
        postgres = houses[0].postgres
        for org in ORGS:
            await postgres.rows("INSERT INTO ai_credits VALUES ($1, 40)", org)
        working, audits = True, 0

        async def customer(number: int) -> None:
            for step in itertools.count():
                if step >= 40 and audits > 3:
                    return
                house, org = dice.choice(houses), dice.choice(ORGS)
                await pay(house, f"c{number}-{step}", dice.randint(1, 2 * CREDIT), org)

        async def owner() -> None:
            while working:
                org = dice.choice(ORGS)
                await postgres.rows("UPDATE ai_credits SET credits = credits + $2 WHERE organization_id = $1", org, 3)
                if dice.random() < 0.1:
                    await houses[0].redis.call("FLUSHALL")
                await asyncio.sleep(0.02)  # the pace of the changes

        async def auditor() -> None:
            nonlocal audits
            while working:
                report = await audit(houses[1])
                assert report.wrong == ()
                audits += 1

        async with asyncio.TaskGroup() as group:
            group.create_task(owner())
            group.create_task(auditor())
            try:
                await asyncio.gather(*(customer(number) for number in range(6)))
            finally:
                working = False

        async def at_rest() -> bool:
            report = await audit(houses[0])
            assert report.wrong == ()
            return all(
                not (one.unposted_ucredits or one.held_ucredits or one.set_aside_ucredits) for one in report.orgs
            )

        await until(at_rest, 20)


async def test_what_redis_has_lost_is_a_remark(house: House) -> None:
    await house.credits(5)
    await Request(house, "r1").begin()
    await house.redis.call("DEL", keys.account(ORG))
    report = await audit(house)
    assert (codes(report), [one.code for one in report.remarks]) == ([], ["lost"])


async def test_what_a_server_kept_over_its_restart_is_a_remark(house: House) -> None:
    """It may be older than what was there before: it is built anew before it is used."""
    await house.credits(5)
    await pay(house, "r1")
    await house.redis.call("HSET", keys.account(ORG), "r", "another process", "u", 0)
    report = await audit(house)
    assert (codes(report), [one.code for one in report.remarks]) == ([], ["restarted"])


async def test_charges_for_an_org_that_is_gone_are_a_remark_until_it_comes_back(house: House) -> None:
    await house.credits(5)
    await house.postgres.rows("DELETE FROM ai_credits")
    entry = Entry(ORG, "r1", "settle", -CREDIT)
    await post(house.postgres, [entry])
    report = await audit(house)
    assert (codes(report), [one.code for one in report.remarks]) == ([], ["dead_letters"])
    await house.postgres.rows("INSERT INTO ai_credits VALUES ($1, 5)", ORG)
    assert codes(await audit(house)) == ["dead_letters"]
    await post(house.postgres, [entry])
    assert codes(await audit(house)) == []


async def test_a_change_that_nobody_noted_yet_is_seen_in_passing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no trigger tells: somebody looks several times a second."""
    await house.credits(5)
    await unseen(house)
    auditor = Auditor(house.postgres, house.redis)
    look, looks = auditor._look, []

    async def then_it_is_noted(orgs: list[str] | None) -> object:
        looks.append(await look(orgs))
        await house.postgres.rows("SELECT gateway.catch_up()")
        return looks[-1]

    monkeypatch.setattr(auditor, "_look", then_it_is_noted)
    assert (await auditor.audit()).wrong == ()
    assert [[one.code for one in found] for _, found, _ in looks] == [["credits_unseen"], []]


# Something is


async def unseen(house: House) -> None:
    await sql("ALTER TABLE ai_credits DISABLE TRIGGER note_external_change")(house)
    await sql("UPDATE ai_credits SET credits = credits + 1")(house)


def sql(statement: str) -> Callable[[House], Awaitable[object]]:
    async def change(house: House) -> None:
        await house.postgres.rows(statement)

    return change


def redis(*command: str | int) -> Callable[[House], Awaitable[object]]:
    async def change(house: House) -> None:
        await house.redis.call(*command)

    return change


async def a_refund_nobody_paid_for(house: House) -> None:
    await sql("ALTER TABLE gateway.ledger DISABLE TRIGGER ledger_is_append_only")(house)
    await sql("UPDATE gateway.ledger SET amount = amount + 1 WHERE kind = 'grant'")(house)


async def living_but_late(house: House) -> None:
    await house.losses.beat()
    await redis("ZADD", keys.deadlines(ORG), "XX", 1, "held")(house)


ACCOUNT, HOLDS, OUTBOX = keys.account(ORG), keys.holds(ORG), keys.outbox(ORG)

WRONG: dict[str, tuple[str, Callable[[House], Awaitable[object]]]] = {
    "an entry that was changed": ("balance", a_refund_nobody_paid_for),
    "a fraction that was changed": ("balance", sql("UPDATE gateway.account SET micro = 1, version = version + 1")),
    "a change that no trigger told": ("credits_unseen", unseen),
    "an account that holds more": ("held", sql("UPDATE gateway.account SET held = 7, version = version + 1")),
    "a hold that its account forgot": (
        "held",
        sql("INSERT INTO gateway.hold VALUES ('acme', 'r9', 5, 0, 'nobody', now())"),
    ),
    "plan credits that are not there": ("plan_pocket", sql("UPDATE gateway.account SET plan_micro = 5000001")),
    "more held than its holds": ("holds_sum", redis("HINCRBY", ACCOUNT, "h", 1)),
    "a hold that vanished": ("holds_sum", redis("HDEL", HOLDS, "held")),
    "more unposted than its outbox": ("outbox_sum", redis("HINCRBY", ACCOUNT, "u", 1)),
    "a charge that vanished": ("outbox_sum", redis("DEL", OUTBOX)),
    "a lease that vanished": ("hold_without_lease", redis("ZREM", keys.deadlines(ORG), "held")),
    "a lease of nothing": ("lease_without_hold", redis("ZADD", keys.deadlines(ORG), 1, "nothing")),
    "an admission that vanished": ("hold_without_tombstone", redis("DEL", keys.tombstone(ORG, "held"))),
    "a hold that ended": ("hold_that_has_ended", redis("SET", keys.tombstone(ORG, "held"), "settled:5")),
    "more used than held": ("hold_unreadable", redis("HSET", HOLDS, "held", f"{CREDIT}:{CREDIT + 1}")),
    "a hold that nobody ends": ("overdue", living_but_late),
    "another balance": ("state", redis("HINCRBY", ACCOUNT, "p", -CREDIT)),
    "another amount set aside": ("state", redis("HSET", ACCOUNT, "s", 1)),
    "another epoch": ("state", redis("HSET", ACCOUNT, "ep", 9)),
    "another period": ("state", redis("HSET", ACCOUNT, "pe", 9)),
    "a version to come": ("version_ahead", redis("HSET", ACCOUNT, "v", 99)),
    "a cap that nobody gave": ("cap", redis("HSET", ACCOUNT, "c", 99 * CREDIT)),
    "a cap of another account": ("cap", redis("HSET", ACCOUNT, "b", "another")),
    "a mirror that lies": ("mirror", redis("SET", keys.mirror(ORG), 77)),
    "a key of somebody else": ("foreign_key", redis("SET", HOLDS, "mine")),
}


@pytest.mark.parametrize("what", WRONG)
async def test_whatever_is_wrong_is_found(house: House, what: str) -> None:
    code, change = WRONG[what]
    await house.credits(5)
    await pay(house, "r1")
    await house.outbox.flush()
    await pay(house, "waits")
    await Request(house, "held").begin()
    await pay(house, "r2", org_id="globex")  # refused, and known for it
    assert codes(await audit(house)) == []

    await change(house)

    report = await audit(house)
    assert code in codes(report), report
    assert {one.org_id for one in report.wrong} == {ORG}
    assert code in codes(await audit(house, ORG))
    assert codes(await audit(house, "globex")) == []


async def test_a_version_that_redis_does_not_have_yet_is_no_contradiction(house: House) -> None:
    await house.credits(5)
    await pay(house, "r1")
    await sql("UPDATE ai_credits SET credits = credits + 1")(house)
    assert codes(await audit(house)) == []


async def test_without_redis_the_ledger_is_audited_and_the_rest_is_not_taken_for_right(house: House) -> None:
    await house.credits(5)
    away = Redis("redis://127.0.0.1:1", timeout_ms=100, connect_timeout_ms=100)
    away.start()
    for redis in (away, None):
        report = await Auditor(house.postgres, redis).audit()
        assert report.trouble is not None and report.wrong == ()
        [books] = report.orgs
        assert (books.balance_ucredits, books.held_ucredits, books.unposted_ucredits) == (5 * CREDIT, None, None)
    await away.close()


async def test_an_outbox_too_long_to_be_added_up_is_said_to_be(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ledger.redis_books.OUTBOX_MAX", 1)
    await house.credits(5)
    for number in range(2):
        await pay(house, f"r{number}")
        report = await audit(house)
        assert report.wrong == ()
        assert [one.code for one in report.remarks] == ["long_outbox"] * number

"""What plans bring, by the books: how much, to whom, and how often."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Plan
from gateway.ledger import books, grants
from gateway.ledger.grants import Facts, Period, period
from gateway.types import Entry
from tests.ledger.audit import books_are_right, entries
from tests.ledger.conftest import ORG, House
from tests.ledger.planned import CREDIT, HOUR_MS, at, give, insert, plan, pockets
from tests.waiting import until

DAY_MS = 24 * HOUR_MS
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe")
GRANTS = ("set_initial", "top_up", "reset", "add")


def ms(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def spoken(at_ms: int, zone: str = "UTC") -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(ZoneInfo(zone)).strftime("%Y-%m-%d %H:%M")


def facts(clock_ms: int, created_ms: int | None = None, noted: Period | None = None, plan: str | None = None) -> Facts:
    return Facts(True, plan, noted, created_ms, clock_ms)


def found(plan: Plan, clock_ms: int, created_ms: int | None = None) -> Period:
    current = period(plan, facts(clock_ms, created_ms))
    assert current is not None
    return current


def months(anchored: Plan, created: str, count: int, zone: str = "UTC") -> list[str]:
    """When the org's first months begin."""
    created_ms = ms(created, zone)
    begun = [found(anchored, created_ms, created_ms)]
    while len(begun) < count:
        begun.append(found(anchored, begun[-1].ends_ms, created_ms))
    return [spoken(one.starts_ms, zone) for one in begun]


# When periods begin


def test_months_of_an_org_created_on_a_31st_begin_on_the_last_day_of_shorter_ones() -> None:
    assert months(plan(period="month", anchor="created"), "2026-01-31 10:20:30", 4) == [
        "2026-01-31 10:20", "2026-02-28 10:20", "2026-03-31 10:20", "2026-04-30 10:20",
    ]  # fmt: skip


def test_months_of_an_org_created_on_a_29th_of_february_begin_on_every_29th_again() -> None:
    assert months(plan(period="month", anchor="created"), "2028-02-29 00:00", 3) == [
        "2028-02-29 00:00", "2028-03-29 00:00", "2028-04-29 00:00",
    ]  # fmt: skip
    assert months(plan(period="month", anchor="created"), "2028-12-29 00:00", 4)[2:] == [
        "2029-02-28 00:00", "2029-03-29 00:00",
    ]  # fmt: skip


def test_a_day_begins_at_the_hour_of_the_zone_whether_it_has_23_hours_or_25() -> None:
    daily = plan(period="day", zone="Europe/Berlin", anchor="06:00")
    for day, hours in (("2026-03-28 12:00", 23), ("2026-10-24 12:00", 25)):
        current = found(daily, ms(day, "Europe/Berlin"))
        assert spoken(current.starts_ms, "Europe/Berlin").endswith("06:00")
        assert current.ends_ms - current.starts_ms == hours * HOUR_MS
        assert found(daily, current.ends_ms).starts_ms == current.ends_ms


@given(
    st.sampled_from(["hour", "day", "week", "month"]),
    st.sampled_from(ZONES),
    st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),
    st.integers(0, 60),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_an_orgs_periods_begin_when_it_was_created_and_leave_no_gap(
    length: Literal["hour", "day", "week", "month"], zone: str, created: datetime, later: int
) -> None:
    own = plan(period=length, zone=zone, anchor="created")
    created_ms = int(created.timestamp() * 1000)
    first = found(own, created_ms, created_ms)
    assert first.starts_ms <= created_ms < first.ends_ms
    # In the minute that it was created in; an hour before where that hour comes twice.
    assert created_ms - first.starts_ms < HOUR_MS + 60_000
    some = [found(own, first.starts_ms + later * (first.ends_ms - first.starts_ms), created_ms)]
    for _ in range(3):
        some.append(found(own, some[-1].ends_ms, created_ms))
    assert all(earlier.ends_ms == following.starts_ms for earlier, following in pairwise(some))
    assert found(own, some[0].ends_ms - 1, created_ms) == some[0]


def test_an_org_created_by_a_clock_that_goes_ahead_was_created_now() -> None:
    own = plan(period="month", anchor="created")
    now_ms = ms("2026-05-10 12:00")
    current = found(own, now_ms, created_ms=now_ms + 5 * 60_000)
    assert spoken(current.starts_ms) == "2026-05-10 12:05"
    assert current == found(own, now_ms + DAY_MS, created_ms=now_ms + 5 * 60_000)


def test_plans_without_periods_have_none() -> None:
    for kind in ("none", "set_initial"):
        assert period(plan(kind), facts(0)) is None


# When something is due


def test_what_is_due_to_whom() -> None:
    noted = Period(0, HOUR_MS)
    running, over = facts(HOUR_MS - 1, 0, noted, "pro"), facts(HOUR_MS, 0, noted, "pro")
    absent = replace(over, present=False)
    for kind in ("top_up", "reset", "add"):
        one = plan(kind)
        assert not grants.is_due("pro", one, running)
        assert grants.is_due("pro", one, over)
        assert grants.is_due("team", one, running)
        assert grants.is_due("pro", one, facts(0))
        assert not grants.is_due("pro", one, absent)
        assert grants.is_due("pro", one, absent, provision=True)
    assert not grants.is_due("pro", plan("set_initial"), facts(0), provision=True)
    assert grants.is_due("pro", plan("set_initial"), absent, provision=True)
    assert not grants.is_due("pro", plan("none"), absent, provision=True)
    assert grants.is_due("pro", plan("none"), over)  # that there are no periods any more is noted


# What it brings


@pytest.mark.parametrize(
    ("kind", "left", "granted", "of_plan", "purchased"),
    [
        # Ten credits, `left` of them when the period ends, beside two that were purchased.
        ("reset", 3, [("expire", -3), ("grant", 10)], 10, 2),
        ("reset", 0, [("grant", 10)], 10, 2),
        ("add", 3, [("grant", 10)], 13, 2),
        ("top_up", 3, [("grant", 5)], 8, 2),
        ("top_up", 0, [("grant", 8)], 8, 2),
        ("top_up", 10, [("grant", 0)], 10, 2),
        # All of the plan's and one of the others.
        ("reset", -1, [("grant", 10)], 10, 1),
        ("top_up", -1, [("grant", 9)], 9, 1),
        # All, and a debt of three.
        ("reset", -5, [("grant", 10)], 7, 0),
        ("add", -5, [("grant", 10)], 7, 0),
        ("top_up", -5, [("grant", 13)], 10, 0),
    ],
)
async def test_what_a_new_period_brings(
    house: House, kind: str, left: int, granted: list[tuple[str, int]], of_plan: int, purchased: int
) -> None:
    postgres, one = house.postgres, plan(kind)
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", one, now_ms)
    await house.credits(2)
    await books.post(postgres, [Entry(ORG, "r1", "settle", (left - 10) * CREDIT)])
    before = len(await entries(postgres, ORG))
    await give(postgres, "pro", one, now_ms + HOUR_MS)
    assert [(kind, amount // CREDIT) for kind, amount in (await entries(postgres, ORG))[before:]] == granted
    assert await pockets(postgres) == (of_plan * CREDIT, purchased * CREDIT)
    await books_are_right(postgres)


async def test_a_period_brings_once_what_it_brings_however_many_ask(house: House) -> None:
    await insert(house.postgres)
    now_ms = (await at(house.postgres)).clock_ms
    for hour in range(3):
        asked = (give(house.postgres, "pro", plan(), now_ms + hour * HOUR_MS) for _ in range(20))
        states = await asyncio.gather(*asked)
        assert {state.ucredits for state in states} == {10 * CREDIT}
    kinds = [kind for kind, _ in await entries(house.postgres, ORG)]
    assert kinds.count("grant") == 3 and kinds.count("expire") == 2
    await books_are_right(house.postgres)


async def test_an_org_that_slept_gets_the_current_periods_credits_only(house: House) -> None:
    await insert(house.postgres)
    now_ms = (await at(house.postgres)).clock_ms
    for hour in (0, 7):
        await give(house.postgres, "team", plan("add", 20), now_ms + hour * HOUR_MS)
    assert [amount for kind, amount in await entries(house.postgres, ORG) if kind == "grant"] == [20 * CREDIT] * 2


@pytest.mark.parametrize("kind", ["top_up", "reset", "add"])
async def test_who_was_stopped_for_a_period_does_not_bring_it_back(house: House, kind: str) -> None:
    """It looked, stood still while others turned to the next period, and asks now for what it found."""
    await insert(house.postgres)
    stale = await at(house.postgres)
    after = await give(house.postgres, "pro", plan(kind), stale.clock_ms + HOUR_MS)
    assert await grants.turn(house.postgres, ORG, "pro", plan(kind), stale) == after
    assert (await grants.look(house.postgres, ORG)).period == found(plan(), stale.clock_ms + HOUR_MS)


@pytest.mark.parametrize("kind", ["top_up", "reset", "add"])
async def test_an_org_that_changes_plans_back_and_forth_gets_each_ones_credits_once(house: House, kind: str) -> None:
    await insert(house.postgres)
    now_ms = (await at(house.postgres)).clock_ms
    for name in ("pro", "team", "pro", "team", "trial", "pro"):
        one = plan("set_initial") if name == "trial" else plan(kind)
        facts = await at(house.postgres, now_ms)
        assert grants.is_due(name, one, facts)
        await grants.turn(house.postgres, ORG, name, one, facts)
    rows = await house.ledger()
    assert len([rid for rid, kind, _ in rows if kind == "grant"]) == 2
    assert (await grants.look(house.postgres, ORG)).plan == "pro"


async def test_a_plans_beginning_is_for_orgs_that_no_plan_has_given_anything(house: House) -> None:
    async def ask(name: str, one: Plan) -> None:
        facts = await grants.look(house.postgres, "fresh")
        await grants.turn(house.postgres, "fresh", name, one, replace(facts, present=False), provision=True)

    # Two users of one org with different plans, at once: each found that it has no row.
    await asyncio.gather(*(ask(name, plan("set_initial")) for name in ("trial", "pro", "trial", "pro")))
    assert [kind for _, kind, _ in await house.ledger("fresh")] == ["grant"]
    await house.postgres.rows("DELETE FROM ai_credits")
    await ask("pro", plan("set_initial"))
    assert (await books.read(house.postgres, ["fresh"]))["fresh"].ucredits == 0
    await books_are_right(house.postgres)


async def test_without_provision_an_org_without_a_row_gets_nothing(house: House) -> None:
    for kind in GRANTS:
        assert not (await give(house.postgres, "pro", plan(kind))).present
    assert await house.ledger() == []
    assert await house.postgres.rows("SELECT FROM gateway.account") == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"zone": "Europe/Berlin"}),
        ({"zone": "Pacific/Kiritimati"}, {"zone": "Pacific/Pago_Pago"}),
        ({}, {"anchor": "5"}),
        ({"anchor": "5"}, {}),
        ({"anchor": "created"}, {}),
        ({}, {"anchor": "created"}),
    ],
)
@pytest.mark.parametrize("created", ["2026-01-04 03:00", "2026-01-31 23:30", "2025-12-31 23:59:59"])
async def test_another_zone_or_anchor_brings_no_second_month(
    house: House, before: dict[str, Any], after: dict[str, Any], created: str
) -> None:
    """However its months are moved, in a year an org gets twelve months' credits; and half of one at most is paid twice
    or not at all."""
    await insert(house.postgres)
    created_ms = ms(created)
    await house.postgres.rows("UPDATE gateway.account SET created_at = to_timestamp($1 / 1000.0)", created_ms)
    now_ms, changed_ms, end_ms = created_ms, created_ms + 100 * DAY_MS, created_ms + 366 * DAY_MS
    while now_ms < end_ms:
        one = plan("add", period="month", **(before if now_ms < changed_ms else after))
        if grants.is_due("pro", one, await at(house.postgres, now_ms)):
            await give(house.postgres, "pro", one, now_ms)
        now_ms += DAY_MS
    times = [
        datetime.fromisoformat(rid.removeprefix("grant:pro:"))
        for rid, kind, _ in await house.ledger()
        if kind == "grant"
    ]
    assert all(later - earlier > timedelta(days=14) for earlier, later in pairwise(times))
    first, last = found(plan(period="month", **before), created_ms, created_ms), times[-1]
    assert times[0] == datetime.fromtimestamp(first.starts_ms / 1000, UTC)
    assert abs((last - times[0]) / timedelta(days=365.25 / 12) - (len(times) - 1)) <= 0.55


# What stays


async def test_what_is_held_or_may_be_owed_does_not_expire(house: House) -> None:
    """Ten of the plan: one held here, two that Redis may owe, three that a lost state of it may have owed."""
    postgres = house.postgres
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", plan(), now_ms)
    await books.beat(postgres, "i1")
    await books.raise_cap(postgres, ORG, 1, "b1", 3 * CREDIT // 2, 0, 60_000)
    await books.raise_cap(postgres, ORG, 1, "b2", CREDIT, 0, 60_000)
    await books.raise_cap(postgres, ORG, 2, "b2", CREDIT, 0, 60_000)
    taken = await books.take_hold(postgres, ORG, "r1", CREDIT, CREDIT, 0, instance="i1", lease_ms=60_000)
    assert (taken.status, taken.balance.set_aside_ucredits, taken.balance.cap_ucredits) == (
        "OK",
        4 * CREDIT,
        2 * CREDIT,
    )
    after = await give(postgres, "pro", plan(), now_ms + HOUR_MS)
    assert [amount for kind, amount in await entries(postgres, ORG) if kind == "expire"] == [-4 * CREDIT]
    assert after.ucredits == 16 * CREDIT
    await books_are_right(postgres)


async def test_a_cap_that_was_lowered_protects_no_more_than_is_owed(house: House) -> None:
    postgres = house.postgres
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", plan(), now_ms)
    state = await books.raise_cap(postgres, ORG, 1, "b1", 4 * CREDIT, 0, 60_000)
    assert state.cap_ucredits == 8 * CREDIT
    next_hour = await at(postgres, now_ms + HOUR_MS)
    after = await grants.turn(
        postgres, ORG, "pro", plan(), next_hour, owed_ucredits=CREDIT, lowered=(state.version, state.epoch, CREDIT)
    )
    assert after is not None and (after.cap_ucredits, after.ucredits) == (CREDIT, 11 * CREDIT)


async def test_nothing_is_granted_while_the_cap_was_lowered_in_an_older_state(house: House) -> None:
    """It has to be lowered again first: what it protects is not to expire."""
    postgres = house.postgres
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", plan(), now_ms)
    state = await books.raise_cap(postgres, ORG, 1, "b1", 4 * CREDIT, 0, 60_000)
    next_hour, lowered = await at(postgres, now_ms + HOUR_MS), (state.version - 1, 1, 0)
    assert await grants.turn(postgres, ORG, "pro", plan(), next_hour, lowered=lowered) is None
    assert (await books.read(postgres, [ORG]))[ORG] == state
    # No more than it was lowered to, it protects all that it ever will.
    lowered = (state.version - 1, 1, 8 * CREDIT)
    after = await grants.turn(postgres, ORG, "pro", plan(), next_hour, lowered=lowered)
    assert after is not None and (after.cap_ucredits, after.ucredits) == (8 * CREDIT, 18 * CREDIT)
    # Who asks for what was given already is answered.
    lowered = (state.version, 1, 0)
    assert await grants.turn(postgres, ORG, "pro", plan(), next_hour, lowered=lowered) == after


async def test_a_cap_that_was_lowered_in_another_epoch_stays(house: House) -> None:
    postgres = house.postgres
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", plan(), now_ms)
    state = await books.raise_cap(postgres, ORG, 1, "b1", 4 * CREDIT, 0, 60_000)
    lowered = (state.version, 2, 0)
    after = await grants.turn(postgres, ORG, "pro", plan(), await at(postgres, now_ms + HOUR_MS), lowered=lowered)
    assert after is not None and (after.cap_ucredits, after.ucredits) == (8 * CREDIT, 18 * CREDIT)


async def test_a_plan_whose_periods_are_gone_leaves_none_behind(house: House) -> None:
    await insert(house.postgres)
    assert (await give(house.postgres, "pro", plan())).period_ends_ms > 0
    after = await give(house.postgres, "trial", plan("set_initial"))
    assert (after.period_ends_ms, after.ucredits) == (0, 10 * CREDIT)
    assert not grants.is_due("trial", plan("set_initial"), await grants.look(house.postgres, ORG))


async def test_whoever_listens_hears_of_a_grant(house: House) -> None:
    heard: list[str] = []
    await insert(house.postgres)
    connected = asyncio.Event()
    house.postgres.listen({"gateway_credits": heard.append}, on_connect=connected.set)
    await connected.wait()
    await give(house.postgres, "pro", plan())
    await until(lambda: heard == [ORG])


async def test_what_nobody_has_told_of_is_noted_before_anything_expires(house: House) -> None:
    """Where no trigger tells: half of the plan's credits were taken by hand."""
    postgres = house.postgres
    await insert(postgres)
    now_ms = (await at(postgres)).clock_ms
    await give(postgres, "pro", plan(), now_ms)
    await postgres.rows("ALTER TABLE ai_credits DISABLE TRIGGER note_external_change")
    await postgres.rows("UPDATE ai_credits SET credits = credits - 5")
    assert await pockets(postgres) == (5 * CREDIT, 0)
    await give(postgres, "pro", plan(), now_ms + HOUR_MS)
    assert (await entries(postgres, ORG))[-3:] == [
        ("external", -5 * CREDIT),
        ("expire", -5 * CREDIT),
        ("grant", 10 * CREDIT),
    ]
    await books_are_right(postgres)

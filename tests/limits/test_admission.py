"""Admission on a real server: limits that no org owns, lost replies, cancellations, and what is given back."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest

from gateway import keys
from gateway.admission import Admission, Hold, counter_keys
from gateway.errors import StoreUnavailable
from gateway.types import Charge, Quote
from tests.ledger.faulty import FaultyRedis, Interrupted
from tests.limits.conftest import CREDIT, ORG, demand, session
from tests.limits.rooms import (
    ASKER,
    EVERYBODY,
    HOUR_MS,
    KEPT,
    PARALLEL,
    RPH,
    TPH,
    UPSTREAM,
    ask,
    connected,
    desk,
    refused,
    rules,
    spend,
    used,
    used_tokens,
)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[FaultyRedis]:
    async with connected(redis_url) as redis:
        yield redis


@pytest.fixture
def admission(redis: FaultyRedis) -> Admission:
    """Without a memory for denials."""
    return desk(redis, rules())


# Limits that no org owns.


async def test_a_shared_limit_is_one_for_all_orgs_and_stands_in_no_orgs_slot(
    admission: Admission, redis: FaultyRedis
) -> None:
    for number in range(4):
        principal = replace(ASKER, org_id=f"org{number}")
        async with admission.hold(f"r{number}", principal, (EVERYBODY,), Quote.flat(0)) as held:
            assert isinstance(held, Hold) == (number < 3)
            if isinstance(held, Hold):
                held.charge = KEPT
    assert [key.decode() for key in await redis.call("KEYS", "*:l:*")] == counter_keys(keys.SHARED, [EVERYBODY])


async def test_what_everybody_shares_is_judged_first_and_the_org_is_not_asked_when_it_is_refused(
    admission: Admission, redis: FaultyRedis
) -> None:
    await spend(admission, EVERYBODY)
    answer = await refused(admission, "r1", RPH, EVERYBODY)
    assert answer.details["limit"] == "everybody"
    assert await redis.call("EXISTS", *counter_keys(ORG, [RPH]), keys.account(ORG)) == 0


@pytest.mark.parametrize("why", ["limit", "credits"])
async def test_what_everybody_shares_is_given_back_when_the_org_is_refused(
    admission: Admission, redis: FaultyRedis, why: str
) -> None:
    await spend(admission, RPH)
    for number in range(10):
        if why == "limit":
            await refused(admission, f"r{number}", EVERYBODY, UPSTREAM, RPH)
        else:
            await refused(admission, f"r{number}", EVERYBODY, UPSTREAM, price=11 * CREDIT)
    assert await used(redis, EVERYBODY, UPSTREAM) == [0, 0]


async def test_what_everybody_shares_is_given_back_when_the_request_never_reached_its_upstream(
    admission: Admission, redis: FaultyRedis
) -> None:
    async with admission.hold("r1", ASKER, (EVERYBODY, UPSTREAM, RPH), Quote.flat(CREDIT)) as held:
        assert isinstance(held, Hold) and held.shared is not None
        assert [state.limit.name for state in held.states + held.shared.states] == ["rph", "everybody", "up"]
    assert await used(redis, EVERYBODY, UPSTREAM, RPH) == [0, 0, 0]


async def test_a_request_that_ends_keeps_its_count_of_what_is_shared_and_frees_its_place(
    admission: Admission, redis: FaultyRedis
) -> None:
    assert isinstance(await ask(admission, "r1", EVERYBODY, UPSTREAM, RPH), Hold)
    assert await used(redis, EVERYBODY, UPSTREAM, RPH) == [1, 0, 1]


async def test_a_shared_limit_alone_needs_nothing_of_the_org(admission: Admission, redis: FaultyRedis) -> None:
    assert isinstance(await ask(admission, "r1", UPSTREAM), Hold)
    assert await redis.call("EXISTS", keys.account(ORG)) == 0


async def test_the_leases_of_shared_places_are_renewed_too(admission: Admission, redis: FaultyRedis) -> None:
    slots = counter_keys(keys.SHARED, [UPSTREAM])[0]
    async with admission.hold("r1", ASKER, (UPSTREAM, PARALLEL), Quote.flat(0)) as held:
        assert isinstance(held, Hold) and held.shared is not None
        before = float(await redis.call("ZSCORE", slots, "r1"))
        while float(await redis.call("ZSCORE", slots, "r1")) <= before:
            await admission._leases.beat([held.shared])


@pytest.mark.parametrize("fault", ["away", "connection lost", "reply lost", "arrives late"])
async def test_whatever_fails_at_any_command_nothing_stays_taken(
    admission: Admission, redis: FaultyRedis, fault: str
) -> None:
    """Of the org's limits or of the shared ones; the tombstone knows where each estimate was taken."""
    demands = (EVERYBODY, UPSTREAM, TPH, PARALLEL, session(5, HOUR_MS, "one"))
    for command in itertools.count(1):
        redis.arm(command, fault)
        with suppress(StoreUnavailable):
            async with admission.hold(f"r{command}", ASKER, demands, Quote.flat(CREDIT)) as held:
                assert isinstance(held, Hold)
        met = redis.sent >= command
        late, redis.fault_at = redis.late, 0
        await admission.drain(5)
        redis.late = late
        await redis.let_late_ones_arrive()
        assert await used(redis, EVERYBODY, UPSTREAM, TPH, PARALLEL) == [0, 0, 0, 0], command
        account = await redis.call("HGETALL", keys.account(ORG))
        assert int(dict(zip(account[::2], account[1::2], strict=True)).get(b"h", 0)) == 0
        if not met:
            break
    assert command > 4


@pytest.mark.parametrize(("turns", "times"), [(0, 1), (1, 1), (3, 1), (0, 2), (40, 1)])
@pytest.mark.parametrize("denied", [False, True], ids=["admitted", "refused by the org"])
async def test_cancelled_in_any_wait_nothing_stays_taken(
    admission: Admission, redis: FaultyRedis, denied: bool, turns: int, times: int
) -> None:
    demands = (EVERYBODY, UPSTREAM, TPH, PARALLEL, *([RPH] if denied else []))
    if denied:
        await spend(admission, RPH)

    async def request(hold_id: str) -> None:
        async with admission.hold(hold_id, ASKER, demands, Quote.flat(CREDIT)):
            await asyncio.sleep(0)

    for wait in itertools.count(1):
        cancelled = await Interrupted(request(f"r{wait}"), wait, turns, times).run()
        await admission.drain(5)
        assert (admission.open_count, admission.settling.backlog_count) == (0, 0)
        assert await used(redis, EVERYBODY, UPSTREAM, TPH, PARALLEL) == [0, 0, 0, 0], wait
        if not cancelled:
            break
    assert wait > 3


# What is given back.


async def test_states_stand_in_the_order_of_the_demands_the_shadows_behind_them(admission: Admission) -> None:
    shadow = replace(TPH, limit=replace(TPH.limit, shadow=True))
    async with admission.hold("r1", ASKER, (shadow, PARALLEL, RPH), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        assert [(state.limit.name, state.used, state.remaining) for state in held.states] == [
            ("parallel", 0, 1),
            ("rph", 0, 2),
            ("tph", 0, 600),
        ]


async def test_a_shadow_that_was_not_taken_is_not_settled(admission: Admission, redis: FaultyRedis) -> None:
    shadow = replace(TPH, limit=replace(TPH.limit, limit=500, shadow=True))
    for number in range(3):
        async with admission.hold(f"r{number}", ASKER, (shadow, RPH), Quote.flat(0)) as held:
            assert isinstance(held, Hold)
            held.charge = used_tokens(390)
    assert await used(redis, shadow, RPH) == [390, 3]


async def test_an_admission_whose_reply_was_lost_leaves_no_estimate_behind(
    admission: Admission, redis: FaultyRedis
) -> None:
    async with admission.hold("before", ASKER, (TPH,), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        held.charge = used_tokens(100)
    redis.arm(1, "reply lost")
    with pytest.raises(StoreUnavailable):
        await ask(admission, "lost", TPH, PARALLEL)
    redis.arm(0, "")
    assert await used(redis, TPH, PARALLEL) == [500, 1]
    await admission.drain(5)
    assert await used(redis, TPH, PARALLEL) == [100, 0]


async def test_a_shadow_of_which_nobody_knows_whether_it_was_taken_is_left_to_its_window(
    admission: Admission, redis: FaultyRedis
) -> None:
    """It was not, and what others used of it stays."""
    shadow = replace(TPH, limit=replace(TPH.limit, shadow=True))
    await spend(admission, TPH)
    await ask(admission, "first", PARALLEL)  # the org is marked as active
    redis.arm(1, "reply lost")
    with pytest.raises(StoreUnavailable):
        await ask(admission, "lost", shadow, PARALLEL)
    redis.arm(0, "")
    await admission.drain(5)
    assert await used(redis, shadow, PARALLEL) == [800, 0]


async def test_an_admission_that_was_asked_twice_gives_everything_back(
    admission: Admission, redis: FaultyRedis
) -> None:
    """What it took itself fills the limit when it is judged again; it is given back all the same."""
    full = demand(400, HOUR_MS, 400, unit="tokens", name="full")
    hold = Hold("r1", ASKER, (full, PARALLEL), Quote.flat(0))
    assert await admission.take(hold) is None
    assert await admission.take(hold) is None
    assert [state.retry_ms > 0 for state in hold.states] == [True, False]
    await admission.give_back(hold)
    assert await used(redis, full, PARALLEL) == [0, 0]


@pytest.mark.parametrize(
    ("charge", "left"),
    [
        (None, [0, 0]),
        (KEPT, [1, 400]),
        (used_tokens(150), [1, 150]),
        (used_tokens(950), [1, 950]),
        (replace(used_tokens(150), at_least=True), [1, 400]),
        (replace(used_tokens(0), keep_requests=False), [0, 0]),
        (Charge(0, None, keep_requests=False, basis="released"), [0, 400]),
    ],
)
async def test_an_end_books_what_the_outcome_table_says(
    admission: Admission, redis: FaultyRedis, charge: Charge | None, left: list[int]
) -> None:
    async with admission.hold("r1", ASKER, (RPH, TPH), Quote.flat(0)) as held:
        assert isinstance(held, Hold)
        held.charge = charge
    assert await used(redis, RPH, TPH) == left

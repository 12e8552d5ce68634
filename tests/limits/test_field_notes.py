"""What went wrong in gateways like this one, as it was reported to them: each symptom once, on the real scripts.

Named after the public thread. Those that need a whole gateway to show are in tests/walk and tests/policies.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack

import pytest
from redis.crc import key_slot

from gateway import keys
from gateway.admission import Admission, Hold, account_keys, counter_keys
from gateway.types import Calendar, Demand, Quote, Refusal
from tests.limits.conftest import CREDIT, LEASE_MS, ORG, START_MS, Limiter, calendar, demand, gcra, session
from tests.limits.every import EVERY, another
from tests.limits.rooms import ASKER, KEPT, connected, desk, rules, used_tokens

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
RPM = demand(10, HOUR_MS, name="rpm")
TPM = demand(1_000, HOUR_MS, 100, unit="tokens", name="tpm")
PARALLEL = demand(4, 0, unit="concurrent", name="parallel")

FREE = Quote.flat(0)

numbers = itertools.count()
Fleet = Callable[[], Admission]


@pytest.fixture
async def fleet(redis_url: str) -> AsyncIterator[Fleet]:
    """Gateways of one fleet, each with a connection of its own."""
    async with AsyncExitStack() as stack:
        ready = [desk(await stack.enter_async_context(connected(redis_url)), rules()) for _ in range(4)]
        yield ready.pop


async def ask(gateway: Admission, hold_id: str, *demands: Demand, price: int = 0) -> bool:
    """A request that was admitted and has ended, or was not."""
    async with gateway.hold(hold_id, ASKER, demands, Quote.flat(price)) as held:
        if isinstance(held, Hold):
            held.charge = KEPT
        return isinstance(held, Hold)


async def storm(gateways: Sequence[Admission], count: int, *demands: Demand) -> int:
    """`count` requests at once, spread over the fleet; how many were admitted."""
    asked = (ask(gateways[number % len(gateways)], f"s{next(numbers)}", *demands) for number in range(count))
    return sum(await asyncio.gather(*asked))


# A. Limits that were wrong or leaked.


@pytest.mark.parametrize(
    "wanted", [RPM, gcra(1, HOUR_MS, 10), calendar(10, Calendar("month")), TPM], ids=lambda wanted: wanted.limit.kind
)
async def test_litellm_40291_bifrost_3547_apisix_12482_replicas_share_one_limit(fleet: Fleet, wanted: Demand) -> None:
    assert await storm([fleet(), fleet(), fleet()], 60, wanted) == 10


async def test_litellm_27900_16011_requests_in_flight_are_counted_over_all_workers(fleet: Fleet) -> None:
    one, two = fleet(), fleet()
    async with AsyncExitStack() as running:
        held = [
            await running.enter_async_context((one, two)[number % 2].hold(f"r{number}", ASKER, (PARALLEL,), FREE))
            for number in range(6)
        ]
    assert [isinstance(one, Hold) for one in held] == [True] * 4 + [False] * 2
    assert await ask(one, "after", PARALLEL)


async def test_any_llm_940_aisix_47_607_a_restarted_gateway_forgets_no_limit(fleet: Fleet) -> None:
    assert await storm([fleet()], 8, RPM) == 8
    assert await storm([fleet()], 8, RPM) == 2


@pytest.mark.parametrize(
    "wanted",
    [gcra(1, 1_000, 5), demand(5, MINUTE_MS), demand(500, MINUTE_MS, 100, unit="tokens")],
    ids=lambda wanted: wanted.limit.unit,
)
def test_spring_cloud_gateway_2412_gateways_whose_clocks_differ_refill_nothing_twice(
    limiter: Limiter, wanted: Demand
) -> None:
    """Time is the server's alone, and never goes back."""
    admitted = 0
    for number in range(40):
        limiter.skew_ms = (1_000, -1_000, 600_000)[number % 3]
        admitted += limiter.admit(f"r{number}", wanted).status == "OK"
    assert admitted == 5


async def test_litellm_18730_23775_parallel_calls_cannot_all_read_zero_tokens_and_pass(fleet: Fleet) -> None:
    """The estimate is taken with the admission: five calls of 663 do not get through a limit of 1000."""
    call = demand(1_000, HOUR_MS, 663, unit="tokens", name="tpm")
    assert await storm([fleet(), fleet()], 5, call) == 1


async def test_wso2_2932_a_token_limit_counts_the_tokens_that_were_reported(fleet: Fleet) -> None:
    """And not one for each request."""
    gateway, wanted = fleet(), demand(100, HOUR_MS, 1, unit="tokens", name="tpm")
    async with gateway.hold("r1", ASKER, (wanted,), FREE) as held:
        assert isinstance(held, Hold)
        held.charge = used_tokens(150)
    async with gateway.hold("r2", ASKER, (wanted,), FREE) as refused:
        assert isinstance(refused, Refusal)
        assert refused.details["used"] == 150


@pytest.mark.parametrize("name", [name for name in EVERY if name != "concurrent"])
def test_litellm_39309_a_call_refused_by_concurrency_burns_no_rpm(limiter: Limiter, name: str) -> None:
    slot = demand(1, 0, unit="concurrent", name="parallel")
    limiter.admit("running", slot)
    wanted = EVERY[name]
    for number in range(20):
        assert limiter.admit(f"r{number}", another(wanted, number), slot).status == "DENY"
    assert limiter.used(wanted) == (0,)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "concurrent"])
def test_tyk_3102_a_client_that_keeps_retrying_recovers_as_soon_as_one_that_waits(limiter: Limiter, name: str) -> None:
    wanted = EVERY[name]
    for number in range(3):
        limiter.admit(f"r{number}", another(wanted, number))
    told_ms = limiter.admit("first", another(wanted, 10)).retry_ms[0]
    begin_ms = limiter.now_ms
    for number in range(50):
        limiter.set_clock(begin_ms + told_ms * number // 50)
        assert limiter.admit(f"again{number}", another(wanted, 10)).status == "DENY"
    limiter.set_clock(begin_ms + told_ms)
    assert limiter.admit("last", another(wanted, 10)).status == "OK"


@pytest.mark.parametrize(
    "wanted",
    [demand(100, MINUTE_MS), demand(1_000, MINUTE_MS, 10, unit="tokens")],
    ids=lambda wanted: wanted.limit.unit,
)
def test_envoy_ratelimit_32_around_a_full_minute_the_limit_is_not_admitted_twice(
    limiter: Limiter, wanted: Demand
) -> None:
    limiter.set_clock(START_MS // MINUTE_MS * MINUTE_MS + MINUTE_MS - 1)
    first = sum(limiter.admit(f"a{number}", wanted).status == "OK" for number in range(120))
    limiter.wait(1)
    second = sum(limiter.admit(f"b{number}", wanted).status == "OK" for number in range(120))
    assert (first, second) == (100, 0)


def test_litellm_15066_14968_11961_all_keys_of_one_call_lie_in_one_slot(limiter: Limiter) -> None:
    principal = ASKER
    for owner in (ORG, keys.SHARED):
        hold = Hold("r1", principal, tuple(EVERY.values()), Quote.flat(CREDIT), owner=owner)
        names = [*account_keys(hold), *counter_keys(owner, hold.demands), keys.mirror(owner)]
        assert len({key_slot(name.encode()) for name in names}) == 1


def test_litellm_18953_what_a_limit_holds_can_be_seen_without_asking_for_any_of_it(limiter: Limiter) -> None:
    demands = list(EVERY.values())
    for number in range(2):
        limiter.admit(f"r{number}", *(another(one, number) for one in demands))
    before = limiter.dump()
    seen = limiter.peek(*demands)
    assert seen.used == (2, 200, 2, 2, 2, 2)
    assert limiter.dump() == before
    assert limiter.admit("r9", *demands).used == seen.used


# B. Requests in flight whose places were lost.


def test_litellm_20256_places_of_requests_that_never_ended_come_back_by_themselves(limiter: Limiter) -> None:
    slot = demand(3, 0, unit="concurrent", name="parallel")
    for number in range(3):
        assert limiter.admit(f"lost{number}", slot).status == "OK"
    limiter.wait(LEASE_MS)
    for number in range(3):
        assert limiter.admit(f"r{number}", slot).status == "OK"


def test_litellm_28160_a_busy_org_keeps_no_lost_place_alive(limiter: Limiter) -> None:
    """Each lease ends for itself: that the key is written all the time makes none of them longer."""
    slot = demand(3, 0, unit="concurrent", name="parallel")
    limiter.admit("lost", slot)
    for number in range(40):
        limiter.wait(1_000)
        assert limiter.admit(f"r{number}", slot).status == "OK"
        limiter.release(f"r{number}", slot)
    assert limiter.used(slot) == (0,)


async def test_litellm_27955_30020_a_cancelled_request_gives_its_place_back_once(fleet: Fleet) -> None:
    gateway, inside = fleet(), asyncio.Event()

    async def stream() -> None:
        async with gateway.hold("r1", ASKER, (PARALLEL,), Quote.flat(CREDIT)):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(stream())
    await inside.wait()
    task.cancel()
    await asyncio.wait({task})
    assert (gateway.open_count, gateway.settling.backlog_count) == (0, 0)
    async with AsyncExitStack() as running:
        held = [
            await running.enter_async_context(gateway.hold(f"n{number}", ASKER, (PARALLEL,), FREE))
            for number in range(5)
        ]
    assert [isinstance(one, Hold) for one in held] == [True] * 4 + [False]


def test_litellm_34732_parallel_turns_cannot_all_begin_a_session_of_their_own(limiter: Limiter) -> None:
    """New sessions are counted with the admission, not when the first turn has ended."""
    started = [limiter.admit(f"r{number}", session(3, HOUR_MS, f"s{number}")).status for number in range(5)]
    assert started == ["OK"] * 3 + ["DENY"] * 2

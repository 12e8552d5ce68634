"""How long a looked-up key is believed, and what a revoke does to lookups under way."""

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest

from gateway.errors import StoreUnavailable
from gateway.identity.key_cache import LOADS_MAX, NEGATIVE_ENTRIES_MAX, PROBE_MS, KeyCache, KeyRecord
from tests.identity.given import Gate, Time, until

TTL_MS, STALE_MS = 10_000, 60_000


def sha(number: int) -> bytes:
    return number.to_bytes(32, "big")


def record(number: int, plan: str = "pro", org_id: str = "acme") -> KeyRecord:
    return KeyRecord(f"key_{number}", org_id, plan, None, None)


class Store:
    """Stands for PostgreSQL: rows, an outage on demand, and an optional gate each lookup waits at.

    As in the real one, a lookup sees the rows as they are when it begins, however late its answer comes.
    """

    def __init__(self) -> None:
        self.rows: dict[bytes, KeyRecord] = {}
        self.away = False
        self.gate: Gate | None = None
        self.loads = 0

    async def load(self, sha256: bytes) -> KeyRecord | None:
        self.loads += 1
        found, away = self.rows.get(sha256), self.away
        if self.gate is not None:
            await self.gate()
        if away:
            raise StoreUnavailable
        return found


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def store() -> Store:
    store = Store()
    store.rows[sha(1)] = record(1)
    return store


@pytest.fixture
async def cache(store: Store, time: Time) -> AsyncIterator[KeyCache]:
    cache = KeyCache(store.load, ttl_ms=TTL_MS, stale_ms=STALE_MS, entries_max=3, monotonic_ms=time)
    yield cache
    await cache.close()


async def test_a_known_key_is_loaded_once_per_ttl(cache: KeyCache, store: Store, time: Time) -> None:
    assert await cache.get(sha(1)) == record(1)
    time.pass_ms(TTL_MS - 1)
    assert await cache.get(sha(1)) == record(1)
    assert store.loads == 1
    time.pass_ms(1)
    store.rows[sha(1)] = record(1, plan="trial")
    assert await cache.get(sha(1)) == record(1, plan="trial")
    assert store.loads == 2


async def test_an_unknown_key_is_remembered_for_one_second(cache: KeyCache, store: Store, time: Time) -> None:
    assert await cache.get(sha(9)) is None
    time.pass_ms(999)
    assert await cache.get(sha(9)) is None
    assert store.loads == 1
    store.rows[sha(9)] = record(9)
    time.pass_ms(1)
    assert await cache.get(sha(9)) == record(9)
    assert cache.unknown == 0


async def test_a_key_that_vanished_from_the_store_is_refused_after_the_ttl(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    del store.rows[sha(1)]
    time.pass_ms(TTL_MS)
    assert await cache.get(sha(1)) is None
    store.away = True
    time.pass_ms(2_000)
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(1))


async def test_while_the_store_is_away_a_stale_key_is_served_for_its_bound(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    store.away = True
    time.pass_ms(TTL_MS + STALE_MS - 1)
    assert await cache.get(sha(1)) == record(1)
    time.pass_ms(1)
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(1))


async def test_while_the_store_is_away_an_unseen_key_is_neither_accepted_nor_called_invalid(
    cache: KeyCache, store: Store
) -> None:
    store.away = True
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(1))
    store.away = False
    assert await cache.get(sha(1)) == record(1)


async def test_once_the_store_is_known_to_be_away_stale_keys_are_served_without_waiting_for_it(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    store.away = True
    time.pass_ms(TTL_MS)
    await cache.get(sha(1))  # finds out
    store.gate = Gate()  # from now on a lookup hangs
    assert await cache.get(sha(1)) == record(1)
    time.pass_ms(PROBE_MS)
    for _ in range(5):
        assert await cache.get(sha(1)) == record(1)
    await until(lambda: store.gate is not None and store.gate.begun == 1)
    assert store.loads == 3  # the first, the one that found out, one probe


async def test_while_the_store_is_away_one_lookup_a_second_probes_it_whatever_the_number_of_keys(
    cache: KeyCache, store: Store, time: Time
) -> None:
    store.rows[sha(2)] = record(2)
    await cache.get(sha(1))
    await cache.get(sha(2))
    store.away = True
    time.pass_ms(TTL_MS)
    await cache.get(sha(1))  # finds out
    loads = store.loads
    for _ in range(3):
        time.pass_ms(PROBE_MS)
        for number in (1, 2, 1, 2):
            assert await cache.get(sha(number)) == record(number)
        await until(lambda: not cache._running)
    assert store.loads == loads + 3


async def test_a_failed_probe_is_nobodys_unhandled_error(cache: KeyCache, store: Store, time: Time) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    await cache.get(sha(1))
    store.away = True
    time.pass_ms(TTL_MS)
    await cache.get(sha(1))
    time.pass_ms(PROBE_MS)
    await cache.get(sha(1))
    await until(lambda: not cache._running)
    await asyncio.sleep(0)
    gc.collect()
    assert reported == []


async def test_a_probe_notices_that_the_store_is_back(cache: KeyCache, store: Store, time: Time) -> None:
    await cache.get(sha(1))
    store.away = True
    time.pass_ms(TTL_MS)
    await cache.get(sha(1))
    store.away = False
    store.rows[sha(1)] = record(1, plan="trial")
    time.pass_ms(PROBE_MS)
    assert await cache.get(sha(1)) == record(1)
    await until(lambda: store.loads == 3)
    await until(lambda: not cache._running)
    assert await cache.get(sha(1)) == record(1, plan="trial")


async def test_many_requests_with_one_key_make_one_lookup(cache: KeyCache, store: Store) -> None:
    store.gate = Gate()
    waiting = [asyncio.create_task(cache.get(sha(1))) for _ in range(50)]
    await until(lambda: store.gate is not None and store.gate.begun == 1)
    store.gate.open.set()
    assert await asyncio.gather(*waiting) == [record(1)] * 50
    assert store.loads == 1


async def test_a_cancelled_request_does_not_cancel_the_lookup_others_wait_for(cache: KeyCache, store: Store) -> None:
    store.gate = Gate()
    first = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 1)
    second = asyncio.create_task(cache.get(sha(1)))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    store.gate.open.set()
    assert await second == record(1)
    assert store.loads == 1


async def test_a_lookup_whose_every_waiter_left_ends_quietly_and_is_remembered(cache: KeyCache, store: Store) -> None:
    store.gate = Gate()
    only = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 1)
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    store.gate.open.set()
    await until(lambda: cache.known == 1)
    assert await cache.get(sha(1)) == record(1)
    assert store.loads == 1


async def test_a_failed_lookup_reaches_every_waiter(cache: KeyCache, store: Store) -> None:
    store.gate, store.away = Gate(), True
    waiting = [asyncio.create_task(cache.get(sha(1))) for _ in range(3)]
    await until(lambda: store.loads == 1)
    store.gate.open.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [StoreUnavailable] * 3


async def test_a_revoked_key_is_refused_at_once(cache: KeyCache, store: Store) -> None:
    await cache.get(sha(1))
    del store.rows[sha(1)]
    cache.drop(sha(1))
    assert await cache.get(sha(1)) is None


async def test_a_revoked_key_is_not_served_stale_while_the_store_is_away(cache: KeyCache, store: Store) -> None:
    await cache.get(sha(1))
    store.away = True
    cache.drop(sha(1))
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(1))


async def test_a_key_revoked_during_its_lookup_is_refused_and_not_cached_anew(cache: KeyCache, store: Store) -> None:
    # BerriAI/litellm #33565: the request in flight put the old object back.
    store.gate = Gate()
    before = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 1)
    del store.rows[sha(1)]
    cache.drop(sha(1))
    after = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 2)  # does not join the outdated lookup
    store.gate.open.set()
    assert await before is None
    assert await after is None
    assert cache.known == 0
    assert await cache.get(sha(1)) is None


@pytest.mark.parametrize("announce", ["drop_all", "drop_org"])
async def test_any_announcement_during_a_lookup_makes_its_waiters_look_again(
    cache: KeyCache, store: Store, announce: str
) -> None:
    store.gate = Gate()
    waiting = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 1)
    store.rows[sha(1)] = record(1, plan="trial")
    if announce == "drop_all":
        cache.drop_all()
    else:
        cache.drop_org("acme")
    store.gate.open.set()
    assert await waiting == record(1, plan="trial")
    assert await cache.get(sha(1)) == record(1, plan="trial")
    assert store.loads == 2


async def test_a_key_dropped_again_and_again_ends_in_a_refusal_not_in_a_loop(time: Time) -> None:
    loads = 0

    async def load(sha256: bytes) -> KeyRecord | None:
        nonlocal loads
        loads += 1
        dropped.drop(sha256)
        return record(1)

    dropped = KeyCache(load, ttl_ms=TTL_MS, stale_ms=STALE_MS, entries_max=3, monotonic_ms=time)
    with pytest.raises(StoreUnavailable):
        await dropped.get(sha(1))
    assert loads == 4
    assert dropped.known == 0


async def test_a_changed_org_is_looked_up_again_and_others_are_not(cache: KeyCache, store: Store) -> None:
    store.rows[sha(2)] = record(2, org_id="other")
    await cache.get(sha(1))
    await cache.get(sha(2))
    store.rows[sha(1)] = record(1, plan="enterprise")
    cache.drop_org("acme")
    assert await cache.get(sha(1)) == record(1, plan="enterprise")
    assert await cache.get(sha(2)) == record(2, org_id="other")
    assert store.loads == 3


async def test_after_a_lost_channel_every_key_is_asked_for_again(cache: KeyCache, store: Store) -> None:
    await cache.get(sha(1))
    await cache.get(sha(9))
    del store.rows[sha(1)]
    store.rows[sha(9)] = record(9)
    cache.drop_all()
    assert await cache.get(sha(1)) is None
    assert await cache.get(sha(9)) == record(9)


async def test_a_lost_channel_does_not_lock_everybody_out_while_the_store_is_away(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    store.away = True
    cache.drop_all()
    assert await cache.get(sha(1)) == record(1)
    time.pass_ms(20_000)
    assert await cache.get(sha(1)) == record(1)


async def test_a_key_revoked_during_an_outage_is_refused_as_soon_as_the_channel_is_back(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    store.away = True
    time.pass_ms(TTL_MS)
    assert await cache.get(sha(1)) == record(1)
    store.away = False
    del store.rows[sha(1)]
    cache.drop_all()
    assert await cache.get(sha(1)) is None


async def test_the_least_recently_used_key_makes_room(cache: KeyCache, store: Store) -> None:
    for number in (1, 2, 3):
        store.rows[sha(number)] = record(number)
        await cache.get(sha(number))
    await cache.get(sha(1))
    store.rows[sha(4)] = record(4)
    await cache.get(sha(4))
    assert cache.known == 3
    loads = store.loads
    await cache.get(sha(1))
    assert store.loads == loads
    await cache.get(sha(2))
    assert store.loads == loads + 1


async def test_a_flood_of_random_keys_pushes_out_no_good_one(cache: KeyCache, store: Store) -> None:
    await cache.get(sha(1))
    for number in range(1_000, 1_000 + NEGATIVE_ENTRIES_MAX + 50):
        await cache.get(sha(number))
    assert cache.unknown == NEGATIVE_ENTRIES_MAX
    loads = store.loads
    assert await cache.get(sha(1)) == record(1)
    assert store.loads == loads


async def test_lookups_in_flight_are_bounded_and_known_keys_do_not_notice(
    cache: KeyCache, store: Store, time: Time
) -> None:
    await cache.get(sha(1))
    store.gate = Gate()
    flood = [asyncio.create_task(cache.get(sha(100 + number))) for number in range(LOADS_MAX)]
    await until(lambda: store.gate is not None and store.gate.begun == LOADS_MAX)
    with pytest.raises(StoreUnavailable, match="Too many"):
        await cache.get(sha(9))
    assert await cache.get(sha(1)) == record(1)
    time.pass_ms(TTL_MS)
    assert await cache.get(sha(1)) == record(1)  # stale, since no lookup is to be had
    store.gate.open.set()
    assert await asyncio.gather(*flood) == [None] * LOADS_MAX
    assert await cache.get(sha(9)) is None


async def test_dropping_keys_does_not_lift_the_bound_on_lookups(cache: KeyCache, store: Store) -> None:
    store.gate = Gate()
    flood = [asyncio.create_task(cache.get(sha(100 + number))) for number in range(LOADS_MAX)]
    await until(lambda: store.gate is not None and store.gate.begun == LOADS_MAX)
    cache.drop_all()
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(9))
    store.gate.open.set()
    await asyncio.gather(*flood)


async def test_an_error_that_is_no_outage_reaches_the_caller_and_leaves_nothing_behind(time: Time) -> None:
    async def load(sha256: bytes) -> KeyRecord | None:
        raise ZeroDivisionError

    cache = KeyCache(load, ttl_ms=TTL_MS, stale_ms=STALE_MS, entries_max=3, monotonic_ms=time)
    with pytest.raises(ZeroDivisionError):
        await cache.get(sha(1))
    assert (cache.known, cache.unknown, len(cache._running), len(cache._joinable)) == (0, 0, 0, 0)


async def test_closing_ends_lookups_and_tells_their_waiters(cache: KeyCache, store: Store) -> None:
    store.gate = Gate()
    waiting = asyncio.create_task(cache.get(sha(1)))
    await until(lambda: store.loads == 1)
    await cache.close()
    with pytest.raises(StoreUnavailable):
        await waiting
    assert not cache._running


async def test_a_ttl_of_zero_asks_every_time(store: Store, time: Time) -> None:
    cache = KeyCache(store.load, ttl_ms=0, stale_ms=0, entries_max=3, monotonic_ms=time)
    await cache.get(sha(1))
    await cache.get(sha(1))
    assert store.loads == 2
    store.away = True
    with pytest.raises(StoreUnavailable):
        await cache.get(sha(1))

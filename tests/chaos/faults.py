"""What can go wrong, one at a time. Each fault is over, and its effect undone, when its function returns."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

from tests.chaos.world import LEASE_S, World

Fault = Callable[[World, random.Random], Awaitable[None]]


async def gateway_killed(world: World, dice: random.Random) -> None:
    seat = dice.choice(world.seats)
    await seat.kill()
    await asyncio.sleep(dice.uniform(0.1, 1.5))
    await seat.start()


async def gateway_restarted(world: World, dice: random.Random) -> None:
    """As a rollout does it: it ends in its own time, its streams are cut, another one takes its place."""
    seat = dice.choice(world.seats)
    await seat.stop()
    await seat.start()


async def gateway_stopped(world: World, dice: random.Random) -> None:
    """SIGSTOP, sometimes for longer than a lease: its holds are swept, its settles come late."""
    seat = dice.choice(world.seats)
    seat.signal(signal.SIGSTOP)
    await asyncio.sleep(dice.choice((0.5, LEASE_S + 1.5)))
    seat.signal(signal.SIGCONT)


async def redis_killed(world: World, dice: random.Random) -> None:
    await world.stores.kill_redis(dice.uniform(0.1, 1.5))


async def redis_flushed(world: World, dice: random.Random) -> None:
    await world.stores.redis.do("FLUSHALL")


async def scripts_flushed(world: World, dice: random.Random) -> None:
    await world.stores.redis.do("SCRIPT", "FLUSH")


async def redis_full(world: World, dice: random.Random) -> None:
    await world.stores.redis.do("CONFIG", "SET", "maxmemory", 1)
    try:
        await asyncio.sleep(dice.uniform(0.2, 1.5))
    finally:
        await world.stores.redis.do("CONFIG", "SET", "maxmemory", 0)


async def redis_stalled(world: World, dice: random.Random) -> None:
    relay = dice.choice(world.stores.redis_relays)
    relay.freeze()
    await asyncio.sleep(dice.choice((0.2, 1.0, LEASE_S + 1)))
    relay.thaw()


async def redis_cut_off(world: World, dice: random.Random) -> None:
    relay = dice.choice(world.stores.redis_relays)
    await relay.close()
    await asyncio.sleep(dice.uniform(0.1, 2))
    await relay.open()


async def postgres_stopped(world: World, dice: random.Random) -> None:
    await world.stores.stop_postgres(dice.uniform(0.1, 2))


async def postgres_killed(world: World, dice: random.Random) -> None:
    await world.stores.kill_postgres(dice.uniform(0.1, 2))


async def postgres_backends_ended(world: World, dice: random.Random) -> None:
    await world.stores.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")


async def postgres_stalled(world: World, dice: random.Random) -> None:
    relay = dice.choice(world.stores.postgres_relays)
    relay.freeze()
    await asyncio.sleep(dice.choice((0.3, 1.5, LEASE_S + 1)))
    relay.thaw()


async def credits_locked(world: World, dice: random.Random) -> None:
    """Somebody's long transaction on the application's table."""
    await world.stores.sql(
        f"DO $$ BEGIN LOCK ai_credits IN EXCLUSIVE MODE; PERFORM pg_sleep({dice.uniform(0.2, 1.5)}); END $$"
    )


#: After these Redis may have forgotten what it was told.
LOSSES = frozenset(("redis_killed", "redis_flushed"))
#: Whom a fault concerns, by the first word of its name; two at a time never concern the same.
SUBJECTS = {"gateway": "gateway", "redis": "redis", "scripts": "redis", "postgres": "postgres", "credits": "postgres"}


def subject(name: str) -> str:
    return SUBJECTS[name.partition("_")[0]]


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        gateway_killed,
        gateway_restarted,
        gateway_stopped,
        redis_killed,
        redis_flushed,
        scripts_flushed,
        redis_full,
        redis_stalled,
        redis_cut_off,
        postgres_stopped,
        postgres_killed,
        postgres_backends_ended,
        postgres_stalled,
        credits_locked,
    )
}

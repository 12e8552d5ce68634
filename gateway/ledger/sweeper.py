"""Ending the holds of gateways that died, finding outboxes that nobody carries, lowering caps that have become too
large, and letting go of orgs that are idle.

Every gateway sweeps every active org. `orphan.lua` looks at the lease again before it acts, so sweeping twice, or
while the owner comes back, ends a hold once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from gateway import keys, limits
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger import books
from gateway.stores import Postgres, Redis, Script

#: An org without holds, without outbox and without a request for so long leaves the list of active orgs.
IDLE_AFTER_S = 600
SWEEP_BATCH_MAX = 200
#: Orgs whose state is asked for in one round trip.
ORGS_AT_ONCE = 200

log = structlog.get_logger("gateway.sweeper")


@dataclass(frozen=True, slots=True)
class SweeperPowers:
    """What the sweeper needs of others. Those that are awaited raise StoreUnavailable when it could not be done."""

    #: (org): it has entries to post.
    mark_dirty: Callable[[str], None]
    #: (org): Redis has its state as PostgreSQL has it now.
    refresh: Callable[[str], Awaitable[None]]
    #: (org): Redis may owe nothing for it any more; False: it is not idle after all.
    retire: Callable[[str], Awaitable[bool]]
    #: (orgs): Redis may owe no more for them than suits what they have now. Raises nothing.
    trim: Callable[[Sequence[str]], Awaitable[None]]
    #: (org): its balance was changed past Redis.
    changed: Callable[[str], None]


class Sweeper:
    """Sweeps every `sweep_ms`."""

    def __init__(
        self,
        redis: Redis,
        postgres: Postgres,
        powers: SweeperPowers,
        *,
        sweep_ms: int,
        mirror_ttl_s: int,
        on_expiry: str,
    ) -> None:
        self._redis = redis
        self._postgres = postgres
        self._powers = powers
        self._sweep_s = sweep_ms / 1000
        self._mirror_ttl_s = mirror_ttl_s
        self._on_expiry = on_expiry
        self._orphan = Script("orphan", limits.script_text("orphan"))
        self._forget = Script("forget", limits.script_text("forget"))
        #: Holds ended by this process since it started.
        self.swept_count = 0

    async def run(self) -> None:
        while True:
            for sweep in (self.sweep, self.sweep_postgres):
                try:
                    await sweep()
                except StoreUnavailable as exc:
                    log.debug("sweep put off", error=str(exc))  # the connection's own log tells of the outage
            await asyncio.sleep(self._sweep_s)

    async def sweep_postgres(self) -> int:
        """Every hold in PostgreSQL whose lease ran out has ended; returns how many. Raises StoreUnavailable."""
        count = 0
        while True:
            ended = await books.sweep_holds(self._postgres, self._on_expiry)
            for org_id, request_id, _ in ended:
                log.warning("hold of a lost gateway ended", org=org_id, hold=request_id, by=self._on_expiry)
                self._powers.changed(org_id)
            count += len(ended)
            self.swept_count += len(ended)
            if len(ended) < books.SWEEP_MAX:
                return count

    async def sweep(self) -> int:
        """Every hold whose lease ran out has ended, but for those in a part of a cluster that is away; returns how
        many. Raises StoreUnavailable when nobody tells which orgs are active."""
        seconds, micros = await self._redis.call("TIME")
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        active = _pairs(await self._redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1, "WITHSCORES"))
        counts = [
            await self._sweep_some(active[at : at + ORGS_AT_ONCE], now_ms) for at in range(0, len(active), ORGS_AT_ONCE)
        ]
        self.swept_count += sum(counts)
        return sum(counts)

    async def _sweep_some(self, orgs: Sequence[tuple[bytes, bytes]], now_ms: int) -> int:
        """One round trip tells what is to be done for all of `orgs`."""
        ended = await asyncio.gather(*(self._sweep_org(org.decode(), score, now_ms) for org, score in orgs))
        await self._powers.trim([org.decode() for org, _ in orgs])
        return sum(ended)

    async def _sweep_org(self, org_id: str, score: bytes, now_ms: int) -> int:
        try:
            due, has_outbox, has_holds = await self._look_at(org_id, now_ms)
            count = await self._end_all(org_id, due, now_ms)
            if not (has_outbox or due or has_holds) and float(score) < now_ms - IDLE_AFTER_S * 1000:
                await self._forget_idle(org_id, score)
        except StoreRefused as exc:
            # Somebody else's value under our name: a matter for a person, and for this org alone.
            log.error("an org cannot be swept", org=org_id, error=str(exc))
            return 0
        except StoreUnavailable as exc:
            # Its part of a cluster is away: the others are swept, and it with the next sweep.
            log.debug("sweep of an org put off", org=org_id, error=str(exc))
            return 0
        if has_outbox or due:
            self._powers.mark_dirty(org_id)
        return count

    async def _forget_idle(self, org_id: str, score: bytes) -> None:
        if await self._powers.retire(org_id):
            await self._redis.run(self._forget, [keys.ACTIVE_ORGS], [org_id, score])

    async def _end_all(self, org_id: str, due: list[bytes], now_ms: int) -> int:
        """However many holds a lost gateway has left: until fewer than a batch of them are due."""
        if due:
            # What they were charged may be in PostgreSQL alone. Without that balance, what they give up could be spent.
            await self._powers.refresh(org_id)
        count = 0
        while due:
            ended = sum([await self._end(org_id, request_id.decode()) for request_id in due])
            count += ended
            if len(due) < SWEEP_BATCH_MAX or ended == 0:
                break
            due = await self._due(org_id, now_ms)
        return count

    async def _due(self, org_id: str, now_ms: int) -> list[bytes]:
        due: list[bytes] = await self._redis.call(
            "ZRANGEBYSCORE", keys.deadlines(org_id), "-inf", now_ms, "LIMIT", 0, SWEEP_BATCH_MAX
        )
        return due

    async def _look_at(self, org_id: str, now_ms: int) -> tuple[list[bytes], bool, bool]:
        due, outbox, holds = await asyncio.gather(
            self._due(org_id, now_ms),
            self._redis.call("EXISTS", keys.outbox(org_id)),
            self._redis.call("EXISTS", keys.holds(org_id)),
        )
        return due, bool(outbox), bool(holds)

    async def _end(self, org_id: str, request_id: str) -> int:
        verdict = await self._redis.run(
            self._orphan,
            [
                keys.account(org_id),
                keys.holds(org_id),
                keys.deadlines(org_id),
                keys.outbox(org_id),
                keys.tombstone(org_id, request_id),
                keys.mirror(org_id),
            ],
            [request_id, self._on_expiry, limits.mirror_ttl_s(self._mirror_ttl_s)],
        )
        if verdict != b"OK":
            return 0
        log.warning("hold of a lost gateway ended", org=org_id, hold=request_id, by=self._on_expiry)
        return 1


def _pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))

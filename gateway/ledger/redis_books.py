"""What Redis has of an org's money, read in one step: for the audit."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway import keys, limits
from gateway.stores import INCARNATION, Redis, Reply, Script

#: So many entries Redis can add up without keeping others waiting.
OUTBOX_MAX = 50_000

_AUDIT = Script("audit", limits.script_text("audit"))


@dataclass(frozen=True, slots=True)
class State:
    """An account: PostgreSQL's state as of `version`, and what only Redis knows. Amounts are micro-credits."""

    balance: int
    version: int
    set_aside: int
    cap: int
    epoch: int
    period_ends_ms: int
    birth: str
    unposted: int
    held: int


@dataclass(frozen=True, slots=True)
class RedisBooks:
    """state: None where there is none, or one that will be built anew before it is used (`gone`)."""

    state: State | None
    gone: bool
    holds: int
    holds_ucredits: int
    #: For how long the oldest lease is over, by Redis's clock; below zero: it is not; None: there is no lease.
    overdue_ms: int | None
    entries: int
    #: None: too many to be added up.
    entries_ucredits: int | None
    #: How long the oldest entry waits already; None: there is none.
    waits_ms: int | None
    mirror: str | None
    #: Request and what is wrong with its hold, as limits/audit.lua names it.
    troubles: tuple[tuple[str, str], ...]


async def read_redis_books(redis: Redis, org_id: str) -> RedisBooks:
    """Raises StoreUnavailable, as StoreRefused when one of the org's keys is somebody else's."""
    names = (keys.account, keys.holds, keys.deadlines, keys.outbox, keys.mirror)
    args: limits.Row = [keys.tombstone(org_id, ""), OUTBOX_MAX, INCARNATION]
    now, state, holds, held, lease, entries, unposted, entry, mirror, *troubles = await redis.run(
        _AUDIT, [name(org_id) for name in names], args
    )
    now_ms = int(now)
    return RedisBooks(
        state=_state(state) if len(state) > 1 else None,
        gone=len(state) == 1,
        holds=int(holds),
        holds_ucredits=int(held),
        overdue_ms=now_ms - int(float(lease)) if lease else None,
        entries=int(entries),
        entries_ucredits=int(unposted) if unposted else None,
        waits_ms=now_ms - int(entry.split(b"-")[0]) if entry else None,
        mirror=mirror.decode("latin-1") if mirror else None,
        troubles=tuple(
            (rid.decode("utf-8", "replace"), trouble.decode())
            for trouble, rid in zip(troubles[::2], troubles[1::2], strict=True)
        ),
    )


def _state(fields: Sequence[Reply]) -> State:
    balance, version, set_aside, cap, epoch, period_ends, birth, unposted, held = fields
    return State(
        balance=int(balance),
        version=int(version),
        set_aside=int(set_aside),
        cap=int(cap),
        epoch=int(epoch),
        period_ends_ms=int(period_ends),
        birth=birth.decode(),
        unposted=int(unposted),
        held=int(held),
    )

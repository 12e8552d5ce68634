"""What Redis says of limits now. Takes nothing and changes nothing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway import keys, limits
from gateway.admission import Hold, counter_keys
from gateway.admission.states import session_known, states_of
from gateway.stores import Redis, Script
from gateway.types import Demand, Limit, Principal, Quote

#: How many keys of the server are looked at for one org's counters, and how many counters of one limit are read.
SCANNED_MAX = 1_000_000
READ_MAX = 1_000
_SCAN_COUNT = 1_000

_PEEK = Script("peek", limits.script_text("peek"))
#: As a script with a key, it goes to the server of a cluster that has the org's slot.
_SCAN = Script("scan", "return redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3])")
_NOBODY = Principal("", "", None, None, "")


async def peek(redis: Redis, owner: str, demands: Sequence[Demand]) -> Hold:
    """What an admission of `demands` would find: `states`, `judged_at_us`, `session_known`. One call; shared limits and
    an org's own are two. Raises StoreUnavailable."""
    hold = Hold("peek", _NOBODY, tuple(demands), Quote.flat(0), owner=owner)
    now_ms = time.time_ns() // 1_000_000
    args: limits.Row = []
    for demand in hold.demands:
        args += limits.row(demand, now_ms)
    reply = await redis.run(_PEEK, [keys.account(owner), *counter_keys(owner, hold.demands)], args)
    numbers = [int(value) for value in reply[1:]]
    hold.judged_at_us = int(reply[0])
    hold.states, hold.session_known = states_of(hold, numbers, admitted=False), session_known(hold, numbers)
    return hold


@dataclass(frozen=True, slots=True)
class Live:
    """The counters of one limit that are there now."""

    count: int
    #: Subject and what is used of it, the fullest first.
    fullest: tuple[tuple[str, int], ...]


async def live_counters(
    redis: Redis, owner: str, wanted: Sequence[Limit], fullest_max: int
) -> tuple[dict[str, Live], bool]:
    """The counters of each limit by its name; and whether all keys were looked at. Raises StoreUnavailable."""
    prefixes = {keys.counter(owner, limits.counter_name(Demand(limit, "", 0))): limit for limit in wanted}
    subjects: dict[str, set[str]] = {limit.name: set() for limit in wanted}
    cursor, looked_at = b"0", 0
    pattern = f"{keys.counter(owner, '')}*"
    while True:
        cursor, found = await redis.run(_SCAN, [keys.account(owner)], [cursor, pattern, _SCAN_COUNT])
        looked_at += _SCAN_COUNT
        for key in found:
            for prefix, limit in prefixes.items():
                name = key.decode()
                if name == prefix or name.startswith(f"{prefix}:"):
                    subjects[limit.name].add(name[len(prefix) + 1 :])
        if cursor == b"0" or looked_at >= SCANNED_MAX:
            break
    live = {limit.name: await _read(redis, owner, limit, subjects[limit.name], fullest_max) for limit in wanted}
    return live, cursor == b"0"


async def _read(redis: Redis, owner: str, limit: Limit, subjects: set[str], fullest_max: int) -> Live:
    member = keys.digest("") if limit.unit == "sessions" else ""
    demands = [Demand(limit, subject, 0, member) for subject in sorted(subjects)[:READ_MAX]]
    states = (await peek(redis, owner, demands)).states if demands else ()
    used = sorted(
        ((demand.subject, state.used) for demand, state in zip(demands, states, strict=True)),
        key=lambda pair: (-pair[1], pair[0]),
    )
    return Live(len(subjects), tuple(used[:fullest_max]))

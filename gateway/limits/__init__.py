"""Limit kinds and the Lua scripts around them: pure knowledge, no I/O.

A kind is one `.py` (how a Demand becomes a row of the script, and a counter that decides alike in this process) and one
`.lua` (how the server judges it). Adding one: write the pair, add a line to KINDS. `script_text` joins `prelude.lua`,
every kind and one loop (`admit`, `settle`, ...) into the text whose SHA-1 Redis knows it by.
"""

import random
from functools import cache, lru_cache
from importlib.resources import files

from gateway.limits import calendar, concurrent, gcra, sliding
from gateway.limits.kind import Counter, Kind
from gateway.limits.memory import key_bytes_max
from gateway.types import Balance, Demand, Limit

KINDS: dict[str, Kind] = {
    "sliding": sliding.SLIDING,
    "gcra": gcra.GCRA,
    "calendar": calendar.CALENDAR,
    "concurrent": concurrent.CONCURRENT,
}

#: The scripts that loop over the kinds, by file name.
LOOPS = ("admit", "settle", "renew", "peek")
#: The scripts that only handle credits and sessions.
PLAIN = ("install", "applied", "orphan", "extend", "lower", "confirm", "forget", "session", "audit")

#: One row of a script: algorithm, cost, capacity, and what the kind adds.
Row = list[str | int | bytes]

#: Policies have few limits; orgs with limits of their own may have many.
_PREPARED_MAX = 65_536
_JITTER = 0.05


@cache
def script_text(name: str) -> str:
    """The whole Lua text of script `name`. Raises FileNotFoundError for a name in neither LOOPS nor PLAIN."""
    folder = files("gateway.limits")
    parts = ["prelude.lua"]
    if name in LOOPS:
        parts += ["kinds.lua", *(f"{kind.lua}.lua" for kind in KINDS.values())]
    return "\n".join((folder / part).read_text() for part in [*parts, f"{name}.lua"])


@lru_cache(_PREPARED_MAX)
def _prepared(limit: Limit) -> tuple[str, str, tuple[int, ...] | None]:
    """Algorithm, what of the counter's key the limit decides, and its params where they never change."""
    kind = KINDS[limit.kind]
    params = None if limit.calendar is not None else kind.params(limit, 0)
    return kind.algorithm(limit), f"{limit.name}:{kind.layout(limit)}", params


def row(demand: Demand, now_ms: int) -> Row:
    """What a script is told of `demand`. now_ms: of this process's clock; only calendars need it."""
    limit = demand.limit
    algorithm, _, params = _prepared(limit)
    if params is None:
        params = KINDS[limit.kind].params(limit, now_ms)
    values: Row = [algorithm, demand.cost, limit.capacity, *params]
    if demand.member:
        values.append(demand.member)
    return values


def counter_name(demand: Demand) -> str:
    """The part of the counter's key that tells it from the owner's others: limit, layout, subject."""
    name = _prepared(demand.limit)[1]
    return f"{name}:{demand.subject}" if demand.subject else name


def state_row(balance: Balance) -> Row:
    """What a script is told of an account's state."""
    return [
        balance.ucredits,
        balance.version,
        balance.set_aside_ucredits,
        balance.cap_ucredits,
        balance.epoch,
        balance.period_ends_ms,
        balance.birth,
    ]


def mirror_ttl_s(ttl_s: int) -> int:
    """What `ttl_s` is for one writing of a mirror: 5 % more or less, so that what was written together does not end
    together."""
    return round(ttl_s * random.uniform(1 - _JITTER, 1 + _JITTER))


def reset_ms(limit: Limit, used: int, now_ms: int) -> int | None:
    """Until all of `limit` is there again when `used` of it is taken now; None: nobody can know."""
    return KINDS[limit.kind].reset_ms(limit, used, now_ms)


def counter(limit: Limit) -> Counter:
    """An empty counter for `limit`, in this process."""
    return KINDS[limit.kind].counter(limit)


def bytes_max(limit: Limit) -> int:
    """The most memory that one counter of `limit` takes in Redis, key and all, whatever org and subject it is of."""
    return key_bytes_max(_prepared(limit)[1]) + KINDS[limit.kind].value_bytes_max(limit)


__all__ = [
    "KINDS",
    "LOOPS",
    "PLAIN",
    "Counter",
    "Kind",
    "Row",
    "bytes_max",
    "counter",
    "counter_name",
    "mirror_ttl_s",
    "reset_ms",
    "row",
    "script_text",
    "state_row",
]

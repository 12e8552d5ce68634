"""Rules over several keys of one limit, as functions of plain values; applied twice, as those of rules.py are."""

from collections.abc import Collection, Iterator, Mapping

from gateway.config.limit_values import is_hashed
from gateway.config.problems import quoted
from gateway.config.rules import CREDITS_MAX, LIMIT_MAX, Mistake
from gateway.config.values import format_duration
from gateway.types import UCREDITS_PER_CREDIT

CARDINALITY_DEFAULT = 16_384
#: Each is a member of one sorted set.
SESSIONS_MAX = 100_000
#: Redis scripts compute with doubles, which are exact below this.
EXACT_MAX = 1 << 53

COUNTS = ("requests", "tokens", "input_tokens", "output_tokens", "credits", "concurrent", "sessions")
#: What can only be read from a request's body and its answer.
TOKEN_COUNTS = ("tokens", "input_tokens", "output_tokens")
#: Keys that only one algorithm has.
_ONLY = {"burst": "gcra", "period": "calendar", "zone": "calendar", "anchor": "calendar"}


def limit(keys: Mapping[str, object], written: Collection[str], *, shared: bool) -> list[Mistake]:
    """Every rule between its keys that a limit breaks.

    keys: `count`, `limit`, `algorithm`, `window` (ms), `burst` and `per`, absent where nobody can tell what they are.
    written: the YAML keys that are there with a value. shared: it belongs to no org.
    """
    count = keys.get("count")
    mistakes = [*_per(keys.get("per"), count, written)]
    if shared and count == "sessions":
        mistakes.append(Mistake("each org remembers its own sessions: count them in a policy", "count"))
    if count not in COUNTS:
        return mistakes
    mistakes += _concurrent(written) if count == "concurrent" else _algorithm(keys, written)
    return [*mistakes, *_bounds(keys)]


def _concurrent(written: Collection[str]) -> Iterator[Mistake]:
    for key in ("algorithm", "window", *_ONLY):
        if key in written:
            yield Mistake(f"a limit on concurrent requests has no {key}: it counts those in flight", key)


def _algorithm(keys: Mapping[str, object], written: Collection[str]) -> Iterator[Mistake]:
    count, algorithm = keys["count"], keys.get("algorithm")
    if algorithm not in ("sliding", "gcra", "calendar"):
        return
    if count == "sessions" and algorithm != "sliding":
        yield Mistake("sessions are counted in sliding windows only", "algorithm")
        return
    foreign = [key for key, owner in _ONLY.items() if key in written and owner != algorithm]
    for key in foreign:
        article = "an" if key == "anchor" else "a"
        yield Mistake(f"only a limit with algorithm: {_ONLY[key]} has {article} {key}", key)
    if algorithm == "calendar":
        if "window" in written:
            yield Mistake("a calendar limit has no window: its period says how long it lasts", "window")
        if "period" not in written:
            yield Mistake("a calendar limit needs a 'period': hour, day, week or month")
        return
    # Whoever wrote a period meant it in place of the window.
    if "window" not in written and "period" not in foreign:
        yield Mistake(f"a limit on {count} needs a 'window' such as 1m")
    if algorithm == "gcra" and "burst" not in written:
        yield Mistake("a gcra limit needs a 'burst': how many may come at once")


def _bounds(keys: Mapping[str, object]) -> Iterator[Mistake]:
    count = keys["count"]
    for key in ("limit", "burst"):
        number = keys.get(key)
        # What is larger is refused by the bound of every limit.
        if not isinstance(number, int) or number > LIMIT_MAX:
            continue
        if count == "credits" and number > CREDITS_MAX:
            yield Mistake(f"must be at most {CREDITS_MAX} credits, got {number}", key)
        elif count == "sessions" and number > SESSIONS_MAX:
            yield Mistake(f"must be at most {SESSIONS_MAX} sessions, each is remembered by name, got {number}", key)
        elif key == "burst":
            yield from _exact_burst(number, keys.get("window"), UCREDITS_PER_CREDIT if count == "credits" else 1)


def _exact_burst(burst: int, window_ms: object, units: int) -> Iterator[Mistake]:
    """The level of a gcra limit is kept times its window."""
    if not isinstance(window_ms, int) or window_ms <= 0:
        return
    most = (EXACT_MAX - 1) // (window_ms * units)
    if burst > most:
        text = f"is too large to be counted exactly: at most {most} with a window of {format_duration(window_ms)}"
        yield Mistake(text, "burst")


def _per(per: object, count: object, written: Collection[str]) -> Iterator[Mistake]:
    if not isinstance(per, tuple):
        return
    for word in sorted({word for word in per if per.count(word) > 1}):
        yield Mistake(f"{quoted(word)} is there more than once", "per")
    if "cardinality" in written and not any(is_hashed(word) for word in per):
        known = (
            f"the values of {' and '.join(map(quoted, per))} are all known" if per else "everybody shares one counter"
        )
        yield Mistake(f"bounds nothing: {known}", "cardinality")
    if count == "sessions" and "session" in per:
        yield Mistake("the sessions of one session are never more than one", "per")

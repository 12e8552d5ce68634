"""`calendar`: at most `limit` in each hour, day, week or month of a time zone, from an anchor on.

A quota, not a rate: at the turn of a period twice the limit may pass within a moment. When periods begin is worked out
from the policy whenever it is asked, so nothing has to be reset by anybody.
"""

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from gateway.keys import digest
from gateway.limits.kind import Counter
from gateway.limits.memory import text_bytes_max
from gateway.types import Calendar as Rule
from gateway.types import Limit

#: Previous start, start, end, and the end after that, in ms since 1970.
Periods = tuple[int, int, int, int]

_HOUR_MS = 3_600_000
_DAY_MINUTES = 1440
_MONDAY = datetime(2024, 1, 1)
_known: dict[Rule, Periods] = {}


class Calendar:
    lua = "calendar"

    def algorithm(self, limit: Limit) -> str:
        return "calendar"

    def layout(self, limit: Limit) -> str:
        rule = _rule(limit)
        return f"calendar:{digest(f'{rule.period} {rule.zone} {rule.anchor_minutes}')[:8]}"

    def params(self, limit: Limit, now_ms: int) -> Periods:
        return periods(_rule(limit), now_ms)

    def reset_ms(self, limit: Limit, used: int, now_ms: int) -> int:
        return periods(_rule(limit), now_ms)[2] - now_ms

    def value_bytes_max(self, limit: Limit) -> int:
        return text_bytes_max(16)

    def counter(self, limit: Limit) -> Counter:
        return Quota()


CALENDAR = Calendar()


class Quota:
    """Twin of `calendar`."""

    def __init__(self) -> None:
        self._start_ms = 0
        self._used = 0

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        _, start_ms, end_ms, _ = periods(_rule(limit), now_ms)
        used = self._used if self._start_ms == start_ms else 0
        return used, end_ms - now_ms if used + cost > limit.limit else 0

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        start_ms = periods(_rule(limit), now_ms)[1]
        if start_ms != self._start_ms:
            self._start_ms, self._used = start_ms, 0
        self._used += cost

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        if actual > cost:
            self.take(limit, actual - cost, now_ms, member)
        elif self._start_ms <= taken_at_ms:
            self._used = max(0, self._used - (cost - actual))


def periods(rule: Rule, at_ms: int) -> Periods:
    """The period that `at_ms` lies in, with the one before and the one after it."""
    found = _known.get(rule)
    if found is None or not found[1] <= at_ms < found[2]:
        found = _known[rule] = work_out(rule, at_ms)
    return found


def _rule(limit: Limit) -> Rule:
    assert limit.calendar is not None  # every calendar limit has one: config sees to it
    return limit.calendar


def work_out(rule: Rule, at_ms: int) -> Periods:
    """The same as `periods`, for a rule that nobody will ask for again soon."""
    zone = ZoneInfo(rule.zone)
    local = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(zone)
    if rule.period == "hour":
        # In absolute time: where clocks are set back, the same local hour comes twice.
        offset = local.utcoffset() or timedelta()
        shift_ms = int(offset.total_seconds() * 1000) - rule.anchor_minutes * 60_000
        start_ms = (at_ms + shift_ms) // _HOUR_MS * _HOUR_MS - shift_ms
        return start_ms - _HOUR_MS, start_ms, start_ms + _HOUR_MS, start_ms + 2 * _HOUR_MS
    number = _number(rule, local.replace(tzinfo=None) - timedelta(minutes=rule.anchor_minutes))
    # Where the anchor falls into an hour that a time change leaves out or repeats, the guess may be one off.
    while _begin_ms(rule, zone, number) > at_ms:
        number -= 1
    while _begin_ms(rule, zone, number + 1) <= at_ms:
        number += 1
    before, start, end, after = (_begin_ms(rule, zone, number + step) for step in (-1, 0, 1, 2))
    return before, start, end, after


def _number(rule: Rule, local: datetime) -> int:
    """Which period, counted from some fixed one, the local time `local` lies in when the anchor is its beginning."""
    match rule.period:
        case "day":
            return (local - _MONDAY).days
        case "week":
            return (local - _MONDAY).days // 7
        case _:
            return local.year * 12 + local.month - 1


def _begin_ms(rule: Rule, zone: ZoneInfo, number: int) -> int:
    match rule.period:
        case "day":
            natural = _MONDAY + timedelta(days=number)
        case "week":
            natural = _MONDAY + timedelta(weeks=number)
        case _:
            natural = datetime(number // 12, number % 12 + 1, 1)
            # A month that has no 31st begins on its last day instead.
            missing = timedelta(days=max(0, rule.anchor_minutes // _DAY_MINUTES + 1 - _days_of(natural)))
            natural -= missing
    begin = (natural + timedelta(minutes=rule.anchor_minutes)).replace(tzinfo=zone)
    return int(begin.timestamp() * 1000)


def _days_of(first: datetime) -> int:
    """How many days the month has that begins with `first`."""
    return monthrange(first.year, first.month)[1]

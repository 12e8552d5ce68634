"""Limits as a reader of the promise would check them: every use is remembered, every millisecond looked at.

Slow and obviously right. Nothing here is shared with the code under test but the promise itself.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from gateway.types import Calendar, Limit

MINUTE_MS = 60_000


@dataclass
class Use:
    at_ms: int
    amount: int


class Oracle:
    """Uses that count while `counts` says so. The clock never goes back."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.uses: list[Use] = []

    def counts(self, use: Use, now_ms: int) -> bool:
        raise NotImplementedError

    def used(self, now_ms: int) -> int:
        return sum(use.amount for use in self.uses if self.counts(use, now_ms))

    def fits(self, cost: int, now_ms: int, member: str) -> bool:
        return self.used(now_ms) + cost <= self.limit.capacity

    def retry_ms(self, cost: int, now_ms: int, member: str) -> int:
        """The first millisecond at which it fits, found by trying them all."""
        retry_ms = 0
        while not self.fits(cost, now_ms + retry_ms, member):
            retry_ms += 1
        return retry_ms

    def take(self, cost: int, now_ms: int, member: str) -> Use:
        self.uses.append(Use(now_ms, cost))
        return self.uses[-1]

    def settle(self, use: Use, cost: int, actual: int, now_ms: int, member: str) -> None:
        """Less than was asked was never used; more is used when it becomes known."""
        use.amount = min(actual, cost)
        if actual > cost:
            self.uses.append(Use(now_ms, actual - cost))


class ExactOracle(Oracle):
    """A use counts for one window."""

    def counts(self, use: Use, now_ms: int) -> bool:
        return now_ms - use.at_ms < self.limit.window_ms


class BucketOracle(Oracle):
    """A use counts as if it had been made in the last millisecond of its sixtieth of the window."""

    def counts(self, use: Use, now_ms: int) -> bool:
        grain_ms = -(-self.limit.window_ms // 60)
        last_ms = use.at_ms // grain_ms * grain_ms + grain_ms - 1
        return now_ms - last_ms < self.limit.window_ms


class SessionOracle(Oracle):
    """A session counts for one window from when it is seen; while it does it costs nothing."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.seen: list[tuple[int, str]] = []

    def _live(self, now_ms: int) -> list[str]:
        return [member for at_ms, member in self.seen if now_ms - at_ms < self.limit.window_ms]

    def used(self, now_ms: int) -> int:
        return len(self._live(now_ms))

    def fits(self, cost: int, now_ms: int, member: str) -> bool:
        return member in self._live(now_ms) or self.used(now_ms) < self.limit.limit

    def take(self, cost: int, now_ms: int, member: str) -> Use:
        if member not in self._live(now_ms):
            self.seen.append((now_ms, member))
        return Use(now_ms, cost)

    def settle(self, use: Use, cost: int, actual: int, now_ms: int, member: str) -> None:
        """Never given back."""


class LeakOracle(Oracle):
    """A bucket that leaks each millisecond; what a refund takes out is what cannot have leaked yet."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self._level = 0
        self._at_ms = 0
        self._rests: dict[int, tuple[Use, int]] = {}

    def _level_at(self, now_ms: int) -> int:
        level = self._level
        for _ in range(now_ms - self._at_ms):
            level = max(0, level - self.limit.limit)
            if not level:
                break
        return level

    def _advance(self, now_ms: int) -> None:
        self._level, self._at_ms = self._level_at(now_ms), now_ms

    def used(self, now_ms: int) -> int:
        whole, rest = divmod(self._level_at(now_ms), self.limit.window_ms)
        return whole + (rest > 0)

    def fits(self, cost: int, now_ms: int, member: str) -> bool:
        return self._level_at(now_ms) + cost * self.limit.window_ms <= self.limit.burst * self.limit.window_ms

    def take(self, cost: int, now_ms: int, member: str) -> Use:
        self._advance(now_ms)
        self._level += cost * self.limit.window_ms
        return Use(now_ms, cost)

    def settle(self, use: Use, cost: int, actual: int, now_ms: int, member: str) -> None:
        self._advance(now_ms)
        if actual >= cost:
            self._level += (actual - cost) * self.limit.window_ms
            return
        rest = (cost - actual) * self.limit.window_ms
        for _ in range(now_ms - use.at_ms):
            rest = max(0, rest - self.limit.limit)
            if not rest:
                break
        self._level = max(0, self._level - rest)


class CalendarOracle(Oracle):
    """A use counts in the period that it was made in."""

    def counts(self, use: Use, now_ms: int) -> bool:
        return period_begin_ms(self._rule, use.at_ms) == period_begin_ms(self._rule, now_ms)

    @property
    def _rule(self) -> Calendar:
        assert self.limit.calendar is not None
        return self.limit.calendar

    def retry_ms(self, cost: int, now_ms: int, member: str) -> int:
        if self.fits(cost, now_ms, member):
            return 0
        return period_end_ms(self._rule, now_ms) - now_ms


class SlotOracle(Oracle):
    """Requests in flight."""

    def __init__(self, limit: Limit) -> None:
        super().__init__(limit)
        self.running: set[str] = set()

    def used(self, now_ms: int) -> int:
        return len(self.running)

    def retry_ms(self, cost: int, now_ms: int, member: str) -> int:
        return 0 if self.fits(cost, now_ms, member) else 1000

    def take(self, cost: int, now_ms: int, member: str) -> Use:
        self.running.add(member)
        return Use(now_ms, cost)

    def settle(self, use: Use, cost: int, actual: int, now_ms: int, member: str) -> None:
        self.running.discard(member)


def oracle(limit: Limit) -> Oracle:
    match limit.kind:
        case "gcra":
            return LeakOracle(limit)
        case "calendar":
            return CalendarOracle(limit)
        case "concurrent":
            return SlotOracle(limit)
    if limit.unit == "sessions":
        return SessionOracle(limit)
    return ExactOracle(limit) if limit.unit == "requests" and limit.limit <= 128 else BucketOracle(limit)


def period_begin_ms(rule: Calendar, at_ms: int) -> int:
    """When the period that `at_ms` lies in began."""
    minute = at_ms // MINUTE_MS
    return max(begin for begin in _begins(rule, minute // 1440) if begin <= minute) * MINUTE_MS


def period_end_ms(rule: Calendar, at_ms: int) -> int:
    """When the next one begins."""
    minute = at_ms // MINUTE_MS
    return min(begin for begin in _begins(rule, minute // 1440) if begin > minute) * MINUTE_MS


@lru_cache(1 << 12)
def _begins(rule: Calendar, day: int) -> list[int]:
    """The minutes at which periods begin, long before to long after this day of UTC."""
    if rule.period == "hour":
        minutes = range((day - 1) * 1440, (day + 2) * 1440)
        return [minute for minute in minutes if _wall(rule.zone, minute).minute == rule.anchor_minutes]
    # A period is a month at most, and its anchor as far behind its natural beginning.
    reach = 3 if rule.period == "day" else 65
    days = [datetime(1970, 1, 1) + timedelta(days=day + step) for step in range(-reach, reach)]
    anchor = timedelta(minutes=rule.anchor_minutes)
    return [_shows_minute(rule.zone, natural + anchor) for natural in days if _is_natural(rule.period, natural)]


def _is_natural(period: str, day: datetime) -> bool:
    return period == "day" or (day.weekday() == 0 if period == "week" else day.day == 1)


@lru_cache(1 << 14)
def _shows_minute(zone: str, wanted: datetime) -> int:
    """The first minute at which clocks on the wall show `wanted`. Where they are set ahead over it: at which they would
    have shown it, had nobody set them."""
    as_utc = int(wanted.replace(tzinfo=UTC).timestamp()) // 60
    near = (as_utc - 1440, as_utc, as_utc + 1440)
    offsets = [int((_wall(zone, minute) - _wall("UTC", minute)).total_seconds()) // 60 for minute in near]
    shown = [as_utc - offset for offset in offsets if _wall(zone, as_utc - offset) == wanted]
    return min(shown, default=as_utc - offsets[0])


@lru_cache(1 << 16)
def _wall(zone: str, minute: int) -> datetime:
    return datetime.fromtimestamp(minute * 60, UTC).astimezone(ZoneInfo(zone)).replace(tzinfo=None)

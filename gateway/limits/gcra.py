"""`gcra`: `burst` at once, and `limit` more in each `window_ms`, evenly: a leaky bucket, kept as one level.

In an interval of length t at most burst + limit * t / window_ms is admitted. It promises spacing and a long-run rate,
not a window: within one window both the burst and the refill may be used.
"""

from gateway.limits.kind import Counter
from gateway.limits.memory import text_bytes_max
from gateway.types import Limit


class Gcra:
    lua = "gcra"

    def algorithm(self, limit: Limit) -> str:
        return "gcra"

    def layout(self, limit: Limit) -> str:
        return f"gcra:{limit.window_ms}"

    def params(self, limit: Limit, now_ms: int) -> tuple[int, ...]:
        return (limit.window_ms, limit.limit)

    def reset_ms(self, limit: Limit, used: int, now_ms: int) -> int:
        return -(-used * limit.window_ms // limit.limit)

    def value_bytes_max(self, limit: Limit) -> int:
        return text_bytes_max(16)

    def counter(self, limit: Limit) -> Counter:
        return Bucket()


GCRA = Gcra()


class Bucket:
    """Twin of `gcra`. The level is kept times the window, so that it stays an integer."""

    def __init__(self) -> None:
        self._level = 0
        self._at_ms = 0

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        level = self._level_at(limit, now_ms)
        excess = level + (cost - limit.burst) * limit.window_ms
        return -(-level // limit.window_ms), max(0, -(-excess // limit.limit))

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        self._set(self._level_at(limit, now_ms) + cost * limit.window_ms, now_ms)

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        change = (actual - cost) * limit.window_ms
        if change < 0:
            # What has leaked since may have been this request's own: only the rest is certain to be there still.
            change = min(0, change + max(0, now_ms - taken_at_ms) * limit.limit)
        if change:
            self._set(max(0, self._level_at(limit, now_ms) + change), now_ms)

    def _level_at(self, limit: Limit, now_ms: int) -> int:
        return max(0, self._level - max(0, now_ms - self._at_ms) * limit.limit)

    def _set(self, level: int, now_ms: int) -> None:
        self._level, self._at_ms = level, now_ms

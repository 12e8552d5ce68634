"""`sliding`: never more than `limit` admitted in any interval of length `window_ms`.

Two algorithms keep that one promise (docs/limits.md). An exact log of every admission while it is small: no
false denial, 8 bytes per admitted request. Conservative sub-buckets beyond, and for weighted costs: constant memory, a
request may be denied up to window/60 longer than strictly needed. Sessions are logged once each, exactly.
"""

from collections import OrderedDict, deque
from functools import lru_cache
from itertools import islice

from gateway.limits.kind import Counter
from gateway.limits.memory import sorted_set_bytes_max, text_bytes_max
from gateway.types import Limit

#: The log is read and written as a whole, so it is kept to a kilobyte.
EXACT_LIMIT_MAX = 128
BUCKETS = 60
#: A session is known by its digest.
_MEMBER_CHARS = 22


class Sliding:
    lua = "sliding"

    def algorithm(self, limit: Limit) -> str:
        if limit.unit == "sessions":
            return "sliding_sessions"
        return "sliding_log" if limit.unit == "requests" and limit.limit <= EXACT_LIMIT_MAX else "sliding_buckets"

    def layout(self, limit: Limit) -> str:
        return f"{self.algorithm(limit)}:{limit.window_ms}"

    def params(self, limit: Limit, now_ms: int) -> tuple[int, ...]:
        return (limit.window_ms,)

    def reset_ms(self, limit: Limit, used: int, now_ms: int) -> int:
        return _full_reset_ms(limit) if used else 0

    def value_bytes_max(self, limit: Limit) -> int:
        match self.algorithm(limit):
            case "sliding_log":
                return text_bytes_max(8 * limit.limit)
            case "sliding_buckets":
                # The bucket that is half in the window, and the one that is now.
                return text_bytes_max(16 + 8 * (BUCKETS + 1))
            case _:
                return sorted_set_bytes_max(limit.limit, _MEMBER_CHARS)

    def counter(self, limit: Limit) -> Counter:
        match self.algorithm(limit):
            case "sliding_log":
                return Log()
            case "sliding_buckets":
                return Buckets()
            case _:
                return FirstSeen()


SLIDING = Sliding()


@lru_cache(4096)
def _full_reset_ms(limit: Limit) -> int:
    return limit.window_ms + (grain_ms(limit) if SLIDING.algorithm(limit) == "sliding_buckets" else 0)


def grain_ms(limit: Limit) -> int:
    """Length of one sub-bucket."""
    return -(-limit.window_ms // BUCKETS)


class Log:
    """Twin of `sliding_log`."""

    def __init__(self) -> None:
        self._admitted_ms: deque[int] = deque()

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        admitted_ms = self._admitted_ms
        while admitted_ms and admitted_ms[0] <= now_ms - limit.window_ms:
            admitted_ms.popleft()
        used = len(admitted_ms)
        if used < limit.limit:
            return used, 0
        return used, admitted_ms[used - limit.limit] + limit.window_ms - now_ms

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        self._admitted_ms.append(now_ms)

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        if actual == 0 and taken_at_ms in self._admitted_ms:
            self._admitted_ms.remove(taken_at_ms)


class Buckets:
    """Twin of `sliding_buckets`."""

    def __init__(self) -> None:
        self._amounts: dict[int, int] = {}
        self._sum = 0

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        grain = grain_ms(limit)
        live = (now_ms - limit.window_ms + 1) // grain
        # In order of time, as they were begun.
        while self._amounts and (oldest := next(iter(self._amounts))) < live:
            self._sum -= self._amounts.pop(oldest)
        excess = self._sum + cost - limit.limit
        if excess <= 0:
            return self._sum, 0
        for index, amount in self._amounts.items():
            excess -= amount
            if excess <= 0:
                return self._sum, (index + 1) * grain - 1 + limit.window_ms - now_ms
        return self._sum, limit.window_ms

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        index = now_ms // grain_ms(limit)
        self._amounts[index] = self._amounts.get(index, 0) + cost
        self._sum += cost

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        if actual > cost:
            self.take(limit, actual - cost, now_ms, member)
            return
        index = taken_at_ms // grain_ms(limit)
        back = min(cost - actual, self._amounts.get(index, 0))
        if back:
            self._amounts[index] -= back
            self._sum -= back


class FirstSeen:
    """Twin of `sliding_sessions`. A session counts when it is seen first; `check` cannot know of records elsewhere, so
    whoever knows that a session is an old one does not ask."""

    def __init__(self) -> None:
        #: In order of time.
        self._seen_ms: OrderedDict[str, int] = OrderedDict()

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        seen_ms = self._seen_ms
        while seen_ms and next(iter(seen_ms.values())) <= now_ms - limit.window_ms:
            seen_ms.popitem(last=False)
        used = len(seen_ms)
        if member in seen_ms or used < limit.limit:
            return used, 0
        blocking_ms = next(islice(seen_ms.values(), used - limit.limit, None))
        return used, blocking_ms + limit.window_ms - now_ms

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        self._seen_ms.setdefault(member, now_ms)

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        """Another request of the session may run on its place by now, so it stays taken."""

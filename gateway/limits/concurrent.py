"""`concurrent`: at most `limit` requests in flight. Each holds a lease that its gateway renews; the lease of a gateway
that died runs out, so a slot is never lost for longer than `window_ms`."""

from gateway.limits.kind import Counter
from gateway.limits.memory import sorted_set_bytes_max
from gateway.types import Limit

#: When a slot will be free nobody knows; a second is the shortest wait a client can be told.
SLOT_RETRY_MS = 1_000
#: A lease is known by its request's id.
_MEMBER_CHARS = 32


class Concurrent:
    lua = "concurrent"

    def algorithm(self, limit: Limit) -> str:
        return "concurrent"

    def layout(self, limit: Limit) -> str:
        return "concurrent"

    def params(self, limit: Limit, now_ms: int) -> tuple[int, ...]:
        return (limit.window_ms,)

    def reset_ms(self, limit: Limit, used: int, now_ms: int) -> None:
        return None

    def value_bytes_max(self, limit: Limit) -> int:
        return sorted_set_bytes_max(limit.limit, _MEMBER_CHARS)

    def counter(self, limit: Limit) -> Counter:
        return Slots()


CONCURRENT = Concurrent()


class Slots:
    """Twin of `concurrent`, for requests that end: their leases are renewed for as long as they run."""

    def __init__(self) -> None:
        self._holders: set[str] = set()

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        used = len(self._holders)
        return used, SLOT_RETRY_MS if used + cost > limit.limit else 0

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        self._holders.add(member)

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        self._holders.discard(member)

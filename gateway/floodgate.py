"""What one client network may get wrong before anybody is known: the limiter in front of identity.

Owns how many failures of each network are remembered, and for how long. Does not know what a failure is (the walk
tells it), who is exempt (identity remembers), or any store: a flood that asks nobody costs nobody.

GCRA (a leaky bucket, in integers). A failure fills a network's bucket by `window_ms` ticks, a millisecond empties it
by `failures` ticks, `burst` failures fill it. What is stored is the tick at which it will be empty; from then on the
entry is worth nothing and is dropped. So each failure pays for `window_ms / failures` of an entry's life, and a full
table takes `networks_max` failures in every such span, for as long as it is to stay full.

| bucket                        | request of the network                    | another failure                      |
|-------------------------------|-------------------------------------------|--------------------------------------|
| none, or has run empty        | passes                                    | 1 in it                              |
| room for one                  | passes                                    | one more                             |
| no room                       | refused until there is; nothing is booked | one more (it was on its way already) |
| one `window_ms` from room     | refused until there is                    | nothing changes                      |

Whoever waits as told is let through, unless its own network has failed again meanwhile; the last row bounds that.

When the table is nearly full of networks that owe something, newcomers share a bucket with their neighbourhood (IPv4
/24, IPv6 /48), and when it is full of all that, the one looked at longest ago is forgotten. Forgetting at once instead
would let whoever has `networks_max` networks (a single IPv6 /48) make each of them forgotten before its next use.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.headers import network_of
from gateway.types import Refusal

#: Bytes of the neighbourhood, by bytes of the network.
_NEIGHBOURHOOD_BYTES = {4: 3, 8: 6}
#: The part of the table that is kept for neighbourhoods: one in so many.
_NEIGHBOURHOODS_SHARE = 8
#: Entries that one request throws away at most, once they are worth nothing.
_DROPS_MAX = 16


@dataclass(frozen=True, slots=True)
class Rules:
    """What a network is allowed. Per process."""

    #: Per `window_ms`; 0: nothing is counted and nobody is refused.
    failures: int
    window_ms: int
    #: At once.
    burst: int
    #: Networks and neighbourhoods remembered at once.
    networks_max: int


class Floodgate:
    """`refusal` before a request may ask for anything, `failed` when it turned out to be nobody's.

    Both take constant time, and look after a few entries of others, so the table empties by use. `monotonic_ms` is a
    clock that never goes back.
    """

    def __init__(self, rules: Rules, monotonic_ms: Callable[[], int]) -> None:
        self._failures = rules.failures
        self._monotonic_ms = monotonic_ms
        self._failure_ticks = rules.window_ms
        self._room_ticks = (rules.burst - 1) * rules.window_ms
        self._fill_max_ticks = self._room_ticks + rules.failures * rules.window_ms
        self._networks_max = rules.networks_max
        self._own_max = rules.networks_max - -(-rules.networks_max // _NEIGHBOURHOODS_SHARE)
        #: Network or neighbourhood -> the tick at which its bucket is empty.
        self._empty_at: dict[bytes, int] = {}
        #: The keys of the table, each once; the one looked at longest ago first.
        self._line: deque[bytes] = deque()

    @property
    def networks_count(self) -> int:
        """Networks and neighbourhoods remembered now."""
        return len(self._empty_at)

    def refusal(self, client_ip: str) -> Refusal | None:
        """Why a request of this client may not go on now; None when it may. Books nothing.

        A client without an address is never refused: it cannot be told from any other.
        """
        if not self._empty_at:
            return None
        now = self._now_ticks()
        self._drop_drained(now)
        empty_at = self._empty_at.get(self._bucket_of(network_of(client_ip), now))
        if empty_at is None or empty_at <= now + self._room_ticks:
            return None
        return Refusal(
            429,
            "too_many_failures",
            "Too many requests from your network had no valid credential or no valid target; try again later.",
            retry_after_ms=-((now + self._room_ticks - empty_at) // self._failures),
        )

    def failed(self, client_ip: str) -> None:
        """One failure is booked on the client's network."""
        network = network_of(client_ip)
        if not network or not self._failures:
            return
        now = self._now_ticks()
        self._drop_drained(now)
        bucket = self._bucket_of(network, now)
        empty_at = self._empty_at.get(bucket)
        if empty_at is None:
            if len(self._empty_at) >= self._own_max:
                bucket = _neighbourhood(network)
                empty_at = self._empty_at.get(bucket)
            if empty_at is None:
                self._make_room()
                self._line.append(bucket)
        begins_at = now if empty_at is None else max(empty_at, now)
        self._empty_at[bucket] = min(begins_at + self._failure_ticks, now + self._fill_max_ticks)

    def _now_ticks(self) -> int:
        return self._monotonic_ms() * self._failures

    def _bucket_of(self, network: bytes, now: int) -> bytes:
        """Its own, or its neighbourhood's where only that one holds something."""
        if network not in self._empty_at:
            neighbourhood = _neighbourhood(network)
            if self._empty_at.get(neighbourhood, now) > now:
                return neighbourhood
        return network

    def _drop_drained(self, now: int) -> None:
        """Entries whose turn it is are gone, up to one that still holds something: that one joins the line again."""
        for _ in range(min(_DROPS_MAX, len(self._line))):
            bucket = self._line.popleft()
            if self._empty_at[bucket] > now:
                self._line.append(bucket)
                return
            del self._empty_at[bucket]

    def _make_room(self) -> None:
        if len(self._empty_at) >= self._networks_max:
            del self._empty_at[self._line.popleft()]


def _neighbourhood(network: bytes) -> bytes:
    return network[: _NEIGHBOURHOOD_BYTES.get(len(network), 0)]

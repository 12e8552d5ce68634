"""API keys that were looked up lately, by the SHA-256 of the key.

Owns how long a lookup is believed and how many lookups run. Does not know headers, SQL or who is asking.

| entry            | age                 | store answers          | store is away               |
|------------------|---------------------|------------------------|-----------------------------|
| known key, fresh | < ttl               | served from memory     | served from memory          |
| known key, stale | < ttl + stale       | loaded again           | served from memory          |
| known key, old   | beyond              | loaded again           | StoreUnavailable            |
| no such key      | < 1 s               | served from memory     | served from memory          |
| no such key, old | beyond              | loaded again           | StoreUnavailable            |
| revoked          | `drop`              | loaded again           | StoreUnavailable            |
| doubted          | `drop_all`, org     | loaded again           | as a stale key              |

A lookup that was under way when its key was dropped is not believed: its result is thrown away, and whoever waited
for it looks again (BerriAI/litellm #33565: an in-flight request cached the blocked key anew).
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from gateway.errors import StoreUnavailable
from gateway.identity.flight import Flight
from gateway.identity.source import Clock

#: Unknown keys are believed to be unknown for so long: a loop with a bad key costs one lookup per second.
NEGATIVE_TTL_MS = 1_000
#: They have a memory of their own, so a flood of random keys pushes out other random keys only.
NEGATIVE_ENTRIES_MAX = 4_096
#: Lookups under way; one more is refused rather than queued.
LOADS_MAX = 64
#: While the store is away, how often one request's key is used to see whether it is back.
PROBE_MS = 1_000
#: Lookups one caller starts when its key is dropped again and again under its hands.
_ATTEMPTS_MAX = 4


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key that exists and is not revoked."""

    #: Public, safe to log: `key_` and 16 hex digits.
    key_id: str
    org_id: str
    plan: str
    user_id: str | None
    #: Milliseconds since 1970; None: never.
    expires_at_ms: int | None


#: Raises StoreUnavailable when the store does not answer; has its own deadline. None: no such key, or revoked.
LoadKey = Callable[[bytes], Awaitable[KeyRecord | None]]


@dataclass(frozen=True, slots=True)
class _Entry:
    record: KeyRecord
    #: When its lookup began: what was true then may have changed while it ran.
    loaded_ms: int
    #: The cache's epoch at that time; an entry of another epoch is doubted.
    epoch: int


class _Lookup:
    """One lookup under way."""

    __slots__ = ("believed", "flight")

    flight: Flight[KeyRecord | None]

    def __init__(self) -> None:
        #: False once the key was dropped: its result is neither remembered nor handed out.
        self.believed = True


class KeyCache:
    """`get` answers from memory or from `load`. `monotonic_ms` is a clock that never goes back."""

    def __init__(self, load: LoadKey, *, ttl_ms: int, stale_ms: int, entries_max: int, monotonic_ms: Clock) -> None:
        self._load = load
        self._ttl_ms = ttl_ms
        self._stale_ms = stale_ms
        self._entries_max = entries_max
        self._monotonic_ms = monotonic_ms
        #: Least recently used first.
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        #: SHA-256 of keys that do not exist -> when that was asked. Oldest first.
        self._unknown: OrderedDict[bytes, int] = OrderedDict()
        #: The lookup to wait for, per key. A dropped key's lookup has left this table.
        self._joinable: dict[bytes, _Lookup] = {}
        #: Every lookup under way, believed or not: what LOADS_MAX bounds and `close` ends.
        self._running: set[_Lookup] = set()
        #: Raised by `drop_all`.
        self._epoch = 0
        #: The last lookup failed: requests with a stale key no longer wait for the next one to fail too.
        self._store_away = False
        self._probe_at_ms = 0

    @property
    def known(self) -> int:
        """Number of keys remembered as existing."""
        return len(self._known)

    @property
    def unknown(self) -> int:
        """Number of keys remembered as not existing."""
        return len(self._unknown)

    async def get(self, sha256: bytes) -> KeyRecord | None:
        """The key's record, or None when there is no such key. Raises StoreUnavailable when neither can be known."""
        for _ in range(_ATTEMPTS_MAX):
            entry = self._known.get(sha256)
            if entry is not None:
                self._known.move_to_end(sha256)
                if self._is_fresh(entry):
                    return entry.record
                if self._store_away and self._is_servable(entry):
                    self._probe(sha256)
                    return entry.record
            elif self._is_unknown(sha256):
                return None
            try:
                lookup = self._look_up(sha256)
                record = await lookup.flight.landed()
            except StoreUnavailable:
                # Read anew: the key may have been dropped, or have grown too old, during the wait.
                entry = self._known.get(sha256)
                if entry is not None and self._is_servable(entry):
                    return entry.record
                raise
            if lookup.believed:
                return record
        raise StoreUnavailable

    def recall(self, sha256: bytes) -> KeyRecord | None:
        """The key's record as it was last loaded, however long ago; None when it was not, or was dropped."""
        entry = self._known.get(sha256)
        return None if entry is None else entry.record

    def drop(self, sha256: bytes) -> None:
        """The key is forgotten, and no lookup that began before now is believed."""
        self._known.pop(sha256, None)
        self._unknown.pop(sha256, None)
        lookup = self._joinable.pop(sha256, None)
        if lookup is not None:
            lookup.believed = False

    def drop_org(self, org_id: str) -> None:
        """Something about the org changed: its keys are looked up again before they are served."""
        for sha256, entry in tuple(self._known.items()):
            if entry.record.org_id == org_id:
                self._known[sha256] = replace(entry, epoch=-1)
        # Whose key a lookup under way is for is known only when it has landed; there are few, so all begin again.
        self._disbelieve_running()

    def drop_all(self) -> None:
        """Any key may have changed: each is looked up again before it is served.

        Keys are doubted, not forgotten. Announcements stop exactly when PostgreSQL goes away, and forgetting every key
        then would turn its restart into an outage; as stale entries they bridge it, for `stale_ms` at most.
        """
        self._epoch += 1
        self._unknown.clear()
        # Most often this is the channel coming back, and the store with it: the next request waits for its answer.
        self._store_away = False
        self._disbelieve_running()

    async def close(self) -> None:
        """No lookup is under way."""
        for lookup in tuple(self._running):
            await lookup.flight.close()
        self._running.clear()
        self._joinable.clear()

    def _is_fresh(self, entry: _Entry) -> bool:
        return entry.epoch == self._epoch and self._monotonic_ms() - entry.loaded_ms < self._ttl_ms

    def _is_servable(self, entry: _Entry) -> bool:
        return self._monotonic_ms() - entry.loaded_ms < self._ttl_ms + self._stale_ms

    def _is_unknown(self, sha256: bytes) -> bool:
        asked_ms = self._unknown.get(sha256)
        return asked_ms is not None and self._monotonic_ms() - asked_ms < NEGATIVE_TTL_MS

    def _disbelieve_running(self) -> None:
        for lookup in self._joinable.values():
            lookup.believed = False
        self._joinable.clear()

    def _probe(self, sha256: bytes) -> None:
        """Find out whether the store is back, without making anybody wait for the answer."""
        now_ms = self._monotonic_ms()
        if now_ms >= self._probe_at_ms and len(self._running) < LOADS_MAX:
            self._probe_at_ms = now_ms + PROBE_MS
            self._look_up(sha256)

    def _look_up(self, sha256: bytes) -> _Lookup:
        lookup = self._joinable.get(sha256)
        if lookup is None:
            if len(self._running) >= LOADS_MAX:
                raise StoreUnavailable("Too many API keys are being looked up; try again shortly.")
            lookup = _Lookup()
            lookup.flight = Flight(self._run(sha256, lookup))
            self._joinable[sha256] = lookup
            self._running.add(lookup)
        return lookup

    async def _run(self, sha256: bytes, lookup: _Lookup) -> KeyRecord | None:
        asked_ms, epoch = self._monotonic_ms(), self._epoch
        try:
            record = await self._load(sha256)
        except StoreUnavailable:
            self._store_away = True
            self._probe_at_ms = self._monotonic_ms() + PROBE_MS
            raise
        finally:
            self._running.discard(lookup)
            if self._joinable.get(sha256) is lookup:
                del self._joinable[sha256]
        self._store_away = False
        if lookup.believed:
            self._remember(sha256, record, asked_ms, epoch)
        return record

    def _remember(self, sha256: bytes, record: KeyRecord | None, asked_ms: int, epoch: int) -> None:
        if record is None:
            self._known.pop(sha256, None)
            self._unknown[sha256] = asked_ms
            self._unknown.move_to_end(sha256)
            if len(self._unknown) > NEGATIVE_ENTRIES_MAX:
                self._unknown.popitem(last=False)
        else:
            self._unknown.pop(sha256, None)
            self._known[sha256] = _Entry(record, asked_ms, epoch)
            self._known.move_to_end(sha256)
            if len(self._known) > self._entries_max:
                self._known.popitem(last=False)

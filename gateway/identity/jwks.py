"""Where the keys that verify JWTs come from: the configuration, or a JWKS document.

Owns a JWKS document's life: fetched through an injected function, believed for a while, fetched again. Does not own
its form (`verify_key`); knows nothing of tokens, claims or headers.

| age of the document        | server answers                      | server is away                    |
|----------------------------|-------------------------------------|-----------------------------------|
| none yet                   | callers wait                        | StoreUnavailable, tried each 1 s  |
| < 80 % of ttl              | believed                            | believed                          |
| < ttl                      | believed, fetched meanwhile         | believed, tried each 10 s         |
| < ttl + 24 h               | callers wait                        | believed, tried each 10 s         |
| beyond                     | callers wait                        | StoreUnavailable, tried each 1 s  |
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from gateway.errors import GatewayError, StoreUnavailable
from gateway.identity.flight import Flight
from gateway.identity.source import Clock
from gateway.identity.verify_key import VerifyKey, parse_jwks

#: The body of a 200 answer. Raises GatewayError or OSError for everything else.
Fetch = Callable[[str], Awaitable[bytes]]

FETCH_TIMEOUT_MS = 2_000
#: A token whose key id nobody knows makes us look for new keys, but no more often than this.
UNKNOWN_KID_INTERVAL_MS = 30_000
#: How long keys outlive their time to live when the server cannot be read.
STALE_MS = 24 * 3_600_000
RETRY_MS = 10_000
RETRY_WITHOUT_KEYS_MS = 1_000

_log = structlog.stdlib.get_logger(__name__)


class KeySet(Protocol):
    """Keys from one place."""

    @property
    def algorithms(self) -> frozenset[str]:
        """What the keys of this set can ever verify."""
        ...

    @property
    def version(self) -> int:
        """Another number whenever the keys are others."""
        ...

    async def keys(self) -> tuple[VerifyKey, ...]:
        """The keys to believe now. Raises StoreUnavailable when there is none to be had."""
        ...

    async def renewed(self) -> bool:
        """Look for keys that were added since; False when it is too early to look again."""
        ...

    async def close(self) -> None: ...


class StaticKeys:
    """Keys from the configuration: they change with a restart only."""

    version = 0

    def __init__(self, key: VerifyKey) -> None:
        self._keys = (key,)
        self.algorithms = frozenset({key.algorithm})

    async def keys(self) -> tuple[VerifyKey, ...]:
        return self._keys

    async def renewed(self) -> bool:
        return False

    async def close(self) -> None:
        return None


class RemoteKeys:
    """Keys from a JWKS document at `url`. `monotonic_ms` is a clock that never goes back."""

    algorithms = frozenset({"RS256", "ES256"})

    def __init__(self, url: str, fetch: Fetch, *, ttl_ms: int, monotonic_ms: Clock) -> None:
        self._url = url
        self._fetch = fetch
        self._ttl_ms = ttl_ms
        self._monotonic_ms = monotonic_ms
        self.version = 0
        self._keys: tuple[VerifyKey, ...] = ()
        self._body = b""
        self._read_ms = 0
        #: The last fetch failed: callers no longer wait for the next one while there are keys to believe.
        self._failing = False
        self._retry_at_ms = self._renew_at_ms = monotonic_ms()
        self._flight: Flight[None] | None = None

    async def keys(self) -> tuple[VerifyKey, ...]:
        now_ms = self._monotonic_ms()
        age_ms = now_ms - self._read_ms
        if self._keys and age_ms >= self._ttl_ms + STALE_MS:
            self._keys, self._body = (), b""
            self.version += 1
            self._retry_at_ms = now_ms
        may_try = not self._failing or now_ms >= self._retry_at_ms
        if not self._keys:
            if may_try:
                await self._read_once().landed()
            if not self._keys:
                raise StoreUnavailable("The keys that verify this token cannot be read right now; try again shortly.")
        elif age_ms >= self._ttl_ms and not self._failing:
            await self._read_once().landed()
        elif may_try and age_ms * 5 >= self._ttl_ms * 4:
            self._read_once()
        return self._keys

    async def renewed(self) -> bool:
        now_ms = self._monotonic_ms()
        if self._flight is None or self._flight.done:
            if now_ms < self._renew_at_ms:
                return False
            self._renew_at_ms = now_ms + UNKNOWN_KID_INTERVAL_MS
        await self._read_once().landed()
        return True

    async def close(self) -> None:
        if self._flight is not None:
            await self._flight.close()

    def _read_once(self) -> Flight[None]:
        if self._flight is None or self._flight.done:
            self._flight = Flight(self._read())
        return self._flight

    async def _read(self) -> None:
        asked_ms = self._monotonic_ms()
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_MS / 1000):
                body = await self._fetch(self._url)
            keys = self._keys if body == self._body else parse_jwks(body)
        except (GatewayError, OSError, ValueError) as exc:
            self._failed(exc)
            return
        if self._failing:
            _log.info("jwks_read_again", url=self._url)
        if keys != self._keys:
            self._keys = keys
            self.version += 1
        self._body, self._read_ms, self._failing = body, asked_ms, False

    def _failed(self, exc: Exception) -> None:
        # Once per outage, not once per attempt (BerriAI/litellm #40620).
        if not self._failing:
            _log.warning("jwks_not_readable", url=self._url, error=type(exc).__name__, keys=len(self._keys))
        self._failing = True
        self._retry_at_ms = self._monotonic_ms() + (RETRY_MS if self._keys else RETRY_WITHOUT_KEYS_MS)

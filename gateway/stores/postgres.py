"""PostgreSQL through one bounded pool, and one dedicated connection that listens for notifications.

Connections are opened when they are needed, so the gateway starts, and keeps serving what it knows, while the
database is away. Every call has one deadline that covers waiting for a connection and the statement.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeAlias

import asyncpg
import structlog

from gateway.errors import StoreLocked, StoreRefused, StoreUnavailable

#: A row by column name. Quoted types are generic for the type checker only.
Row: TypeAlias = asyncpg.Record
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
PooledConnection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

LISTEN_PROBE_S = 5.0
RECONNECT_PAUSE_MIN_S = 0.1
RECONNECT_PAUSE_MAX_S = 2.0

log = structlog.get_logger("gateway.postgres")

#: UnicodeError: what asyncio raises for a host name that IDNA cannot encode. InternalClientError: what asyncpg raises
#: for a connection that the server has ended and that is not closed yet.
_FAILURES = (
    OSError,
    TimeoutError,
    UnicodeError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
#: The server is well and the values are at fault: the same call will fail again.
_REFUSALS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)


class Postgres:
    """`open()` needs no server; `close()` ends every connection."""

    def __init__(self, url: str, *, timeout_ms: int, pool_max: int) -> None:
        self._url = url
        self._timeout_s = timeout_ms / 1000
        self._pool_max = pool_max
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._listener: asyncio.Task[None] | None = None
        #: Why the last call failed; None after one that worked.
        self.trouble: str | None = "not asked yet"

    async def open(self) -> None:
        # statement_cache_size=0 keeps transaction-pooling proxies usable.
        self._pool = await asyncpg.create_pool(
            self._url, min_size=0, max_size=self._pool_max, statement_cache_size=0, timeout=self._timeout_s
        )

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
            self._listener = None
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    async def rows(self, sql: str, *args: Any, timeout_ms: int | None = None) -> list[Row]:
        """All rows of one statement. Raises StoreUnavailable, whatever went wrong; as StoreRefused when the server
        will never take these values."""
        async with self._connection(timeout_ms) as connection:
            return await connection.fetch(sql, *args)

    async def row(self, sql: str, *args: Any, timeout_ms: int | None = None) -> Row | None:
        """The first row of one statement, or None."""
        async with self._connection(timeout_ms) as connection:
            return await connection.fetchrow(sql, *args)

    async def transaction(self, statements: list[tuple[str, tuple[Any, ...]]], timeout_ms: int | None = None) -> None:
        """All statements took effect together, or none."""
        async with self._connection(timeout_ms) as connection, connection.transaction():
            for sql, args in statements:
                await connection.execute(sql, *args)

    @contextlib.asynccontextmanager
    async def _connection(self, timeout_ms: int | None) -> AsyncIterator[PooledConnection]:
        timeout_s = self._timeout_s if timeout_ms is None else timeout_ms / 1000
        asked = False
        if self._pool is None:
            raise StoreUnavailable(detail="postgres: closed")
        try:
            async with asyncio.timeout(timeout_s) as deadline, self._pool.acquire(timeout=timeout_s) as connection:
                try:
                    asked = True
                    yield connection
                finally:
                    if deadline.expired():
                        # Given back as it is, it would wait as long again for the server to confirm the cancellation.
                        connection.terminate()
        except _FAILURES as exc:
            reason = f"{type(exc).__name__}: {exc}" if str(exc) else f"no answer within {timeout_s * 1000:.0f} ms"
            if self.trouble != reason:
                log.warning("postgres failed", error=reason)
            self.trouble = reason
            failure = _failure(exc)
            ambiguous = asked and failure is StoreUnavailable
            raise failure(detail=f"postgres: {reason}", ambiguous=ambiguous) from exc
        if self.trouble is not None:
            log.info("postgres answers")
            self.trouble = None

    def listen(self, handlers: Mapping[str, Callable[[str], None]], on_connect: Callable[[], None]) -> None:
        """From now on each channel's handler gets its payloads. `on_connect` runs whenever listening begins, the
        first time and after every gap: what was announced meanwhile is lost, so caches must be dropped there."""
        self._listener = asyncio.create_task(self._keep_listening(handlers, on_connect), name="postgres-listener")

    async def _keep_listening(
        self, handlers: Mapping[str, Callable[[str], None]], on_connect: Callable[[], None]
    ) -> None:
        pause_s = RECONNECT_PAUSE_MIN_S
        while True:
            connection: Connection | None = None
            try:
                connection = await asyncpg.connect(self._url, timeout=RECONNECT_PAUSE_MAX_S, statement_cache_size=0)
                for channel, handler in handlers.items():
                    await connection.add_listener(channel, _payload_to(handler))
                ended = asyncio.Event()
                connection.add_termination_listener(lambda *_, ended=ended: ended.set())
                on_connect()
                pause_s = RECONNECT_PAUSE_MIN_S
                while True:
                    # One that is closed is noticed at once, one that only fell silent by asking.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), LISTEN_PROBE_S)
                    await connection.fetchval("SELECT 1", timeout=LISTEN_PROBE_S)
            except _FAILURES as exc:
                log.warning("postgres notifications lost", error=f"{type(exc).__name__}: {exc}")
            finally:
                if connection is not None:
                    connection.terminate()
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, RECONNECT_PAUSE_MAX_S)


def _failure(exc: BaseException) -> type[StoreUnavailable]:
    if isinstance(exc, _REFUSALS):
        return StoreRefused
    return StoreLocked if isinstance(exc, asyncpg.LockNotAvailableError) else StoreUnavailable


def _payload_to(handler: Callable[[str], None]) -> Callable[..., None]:
    def received(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        handler(str(payload))

    return received

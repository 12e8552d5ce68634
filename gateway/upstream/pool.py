"""The connections to one origin. Owns how many there are, who gets the next one, and dialling.

A slot is taken by a dial and stays with the connection that comes of it; requests never own slots, so cancelling one
cannot lose any. A dial is never cancelled with the request that caused it: its connection serves the next in line.
"""

import asyncio
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from math import inf

import httpx

from gateway.upstream.connection import Connection, closing
from gateway.upstream.timeouts import Deadlines
from gateway.upstream.tls import forget_session

#: Requests that may wait for a connection to one origin; their deadline bounds them in time.
WAITERS_MAX = 4_096


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a pool connects to."""

    host: str
    port: int
    #: None for plain HTTP.
    tls: ssl.SSLContext | None


class Pool:
    """At most `connections_max` connections to `origin`, the most recently used one first."""

    def __init__(self, origin: Origin, connections_max: int, keepalive_s: float) -> None:
        self.origin = origin
        self._connections_max = connections_max
        self._keepalive_s = keepalive_s
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._dials: set[asyncio.Task[Connection]] = set()
        self._waiters: OrderedDict[asyncio.Future[Connection], Deadlines] = OrderedDict()
        self._closed = False

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def dialling(self) -> int:
        return len(self._dials)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def take(self) -> Connection | None:
        """The connection used last, or None: then `wait`."""
        while self._idle:
            connection, _ = self._idle.popitem()
            if connection.ready():
                return connection
            connection.abort()
        return None

    async def wait(self, deadlines: Deadlines) -> Connection:
        """A connection, in order of asking. Raises PoolTimeout, ConnectTimeout, ConnectError; nothing was sent then."""
        patience_until = asyncio.get_running_loop().time() + deadlines.pool_s
        first = False
        while True:
            connection = await self._next(deadlines, patience_until, first)
            if connection.reused:
                if not connection.closed and connection.quiet():
                    return connection
                connection.abort()
            elif not connection.closed:
                return connection
            else:
                # Old ones run out; a new one says that the upstream wants nobody.
                raise httpx.ConnectError("The upstream closed the new connection at once.")
            # Closed between being handed over and here: whose turn it was, it still is.
            first = True

    async def _next(self, deadlines: Deadlines, patience_until: float, first: bool) -> Connection:
        if self._closed:
            raise httpx.ConnectError("The transport is closed.")
        if len(self._waiters) >= WAITERS_MAX:
            raise httpx.PoolTimeout("Too many requests wait for a connection.")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Connection] = loop.create_future()
        self._waiters[waiter] = deadlines
        if first:
            self._waiters.move_to_end(waiter, last=False)
        self._dial_for_waiters()
        # Whoever has a dial coming waits for its outcome, which says better what is wrong.
        dialled = len(self._dials) >= len(self._waiters)
        give_up_at = patience_until + (deadlines.connect_s if dialled else 0.0)
        timer = None if give_up_at == inf else loop.call_at(give_up_at, _give_up, waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.released(waiter.result())
            raise
        finally:
            self._waiters.pop(waiter, None)
            if timer is not None:
                timer.cancel()

    def released(self, connection: Connection) -> None:
        """An open connection without an exchange goes to the first who waits, or to rest."""
        if connection.closed:
            return
        if self._closed:
            connection.abort()
            return
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(connection)
                return
        if self._keepalive_s <= 0:
            connection.abort()
            return
        self._idle[connection] = None
        connection.rest(self._keepalive_s)

    def lost(self, connection: Connection) -> None:
        """A connection is closed; its slot may serve somebody who waits."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
        if self._waiters:
            self._dial_for_waiters()

    def drop_idle(self) -> None:
        """Connections at rest are closed: one of them turned out to be dead, so the others are suspect."""
        for connection in tuple(self._idle):
            connection.abort()

    async def aclose(self) -> None:
        """No connection, dial or waiter is left."""
        self._closed = True
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_exception(httpx.ConnectError("The transport was closed."))
        for connection in tuple(self._open):
            connection.kill(closing())
        dials = tuple(self._dials)
        for dial in dials:
            dial.cancel()
        if dials:
            await asyncio.wait(dials)

    # -- dialling ------------------------------------------------------------------------------------------------

    def _dial_for_waiters(self) -> None:
        """As many dials are under way as there are waiters, if slots allow."""
        missing = min(len(self._waiters), self._connections_max - len(self._open)) - len(self._dials)
        if missing <= 0 or self._closed:
            return
        loop = asyncio.get_running_loop()
        deadlines = next(reversed(self._waiters.values()))
        for _ in range(missing):
            task = loop.create_task(dial(self.origin, self, deadlines.connect_s))
            self._dials.add(task)
            task.add_done_callback(self._dialled)

    def _dialled(self, task: "asyncio.Task[Connection]") -> None:
        self._dials.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            connection = task.result()
            if connection.closed:
                error = httpx.ConnectError("The upstream closed the new connection at once.")
            else:
                self._open.add(connection)
                self.released(connection)
                return
        # While as many dials remain as there are waiters, nobody has to go without.
        if len(self._waiters) > len(self._dials):
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                cancelled = isinstance(error, asyncio.CancelledError)
                waiter.set_exception(httpx.ConnectError("The dial was cancelled.") if cancelled else error)
        self._dial_for_waiters()


def _give_up(waiter: "asyncio.Future[Connection]") -> None:
    if not waiter.done():
        waiter.set_exception(httpx.PoolTimeout("No connection became free in time."))


async def dial(origin: Origin, pool: Pool, timeout_s: float) -> Connection:
    """A new connection, TLS handshake included. Raises ConnectTimeout or ConnectError."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None if timeout_s == inf else timeout_s):
            _, connection = await loop.create_connection(
                lambda: Connection(pool, loop),
                origin.host,
                origin.port,
                ssl=origin.tls,
                server_hostname=None if origin.tls is None else origin.host,
                # asyncio's own deadline for the handshake (60 s) must not come before ours.
                ssl_handshake_timeout=None if origin.tls is None or timeout_s == inf else timeout_s,
            )
    except TimeoutError as exc:
        raise httpx.ConnectTimeout("The upstream did not accept the connection in time.") from exc
    except (OSError, UnicodeError) as exc:  # ssl.SSLError is an OSError; UnicodeError: a name that IDNA refuses
        if origin.tls is not None:
            forget_session(origin.tls, origin.host)
        raise httpx.ConnectError(str(exc) or type(exc).__name__) from exc
    return connection

"""One TCP or TLS connection to an upstream. Owns the socket, its back-pressure and its deadlines, not HTTP.

    at rest (no exchange) ◄──► busy (one exchange) ──► closed

Bytes or an end of stream while at rest close it. Timers: a deadline is a number that each wait moves; the one timer
of a connection is armed for the nearest deadline it knew and, when it rings too early, for the next. Requests that
come faster than their deadlines therefore set no timers at all.
"""

import asyncio
import ssl
from math import inf
from typing import Protocol, cast

import httpx

from gateway.upstream.exchange import Exchange


class Owner(Protocol):
    """Who counts connections and keeps those at rest."""

    def released(self, connection: "Connection") -> None: ...
    def lost(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    """Satisfies `wire.Wire`."""

    __slots__ = (
        "_alarm",
        "_alarm_at",
        "_drained",
        "_exchange",
        "_loop",
        "_owner",
        "_read_by",
        "_transport",
        "_write_by",
        "_write_paused",
        "closed",
        "reused",
    )

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._write_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._read_by = self._write_by = self._alarm_at = inf
        self._alarm: asyncio.TimerHandle | None = None
        #: An earlier exchange went well on this connection.
        self.reused = False
        self.closed = False

    def begin(self, exchange: Exchange) -> None:
        """The connection belongs to `exchange` until that calls `finish` or `abort`."""
        self._exchange = exchange
        self._read_by = inf

    def rest(self, keepalive_s: float) -> None:
        """At rest: closed by itself after `keepalive_s`."""
        self.watch_reading(keepalive_s)

    def rested_out(self) -> bool:
        """The time at rest is over, even if the loop was too busy to say so."""
        return self._read_by <= self._loop.time()

    # -- Wire ----------------------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    async def drain(self, timeout_s: float) -> None:
        """The socket takes more. A deadline that passes fails the exchange, which cancels this wait."""
        if not self._write_paused or self.closed:
            return
        drained = self._drained = self._loop.create_future()
        self._write_by = self._loop.time() + timeout_s
        if self._write_by < self._alarm_at:
            self._arm(self._write_by)
        try:
            await drained
        finally:
            self._drained = None
            self._write_by = inf

    def watch_reading(self, timeout_s: float) -> None:
        self._read_by = read_by = self._loop.time() + timeout_s
        if read_by < self._alarm_at:
            self._arm(read_by)

    def unwatch_reading(self) -> None:
        self._read_by = inf

    def pause_reading(self) -> None:
        if self._transport is not None and not self.closed:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self.closed:
            self._transport.resume_reading()

    def finish(self, reusable: bool) -> None:
        """The exchange is over. Request bytes that still wait to be written make the connection useless too."""
        self._exchange = None
        self._read_by = self._write_by = inf
        if not reusable or self._transport is None or self._write_paused or self._transport.get_write_buffer_size():
            self.abort()
            return
        self.reused = True
        self._owner.released(self)

    def abort(self) -> None:
        """Closed at once, counted out at once."""
        transport = self._transport
        self._close()
        if transport is not None:
            transport.abort()

    def kill(self, error: Exception) -> None:
        """Closed at once; an exchange that is under way fails with `error`."""
        exchange = self._exchange
        self.abort()
        if exchange is not None:
            exchange.fail(error)

    def _ended_in_order(self) -> bool:
        """False when a TLS stream was cut by somebody who cannot sign its end (RFC 9112 §9.8).

        asyncio does not tell the two apart; the TLS object does: it reads b"" after a close_notify only.
        """
        transport = self._transport
        tls: ssl.SSLObject | None = None if transport is None else transport.get_extra_info("ssl_object")
        try:
            return tls is None or tls.read(1) == b""
        except ssl.SSLError:
            return False

    def _close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._exchange = None
        self._read_by = self._write_by = inf
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._owner.lost(self)

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's and TLS transports are no subclasses

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.feed(data)
        else:
            self.abort()  # nobody asked: what follows could be taken for the answer to the next request

    def eof_received(self) -> None:
        exchange = self._exchange
        if exchange is not None:
            exchange.ended(None if self._ended_in_order() else ConnectionResetError("TLS ended without close_notify"))
        self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        exchange = self._exchange
        # Without eof_received this is no orderly end, not even if exc is None.
        if exchange is not None:
            exchange.ended(exc or ConnectionResetError("connection lost"))
        self._close()
        self._transport = None

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # -- deadlines -----------------------------------------------------------------------------------------------

    def _arm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_at = at
        if at != inf and not self.closed:
            self._alarm = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._alarm_at = inf
        due = min(self._read_by, self._write_by)
        # Both loops read sockets before they run timers, so bytes that waited while the loop was busy came in time.
        if due > self._loop.time():
            self._arm(due)
        elif self._exchange is not None:
            self._exchange.expired(writing=self._write_by <= self._read_by)
        else:
            self.abort()


def closing() -> httpx.ReadError:
    """What an exchange gets when the transport is closed under it."""
    return httpx.ReadError("The transport was closed.")

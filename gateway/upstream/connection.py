"""One TCP or TLS connection to an upstream. Owns the socket, its back-pressure and its deadlines, not HTTP.

    at rest (no user) ◄──► busy (one exchange) ──► closed
                                └──► busy (one tunnel) ──► closed

Bytes or an end of stream while at rest close it. Timers: a deadline is a number that each wait moves; the one timer
of a connection is armed for the nearest deadline it knew and, when it rings too early, for the next. Requests that
come faster than their deadlines therefore set no timers at all.
"""

import asyncio
import select
import ssl
from math import inf
from typing import Protocol, cast

import httpx

from gateway.upstream.tls import remember_session
from gateway.upstream.wire import User

#: After so short a rest nobody has lost patience with a connection, and the look into its socket (1.5 us, a twentieth
#: of a whole exchange) is saved: under load connections rest for microseconds.
UNCHECKED_S = 0.001


class Owner(Protocol):
    """Who counts connections and keeps those at rest."""

    def released(self, connection: "Connection") -> None: ...
    def lost(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    """Satisfies `wire.Wire`."""

    __slots__ = (
        "_alarm",
        "_alarm_at",
        "_drains",
        "_loop",
        "_owner",
        "_poll",
        "_read_by",
        "_rests_since",
        "_transport",
        "_user",
        "_write_by",
        "_write_paused",
        "closed",
        "reused",
    )

    def __init__(self, owner: Owner, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._user: User | None = None
        self._poll: select.poll | None = None
        self._write_paused = False
        self._drains: set[asyncio.Future[None]] = set()
        self._read_by = self._write_by = self._alarm_at = inf
        self._rests_since = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        #: An earlier exchange went well on this connection.
        self.reused = False
        self.closed = False

    def begin(self, exchange: User) -> None:
        """The connection belongs to `exchange` until that calls `finish`, `hand_over` or `abort`."""
        self._user = exchange
        self._read_by = inf

    def rest(self, keepalive_s: float) -> None:
        """At rest: closed by itself after `keepalive_s`."""
        self._rests_since = now = self._loop.time()
        self._read_by = read_by = now + keepalive_s
        if read_by < self._alarm_at:
            self._arm(read_by)

    def ready(self) -> bool:
        """A connection at rest may be used: its time there is not over, even if the loop was too busy to say so, and
        it is `quiet`, unless it came to rest just now."""
        now = self._loop.time()
        if self._read_by <= now:
            return False
        return now - self._rests_since < UNCHECKED_S or self.quiet()

    def quiet(self) -> bool:
        """Nothing has come from the upstream, not even bytes or an end that wait in the socket because the loop has
        not read them yet.

        Without this look every request that races the upstream's own idle timeout would fail while the loop is busy,
        and most cannot be sent again. What remains of the race is the way of the packets.
        """
        return self._poll is None or not self._poll.poll(0)

    # -- Wire ----------------------------------------------------------------------------------------------------

    def write(self, data: bytes | memoryview) -> None:
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    async def drain(self, timeout_s: float) -> None:
        """The socket takes more, or is closed. A deadline that passes fails the user of the connection."""
        if not self._write_paused or self.closed:
            return
        drained = self._loop.create_future()
        if not self._drains:
            self._write_by = self._loop.time() + timeout_s
            if self._write_by < self._alarm_at:
                self._arm(self._write_by)
        self._drains.add(drained)
        try:
            await drained
        finally:
            self._drains.discard(drained)
            if not self._drains:
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

    def hand_over(self, user: User) -> None:
        """The connection belongs to `user` from now on, for good."""
        self._user = user
        self._read_by = inf

    def finish(self, reusable: bool) -> None:
        """The exchange is over. Request bytes that still wait to be written make the connection useless too."""
        self._user = None
        self._read_by = self._write_by = inf
        if not self.reused:
            tls = self._tls()
            if tls is not None:
                remember_session(tls)
        if not reusable or self._transport is None or self._write_paused or self._transport.get_write_buffer_size():
            self.abort()
            return
        self.reused = True
        self._owner.released(self)

    def close(self) -> None:
        """Closed when everything is written; the user is told so by `ended`."""
        if self._transport is not None and not self.closed:
            self._transport.close()

    def abort(self) -> None:
        """Closed at once, counted out at once."""
        transport = self._transport
        self._close()
        if transport is not None:
            transport.abort()

    def kill(self, error: Exception) -> None:
        """Closed at once; an exchange or tunnel that is under way fails with `error`."""
        user = self._user
        self.abort()
        if user is not None:
            user.fail(error)

    def _tls(self) -> ssl.SSLObject | None:
        tls: ssl.SSLObject | None = None
        if self._transport is not None:
            tls = self._transport.get_extra_info("ssl_object")
        return tls

    def _close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._user = None
        self._read_by = self._write_by = inf
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._may_write()
        self._owner.lost(self)

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's and TLS transports are no subclasses
        if hasattr(select, "poll"):  # not on Windows
            self._poll = select.poll()
            self._poll.register(transport.get_extra_info("socket"), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        user = self._user
        if user is not None:
            user.feed(data)
        else:
            self.abort()  # nobody asked: what follows could be taken for the answer to the next request

    def eof_received(self) -> bool:
        user = self._user
        tls = self._tls()
        if user is not None and user.ended(_end_of(tls)):
            # TLS cannot be closed in one direction: what waits is still written, then the transport closes itself.
            return tls is None
        self.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        user = self._user
        # Without eof_received this is no orderly end, not even if exc is None.
        if user is not None:
            user.ended(exc or ConnectionResetError("connection lost"))
        self._close()
        self._transport = None

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._may_write()

    def _may_write(self) -> None:
        for drained in self._drains:
            if not drained.done():
                drained.set_result(None)

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
        elif self._user is not None:
            self._user.expired(writing=self._write_by <= self._read_by)
        else:
            self.abort()


def _end_of(tls: ssl.SSLObject | None) -> Exception | None:
    """None unless a TLS stream was cut by somebody who cannot sign its end (RFC 9112 §9.8).

    asyncio does not tell the two apart; the TLS object does: it reads b"" after a close_notify only.
    """
    try:
        if tls is None or tls.read(1) == b"":
            return None
    except ssl.SSLError as exc:
        return exc
    return ConnectionResetError("TLS ended without close_notify")


def closing() -> httpx.ReadError:
    """What an exchange gets when the transport is closed under it."""
    return httpx.ReadError("The transport was closed.")

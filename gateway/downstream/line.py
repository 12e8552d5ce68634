"""The socket to one client: writing with back-pressure, one deadline at a time, and the ways it ends.

    open ──► lingering ──► closed     our side ends; the client's is read and thrown away until it ends too
      ├────► closing ────► closed     what is written still leaves
      └────► aborted                  or reset, where an end would be taken for the end of an answer

Knows nothing of requests. Each way ends within a bound, whatever the client does.
"""

import asyncio
import socket
import struct
from typing import cast

from gateway.downstream.alarm import Alarm

#: After our end of a connection the client may read the answer while it still sends (RFC 9112 §9.6): so long, so much.
LINGER_S = 5.0
LINGER_BYTES_MAX = 64 * 1024 * 1024

#: SO_LINGER without time: closing the socket resets the connection.
_RESET = struct.pack("ii", 1, 0)


class Line(asyncio.Protocol):
    """Satisfies most of `incoming.Wire`. A subclass receives the data and says what a passed deadline means."""

    __slots__ = ("_closing", "_drains", "_lingered_bytes", "_loop", "_transport", "alarm", "write_paused")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._closing = False
        self._lingered_bytes = 0
        self._drains: list[asyncio.Future[None]] = []
        self.alarm = Alarm(loop, self._ring)
        self.write_paused = False

    def expired(self) -> None:
        """The deadline has passed, while open."""
        raise NotImplementedError

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are no subclasses

    def throw_away(self, data: bytes) -> None:
        """Bytes that came after our end began."""
        self._lingered_bytes += len(data)
        if self._lingered_bytes > LINGER_BYTES_MAX:
            self.abort()

    def eof_received(self) -> bool:
        """The client has ended: so do we, once what was written is taken."""
        self._closing = True
        self.alarm.set(LINGER_S)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._transport = None
        self.alarm.close()
        self.resume_writing()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        drains, self._drains = self._drains, []
        for drain in drains:
            if not drain.done():
                drain.set_result(None)

    # -- passing bytes -------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def drain(self) -> None:
        """The client takes more, or is gone."""
        if self.write_paused and self._transport is not None:
            drain = self._loop.create_future()
            self._drains.append(drain)
            await drain

    def pause_reading(self) -> None:
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._closing:
            self._transport.resume_reading()

    # -- ending --------------------------------------------------------------------------------------------------

    def linger(self) -> None:
        """What was written will be read, even by a client that is still sending: bytes that we have not read would
        turn the end of the connection into a reset, and a reset throws away what the client has not read."""
        transport = self._transport
        if transport is None or not transport.can_write_eof():
            self.close()
            return
        self.resume_reading()
        self._closing = True
        try:
            transport.write_eof()
        except OSError:  # reset by the client, which the event loop has not noticed yet
            self.abort()
        else:
            self.alarm.set(LINGER_S)

    def close(self) -> None:
        """Closed once everything is written, or the client has had LINGER_S to take it."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()
            self.alarm.set(LINGER_S)

    def abort(self) -> None:
        """Closed at once; what is not written yet never will be."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def reset(self) -> None:
        """Closed at once, in a way that nobody takes for an orderly end."""
        if self._transport is not None:
            connected: socket.socket | None = self._transport.get_extra_info("socket")
            if connected is not None:
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.abort()

    def _ring(self) -> None:
        if self._closing:
            self.abort()
        else:
            self.expired()

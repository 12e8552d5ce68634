"""The connection after a 101: bytes both ways, no longer HTTP. Owns back-pressure and how a tunnel ends.

    open ──► upstream ended (reads give b"", writes go on) ──► closed
      └────────────────────────────────────────────────────► broken (reads and writes raise) or closed

No deadline for silence: what is a long silence depends on the protocol inside, which is not known here.
"""

import asyncio

import httpx

from gateway.upstream.wire import BUFFERED_BYTES_MAX, Wire

#: So long `aclose` waits until the upstream has taken what is still to be written.
LINGER_S = 2.0


class Tunnel:
    """Satisfies `wire.User`. One reader at a time; any number of writers."""

    __slots__ = (
        "_buffered_bytes",
        "_ended",
        "_error",
        "_gone",
        "_loop",
        "_parts",
        "_paused",
        "_waiter",
        "_wire",
        "_write_s",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, wire: Wire, early: bytes, write_s: float) -> None:
        """early: what came behind the 101 in the same read; the first to be read. write_s: deadline of each write."""
        self._loop = loop
        self._wire: Wire | None = wire
        self._write_s = write_s
        self._parts = [early] if early else []
        self._buffered_bytes = len(early)
        self._paused = self._ended = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._gone: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """All bytes that have arrived, at least one; b"" when the upstream has ended in order.

        Cancelling it loses nothing. Raises httpx.ReadError, or what broke the tunnel.
        """
        while not self._parts:
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        parts, self._parts = self._parts, []
        self._buffered_bytes = 0
        if self._paused:
            self._paused = False
            if self._wire is not None:
                self._wire.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, data: bytes) -> None:
        """`data` is on its way and the upstream takes more. Raises httpx.WriteTimeout, httpx.WriteError, or what
        broke the tunnel. Cancelling it leaves all of `data` on its way.
        """
        if self._gone is None and self._wire is not None:
            self._wire.write(data)
            await self._wire.drain(self._write_s)
        elif self._error is None:
            raise httpx.WriteError("The tunnel is being closed.")
        if self._error is not None:
            raise self._error

    async def aclose(self) -> None:
        """Closed after what was written has left, or after LINGER_S. Cancelling it closes at once."""
        wire = self._wire
        if wire is None:
            return
        gone = self._gone = self._gone or self._loop.create_future()
        wire.close()
        try:
            await asyncio.wait((gone,), timeout=LINGER_S)
        finally:
            self.abort()

    def abort(self) -> None:
        """Closed at once; whoever still reads or writes gets httpx.ReadError."""
        self.fail(httpx.ReadError("The tunnel was closed."))

    # -- wire.User -----------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        if self._error is not None:
            return
        self._parts.append(data)
        self._buffered_bytes += len(data)
        if self._buffered_bytes > BUFFERED_BYTES_MAX and not self._paused and self._wire is not None:
            self._paused = True
            self._wire.pause_reading()
        self._wake()

    def ended(self, error: Exception | None) -> bool:
        if error is None:
            self._ended = True
            self._wake()
            return True
        broke = httpx.ReadError("The connection of the tunnel broke.")
        broke.__cause__ = error
        self.fail(broke)
        return False

    def expired(self, writing: bool) -> None:
        self.fail(httpx.WriteTimeout("The upstream takes no more of what is written to the tunnel."))

    def fail(self, error: BaseException) -> None:
        wire, self._wire = self._wire, None
        if wire is None:
            return
        self._error = error
        wire.abort()
        if self._gone is not None and not self._gone.done():
            self._gone.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

"""One request and its answer on a connection: sends the request, waits for the answer, is the answer's byte stream.

    sending ──► waiting for the head ──► body ──► complete      the connection is free again, or closed
       │                       └────────► switched              the connection belongs to a tunnel
       └───────────────┴──────────────────┴─────► failed        the connection is closed at once

Owns nothing that outlives the answer: the socket and its deadlines belong to the `Wire` (connection.py). What the
bytes of the answer mean is said by `Incoming` (response.py).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

import httpx

from gateway.upstream.framing import Fields
from gateway.upstream.request import Outgoing
from gateway.upstream.response import Incoming
from gateway.upstream.timeouts import Deadlines
from gateway.upstream.tunnel import Tunnel
from gateway.upstream.upload import WRITE_BYTES, Upload
from gateway.upstream.wire import BUFFERED_BYTES_MAX, StaleConnection, Unanswered, Wire

#: Takes each interim answer: status, reason, fields.
Interim = Callable[[int, bytes, Fields], Awaitable[None]]


class Exchange(httpx.AsyncByteStream):
    """The answer's body as an `httpx.AsyncByteStream`; after `head()` also its head, in `incoming`. Is a `wire.User`.

    `pieces` is the same, with the chunks apart.
    """

    __slots__ = (
        "_asking",
        "_buffered_bytes",
        "_deadlines",
        "_error",
        "_heard",
        "_loop",
        "_paused",
        "_upload",
        "_waiter",
        "_wire",
        "incoming",
        "sent",
        "tunnel",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, wire: Wire, outgoing: Outgoing, deadlines: Deadlines, head_bytes_max: int
    ) -> None:
        self._loop = loop
        self._wire: Wire | None = wire
        self._deadlines = deadlines
        self.incoming = Incoming(outgoing, head_bytes_max)
        #: Every byte of the request was handed to the socket.
        self.sent = False
        #: What the connection became after a 101.
        self.tunnel: Tunnel | None = None
        self._buffered_bytes = 0
        #: `Expect: 100-continue` is unanswered and no byte of the body was sent.
        self._asking = False
        self._heard = self._paused = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._upload: Upload | None = None

    # -- the request ---------------------------------------------------------------------------------------------

    def send(self, outgoing: Outgoing) -> None:
        """The request is on its way: written at once when small, by a task of this exchange otherwise."""
        wire = self._wire
        assert wire is not None
        body = outgoing.body
        if isinstance(body, bytes) and len(body) <= WRITE_BYTES:
            wire.write(outgoing.head + body if body else outgoing.head)
            self._all_sent()
            return
        wire.write(outgoing.head)
        if outgoing.expects_continue and not isinstance(body, bytes):
            # Whoever waits for a 100 sends nothing, so no other deadline would ever end this.
            self._asking = True
            wire.watch_reading(self._deadlines.first_byte_s)
        write_s = self._deadlines.write_s
        self._upload = Upload(self._loop, wire, outgoing, write_s, self._asked, self._all_sent, self.fail)

    def _asked(self) -> None:
        """The body is wanted, or comes unasked."""
        if self._asking:
            self._asking = False
            if self._wire is not None and not self.incoming.answered:
                self._wire.unwatch_reading()

    def _all_sent(self) -> None:
        self._asking = False
        self.sent = True
        if self._wire is not None and not self.incoming.answered:
            self._wire.watch_reading(self._deadlines.first_byte_s)

    def _stop_upload(self) -> None:
        if self._upload is not None:
            self._upload.stop()

    # -- wire.User: the answer, as it arrives --------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        wire, incoming = self._wire, self.incoming
        if wire is None:
            return
        self._heard = True
        answered = incoming.answered
        try:
            incoming.feed(data)
        except httpx.RemoteProtocolError as exc:
            self.fail(exc)
            return
        if self._asking and any(status == 100 for status, _, _ in incoming.interims):
            self._asked()
        if not incoming.answered:
            if incoming.interims:
                self._wake()
            return
        if not answered and self._upload is not None and self._refused():
            self._upload.stop()
        if incoming.switched:
            self._switch(wire)
        elif incoming.complete:
            self._finish()
        else:
            wire.unwatch_reading()
            self._buffered_bytes += len(data)
            if self._buffered_bytes > BUFFERED_BYTES_MAX and not self._paused:
                self._paused = True
                wire.pause_reading()
        self._wake()

    def ended(self, error: Exception | None) -> bool:
        incoming = self.incoming
        if error is None and incoming.end():
            self._finish()
            self._wake()
            return False
        broke: httpx.TransportError
        if not self._heard:
            stale = self._wire is not None and self._wire.reused
            broke = (StaleConnection if stale else Unanswered)("The upstream closed the connection without an answer.")
        elif error is None:
            broke = httpx.RemoteProtocolError("The upstream closed the connection before the end of the answer.")
        else:
            kind = httpx.ReadError if self.sent or incoming.answered else httpx.WriteError
            broke = kind("The connection broke before the end of the answer.")
        broke.__cause__ = error
        self.fail(broke)
        return False

    def expired(self, writing: bool) -> None:
        if writing:
            self.fail(httpx.WriteTimeout("The upstream takes no more of the request."))
        elif self.incoming.answered:
            self.fail(httpx.ReadTimeout("The answer stopped arriving."))
        else:
            self.fail(httpx.ReadTimeout("The upstream did not begin to answer in time."))

    def fail(self, error: BaseException) -> None:
        """The exchange is over, its connection closed; whoever waits for the answer gets `error`."""
        if self._wire is None:
            return
        self._error = error
        wire, self._wire = self._wire, None
        self.incoming.drop()
        self._stop_upload()
        wire.abort()
        self._wake()

    def _refused(self) -> bool:
        """RFC 9112 §9.5: who is told so cleanly ceases to send; other answers may stream beside the request. And a
        client that was never told to go on sends nothing (RFC 9110 §10.1.1)."""
        incoming = self.incoming
        return incoming.status >= 400 or self._asking or not incoming.keep_alive

    def _switch(self, wire: Wire) -> None:
        if not self.sent:
            self.fail(httpx.RemoteProtocolError("The upstream switched protocols before it had the request."))
            return
        self._wire = None
        self.tunnel = Tunnel(self._loop, wire, self.incoming.early, self._deadlines.write_s)
        wire.hand_over(self.tunnel)

    def _finish(self) -> None:
        wire, self._wire = self._wire, None
        self._stop_upload()
        if wire is not None:
            if self._paused:
                wire.resume_reading()
            wire.finish(self.sent and self.incoming.keep_alive)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- the answer, as it is consumed ---------------------------------------------------------------------------

    async def head(self, interim: Interim | None) -> None:
        """Status and header fields are there; before that, `interim` has taken every interim answer, in order.

        Raises what ended the exchange before that, or before any content arrived.
        """
        incoming = self.incoming
        while incoming.interims or not (incoming.answered or self._error is not None):
            if not incoming.interims:
                await self._arrival()
                continue
            status, reason, fields = incoming.interims.pop(0)
            if interim is not None:
                await interim(status, reason, fields)
        if self._error is not None and not incoming.parts:
            raise self._error

    async def arrived(self) -> list[bytes]:
        """All content that has arrived: of an answer in chunks one element per chunk, or per part of one that arrived
        apart; of others one element. Cancelling it closes the connection.

        Raises StopAsyncIteration at the end of the answer, httpx.TransportError where it breaks off.
        """
        incoming = self.incoming
        while True:
            parts = incoming.parts
            if parts:
                incoming.parts = []
                self._buffered_bytes = 0
                if self._paused:
                    self._paused = False
                    if self._wire is not None:
                        self._wire.resume_reading()
                if len(parts) > 1 and incoming.framing != "chunked":
                    return [b"".join(parts)]
                return parts
            if self._error is not None:
                raise self._error
            if self._wire is None:
                raise StopAsyncIteration
            self._wire.watch_reading(self._deadlines.idle_s)
            try:
                await self._arrival()
            except asyncio.CancelledError:
                self.cut()
                raise

    def pieces(self) -> "Pieces":
        """The body as `arrived` gives it."""
        return Pieces(self)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """All content that has arrived, in one."""
        parts = await self.arrived()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _arrival(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def cut(self) -> None:
        """Nobody reads on: an unfinished exchange closes its connection at once, and never looks like a clean end."""
        cut_short = httpx.ReadError("The answer was closed before its end.")
        self.fail(cut_short)
        if self.incoming.parts:
            self.incoming.parts = []
            self._error = self._error or cut_short
        if self.tunnel is not None:
            self.tunnel.abort()

    async def aclose(self) -> None:
        """Nothing of this exchange goes on: neither the connection (unless it is free again), nor upload or tunnel."""
        self.cut()
        if self._upload is not None:
            await self._upload.ended()


class Pieces:
    """The body of an exchange, each item what had arrived: see `Exchange.arrived`."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __aiter__(self) -> AsyncIterator[list[bytes]]:
        return self

    def __anext__(self) -> Coroutine[None, None, list[bytes]]:
        return self._exchange.arrived()  # awaited by whoever iterates: one coroutine less per read of a stream

"""A request as it arrives and as the application receives it: bounded, framed, in order.

    arriving ──► received ──► the application has its end
       └───────► failed       malformed or late

Bytes are kept until they are received, up to a high-water mark at which the client is told to wait (TCP's window
closes). Owns nothing of the answer.
"""

import asyncio
from collections.abc import MutableMapping
from typing import Any, Protocol

from gateway.downstream.chunked import ChunkedBody
from gateway.downstream.request import Request, Unreadable

Message = MutableMapping[str, Any]

HIGH_WATER_BYTES = 65_536


class Wire(Protocol):
    """What an exchange asks of its connection."""

    #: The client reads slower than we write.
    write_paused: bool

    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def body_arrived(self) -> None: ...
    def take_early(self) -> bytes: ...
    def answered(self) -> None: ...


class Incoming:
    """`receive` is the application's; the rest is the connection's."""

    __slots__ = (
        "_awaits_continue",
        "_buffered_bytes",
        "_chunked",
        "_end_told",
        "_left_bytes",
        "_loop",
        "_paused",
        "_pieces",
        "_timeout_untold",
        "_waiter",
        "_wire",
        "complete",
        "failure",
        "gone",
        "input_ended",
        "keep_alive",
        "received",
        "request",
        "switched",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, wire: Wire, request: Request) -> None:
        self.request = request
        self._loop = loop
        self._wire = wire
        self._chunked = ChunkedBody() if request.body_bytes is None else None
        #: Of a body whose length is known.
        self._left_bytes = request.body_bytes or 0
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._paused = self._end_told = self._timeout_untold = False
        #: The client may hold its body back until it is told to go on, and has not been told.
        self._awaits_continue = request.head.expects_continue
        self._waiter: asyncio.Future[None] | None = None
        #: The last byte of the request is here.
        self.received = request.body_bytes == 0
        #: Why the request will never be complete; what the client gets unless the application answers.
        self.failure: Unreadable | None = None
        #: Nobody is there any more.
        self.gone = False
        self.input_ended = False
        #: The answer is complete.
        self.complete = False
        #: HTTP has ended here; bytes pass both ways as they are.
        self.switched = False
        #: The connection may serve another request; False as soon as that is ruled out.
        self.keep_alive = request.keep_alive

    # -- the connection's side -----------------------------------------------------------------------------------

    def feed(self, data: bytes) -> bytes:
        """Bytes from the client. Returns those behind the request. Raises Unreadable."""
        if self.input_ended:
            return b""
        if self.switched:
            self._keep(data)
            return b""
        if self.received:
            return data
        if self._chunked is not None:
            data = self._chunked.feed(data)
            self.received, rest = self._chunked.complete, self._chunked.rest
        else:
            rest = data[self._left_bytes :]
            if rest:
                data = data[: self._left_bytes]
            self._left_bytes -= len(data)
            self.received = not self._left_bytes
        if self.received:
            self._awaits_continue = False
            self._wire.body_arrived()
        self._keep(data)
        return rest

    def _keep(self, data: bytes) -> None:
        if data:
            self._pieces.append(data)
            self._buffered_bytes += len(data)
            if self._buffered_bytes > HIGH_WATER_BYTES and not self._paused:
                self._paused = True
                self._wire.pause_reading()
        self._wake()

    def fail(self, failure: Unreadable) -> None:
        """The rest of the request cannot be read: the application is told that the client has left."""
        self.failure = failure
        self.input_ended = True
        self.keep_alive = False
        self._wake()

    def time_out(self) -> None:
        """The body is late: the application is told so once, and may answer."""
        self.failure = Unreadable(408, "The request body did not arrive in time.")
        self._timeout_untold = True
        self.keep_alive = False
        self._wake()

    def end_input(self) -> None:
        """The client sends no more, but may still read."""
        self.input_ended = True
        self._wake()

    def leave(self) -> None:
        """Nobody is there any more: nothing is written, and what was not received never will be."""
        self.gone = self.input_ended = True
        self._wake()

    # -- the application's side ----------------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next message: what has arrived of the body, and `http.disconnect` once no more can come.

        A request that is cut short ends with `http.disconnect`, never with `more_body` False.
        """
        while True:
            if self.switched and self._pieces:
                return {"type": "http.request", "body": self._take(), "more_body": True}
            if self.input_ended or self.complete:
                return {"type": "http.disconnect"}
            if self._timeout_untold:
                self._timeout_untold = False
                return {"type": "http.request.timeout"}
            if self._pieces or (self.received and not self._end_told):
                return self._next_piece()
            await self._arrival()

    def _next_piece(self) -> Message:
        message: Message = {"type": "http.request", "body": self._take(), "more_body": not self.received}
        if self.received:
            self._end_told = True
            if self._chunked is not None and self._chunked.trailers:
                message["trailers"] = self._chunked.trailers
        return message

    def _take(self) -> bytes:
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        self._buffered_bytes = 0
        self._read_on()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_on(self) -> None:
        if self._paused:
            self._paused = False
            self._wire.resume_reading()

    async def _arrival(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("receive() is awaited already")
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

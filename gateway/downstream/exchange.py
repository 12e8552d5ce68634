"""A request with its answer: what the application sends becomes one well-framed message, or none.

    none ──► head held ──► body ──► (trailers) ──► complete
      └────► switched ──────────────────────────────┘

The head of an answer is held until a piece of its body comes, or until the event loop has had a turn: one write
less, and an answer that is complete at once can still say that the connection ends with it. Every later piece leaves
when it is sent.
"""

import asyncio

from gateway.downstream import answer
from gateway.downstream.answer import Framing
from gateway.downstream.incoming import Incoming, Message, Wire
from gateway.downstream.request import Field, Request


class Exchange(Incoming):
    """`receive` and `send` are the application's; the rest is the connection's."""

    __slots__ = (
        "_body_ended",
        "_body_left",
        "_framing",
        "_head",
        "_says_close",
        "_trailers",
        "_trailers_follow",
        "started",
        "task",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, wire: Wire, request: Request) -> None:
        super().__init__(loop, wire, request)
        #: The application at work.
        self.task: asyncio.Task[None] | None = None
        self.started = False
        #: Held: everything up to the empty line and what is to stand right before it.
        self._head: bytes | None = None
        self._says_close = self._trailers_follow = self._body_ended = False
        self._framing = Framing.NONE
        self._body_left = 0
        self._trailers: list[Field] = []

    @property
    def ends_with_connection(self) -> bool:
        """The client would take the end of the connection for the end of the answer."""
        return self._framing is Framing.CLOSE

    def flush(self) -> None:
        """A head that is still held is on its way."""
        if self._head is not None and not self.gone:
            self._wire.write(self._take_head())

    async def send(self, message: Message) -> None:
        """The message is on its way, and the client takes more. Nothing happens once the client is gone.

        Raises ValueError for what cannot be written, RuntimeError for a message out of order; then the connection
        is cut, unless the application has not started its answer and starts another one.
        """
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body":
            self._send_body(message)
        elif kind == "http.response.start":
            self._send_start(message)
        elif kind == "http.response.interim":
            self._send_interim(message)
        elif kind == "http.response.trailers":
            self._send_trailers(message)
        elif kind == "http.response.switch":
            self._send_switch(message)
        else:
            raise RuntimeError(f"unknown message {kind!r}")
        if self._wire.write_paused:
            await self._wire.drain()

    def _send_start(self, message: Message) -> None:
        if self.started:
            raise _out_of_order(message)
        begun = answer.start(
            message["status"],
            message.get("reason"),
            tuple(message.get("headers", ())),
            to_head=self.request.method == "HEAD",
            chunks_understood=self.request.version == "1.1",
        )
        self.started = True
        self._head, self._framing, self._body_left, self._says_close = begun
        self._trailers_follow = bool(message.get("trailers"))
        refused_early = message["status"] >= 400 and not self.received
        if self._says_close or self._awaits_continue or refused_early:
            # Who was never told to go on may send its body all the same, or never (RFC 9110 §10.1.1).
            self.keep_alive = False
        self._loop.call_soon(self.flush)

    def _take_head(self) -> bytes:
        head, self._head = self._head or b"", None
        return head + (b"\r\n" if self.keep_alive or self._says_close else b"Connection: close\r\n\r\n")

    def _send_body(self, message: Message) -> None:
        if not self.started or self._body_ended:
            raise _out_of_order(message)
        body: bytes = message.get("body", b"")
        last = not message.get("more_body", False)
        framing = self._framing
        if framing is Framing.CHUNKED:
            pieces = message.get("pieces")
            if pieces is not None:
                body = answer.chunks(pieces)
            elif body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if last and not self._trailers_follow:
                body += answer.LAST_CHUNK
        elif framing is Framing.LENGTH:
            self._body_left -= len(body)
            if self._body_left < 0 or (last and self._body_left):
                raise ValueError("the body of an answer is not as long as its Content-Length says")
        elif framing is Framing.NONE:
            body = b""
        if not last:
            self._write(body)
            return
        self._body_ended = True
        if self._trailers_follow:
            self._write(body)
        else:
            self._finish(body)

    def _send_trailers(self, message: Message) -> None:
        if not self._trailers_follow or not self._body_ended or self.complete:
            raise _out_of_order(message)
        self._trailers += message.get("headers", ())
        if not message.get("more_trailers", False):
            self._finish(answer.trailers(self._trailers) if self._framing is Framing.CHUNKED else b"")

    def _send_interim(self, message: Message) -> None:
        if self.started:
            raise _out_of_order(message)
        status: int = message["status"]
        data = answer.interim(status, message.get("reason"), tuple(message.get("headers", ())))
        if self.request.version == "1.1":
            self._awaits_continue = self._awaits_continue and status != 100
            self._wire.write(data)

    def _send_switch(self, message: Message) -> None:
        if self.started or not self.received or not self.request.head.upgrade:
            raise _out_of_order(message)
        data = answer.switch(message.get("reason"), tuple(message.get("headers", ())))
        early = self._wire.take_early()
        self.started = self.switched = True
        self._framing = Framing.RAW
        self._pieces = []
        self._wire.write(data)
        if early:
            self.feed(early)

    def _write(self, data: bytes) -> None:
        if self._head is not None:
            data = self._take_head() + data
        if data:
            self._wire.write(data)

    def _finish(self, data: bytes) -> None:
        """The answer is complete with `data`."""
        if not self.received:
            self.keep_alive = False
        self._write(data)
        self.complete = True
        if self._paused:
            self._read_on()
        if self._waiter is not None:
            self._wake()
        self._wire.answered()


def _out_of_order(message: Message) -> RuntimeError:
    return RuntimeError(f"the message {message['type']!r} is out of order")

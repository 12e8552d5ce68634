"""One request and its answer on a connection: sends the request, parses the answer, is the answer's byte stream.

    sending ──► waiting for the head ──► body ──► complete      the connection is free again, or closed
       └───────────────┴──────────────────┴─────► failed        the connection is closed at once

Owns nothing that outlives the answer: the socket and its deadlines belong to the `Wire` (connection.py). A parser
serves one exchange, so nothing of one answer can be read into the next.
"""

import asyncio
from collections.abc import AsyncIterator

import httptools
import httpx

from gateway.upstream.request import Outgoing
from gateway.upstream.timeouts import Deadlines
from gateway.upstream.upload import WRITE_BYTES, Upload
from gateway.upstream.wire import StaleConnection, Unanswered, Wire

#: Unread body at which the upstream is told to wait (TCP's window closes).
BUFFERED_BYTES_MAX = 65_536
_HEAD_END = b"\r\n\r\n"


class Exchange(httpx.AsyncByteStream):
    """The answer's body as an `httpx.AsyncByteStream`; after `head()` also its status and header fields."""

    __slots__ = (
        "_buffered_bytes",
        "_complete",
        "_deadlines",
        "_error",
        "_fields",
        "_head_bytes_max",
        "_head_only",
        "_heard",
        "_keep_alive",
        "_loop",
        "_parser",
        "_parts",
        "_paused",
        "_silent_bytes",
        "_unclean",
        "_upload",
        "_waiter",
        "_wire",
        "answered",
        "headers",
        "reason",
        "sent",
        "status",
        "trailers",
        "version",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, wire: Wire, outgoing: Outgoing, deadlines: Deadlines, head_bytes_max: int
    ) -> None:
        self._loop = loop
        self._wire: Wire | None = wire
        self._deadlines = deadlines
        self._head_bytes_max = head_bytes_max
        self._head_only = outgoing.head_only
        self._keep_alive = outgoing.keep_alive
        self.status = 0
        self.reason = b""
        self.version = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        #: The final answer's head is complete.
        self.answered = False
        #: Every byte of the request was handed to the socket.
        self.sent = False
        self._fields = self.headers
        self._parts: list[bytes] = []
        self._buffered_bytes = 0
        self._silent_bytes = 0
        self._heard = self._complete = self._unclean = self._paused = False
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._upload: Upload | None = None
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    # -- the request ---------------------------------------------------------------------------------------------

    def send(self, outgoing: Outgoing) -> None:
        """The request is on its way: written at once when small, by a task of this exchange otherwise."""
        assert self._wire is not None
        body = outgoing.body
        if isinstance(body, bytes) and len(body) <= WRITE_BYTES:
            self._wire.write(outgoing.head + body if body else outgoing.head)
            self._all_sent()
        else:
            self._wire.write(outgoing.head)
            self._upload = Upload(self._loop, self._wire, outgoing, self._deadlines.write_s, self._all_sent, self.fail)

    def _all_sent(self) -> None:
        self.sent = True
        if self._wire is not None and not self.answered:
            self._wire.watch_reading(self._deadlines.first_byte_s)

    def _stop_upload(self) -> None:
        if self._upload is not None:
            self._upload.stop()

    # -- the answer, as it arrives -------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Bytes from the upstream."""
        wire, parser = self._wire, self._parser
        if wire is None or parser is None:
            return
        self._heard = True
        self._silent_bytes += len(data)
        try:
            parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self._complete:
                error = httpx.RemoteProtocolError(f"The answer is malformed: {exc.__context__ or exc}")
                error.__cause__ = exc
                self.fail(error)
                return
            self._unclean = True  # bytes after an answer that was the last on this connection
        if self._complete:
            # A message without a body ends with its head; llhttp cannot know that for HEAD.
            if self._head_only and not (data.endswith(_HEAD_END) or _HEAD_END.endswith(data)):
                self._unclean = True
            self._finish()
        elif self._silent_bytes > self._head_bytes_max:
            self.fail(httpx.RemoteProtocolError(f"More than {self._head_bytes_max} bytes without content."))
            return
        elif self.answered:
            wire.unwatch_reading()
            if self._buffered_bytes > BUFFERED_BYTES_MAX and not self._paused:
                self._paused = True
                wire.pause_reading()
        else:
            return
        self._wake()

    def ended(self, error: Exception | None) -> None:
        """The upstream sends no more: in order (None) or because the connection broke."""
        if error is None and self.answered and not self._framed():
            self._complete = True
            self._unclean = True
            self._finish()
            self._wake()
        elif self._wire is not None and self._wire.reused and not self._heard:
            self._broke(StaleConnection("The upstream closed the kept connection without an answer."), error)
        elif self._heard:
            self._broke(httpx.RemoteProtocolError("The upstream closed the connection within the answer."), error)
        else:
            self._broke(Unanswered("The upstream closed the connection without an answer."), error)

    def expired(self, writing: bool) -> None:
        """The deadline of the current wait has passed."""
        if writing:
            self.fail(httpx.WriteTimeout("The upstream takes no more of the request."))
        elif self.answered:
            self.fail(httpx.ReadTimeout("The answer stopped arriving."))
        else:
            self.fail(httpx.ReadTimeout("The upstream did not begin to answer in time."))

    def fail(self, error: BaseException) -> None:
        """The exchange is over, its connection closed; whoever waits for the answer gets `error`."""
        if self._complete or self._error is not None:
            return
        self._error = error
        wire, self._wire, self._parser = self._wire, None, None
        self._stop_upload()
        if wire is not None:
            wire.abort()
        self._wake()

    def _broke(self, error: httpx.RemoteProtocolError, cause: Exception | None) -> None:
        error.__cause__ = cause
        self.fail(error)

    def _finish(self) -> None:
        wire, self._wire, self._parser = self._wire, None, None
        self._stop_upload()
        if wire is not None:
            wire.finish(self.sent and self._keep_alive and not self._unclean)

    def _framed(self) -> bool:
        """False for a body that ends with the connection (RFC 9112 §6.3, last rule)."""
        framing = {name.lower(): value.lower() for name, value in self.headers}
        if b"transfer-encoding" in framing:
            return framing[b"transfer-encoding"].rpartition(b",")[2].strip() == b"chunked"
        return b"content-length" in framing

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- httptools callbacks -------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._unclean = True  # nobody asked for a second answer

    def on_status(self, status: bytes) -> None:
        self.reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser is None or self._complete:
            return
        status = parser.get_status_code()
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise ValueError(f"version HTTP/{version}")
        if status < 100 or status == 101:
            raise ValueError(f"status {status} was not asked for")
        if self._silent_bytes > self._head_bytes_max:
            # The read that completed the head may hold much body too, so only now the exact size matters.
            if sum(len(name) + len(value) + 4 for name, value in self.headers) > self._head_bytes_max:
                raise ValueError(f"the head is larger than {self._head_bytes_max} bytes")
        if status < 200:
            # Interim answers (RFC 9110 §15.2) are not relayed; `_silent_bytes` bounds how many there may be.
            self.headers.clear()
            self.reason = b""
            return
        self.status = status
        self.version = b"HTTP/1.1" if version == "1.1" else b"HTTP/1.0"
        self.answered = True
        self._silent_bytes = 0
        self._fields = self.trailers
        self._complete = self._head_only
        if not parser.should_keep_alive():
            self._keep_alive = False
        if self._upload is not None and (status >= 400 or not self._keep_alive):
            # RFC 9112 §9.5: who is told so cleanly ceases to send. Other answers may stream beside the request.
            self._stop_upload()

    def on_body(self, data: bytes) -> None:
        if self._complete:
            self._unclean = True
            return
        self._parts.append(data)
        self._buffered_bytes += len(data)
        self._silent_bytes = 0

    def on_message_complete(self) -> None:
        if self.answered:
            self._complete = True

    # -- the answer, as it is consumed ---------------------------------------------------------------------------

    async def head(self) -> None:
        """Status and header fields are there. Raises what ended the exchange before that."""
        if not self.answered and self._error is None:
            await self._arrival()
        if self._error is not None and not self.answered:
            raise self._error

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """All body bytes that have arrived, at least one. Cancelling it closes the connection."""
        while True:
            parts = self._parts
            if parts:
                self._parts = []
                self._buffered_bytes = 0
                if self._paused:
                    self._paused = False
                    if self._wire is not None:
                        self._wire.resume_reading()
                return parts[0] if len(parts) == 1 else b"".join(parts)
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
        if self._parts:
            self._parts = []
            self._error = self._error or cut_short

    async def aclose(self) -> None:
        """Nothing of this exchange goes on: neither the connection (unless it is free again) nor the upload."""
        self.cut()
        if self._upload is not None:
            await self._upload.ended()

"""A request body too large to be written at once, or still arriving, on its way to the upstream.

Owns the task that writes it beside the reading of the answer, and how it is stopped. What the end of the upload means
for the exchange is told to it through two callbacks.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence

import httpx

from gateway.upstream.request import Outgoing, last_chunk
from gateway.upstream.wire import Wire

#: Size of the pieces that bytes are written in; smaller bodies need no upload.
WRITE_BYTES = 65_536
#: A body that is being cancelled gets this long to clean up before it is left behind.
_END_S = 1.0


class Upload:
    """Writes the body of `outgoing` from now on.

    begun: called before the first byte of the body is written. sent: called once every byte was handed to the socket.
    failed: called with what ended the upload before that, or with LocalProtocolError for a body that is longer than
    announced or for trailers that cannot be sent; never after `stop`.
    """

    __slots__ = ("_begun", "_failed", "_sent", "_stopped", "_task", "_wire", "_write_s")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        wire: Wire,
        outgoing: Outgoing,
        write_s: float,
        begun: Callable[[], None],
        sent: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._wire = wire
        self._write_s = write_s
        self._begun = begun
        self._sent = sent
        self._failed = failed
        self._stopped = False
        body = outgoing.body
        if isinstance(body, bytes):
            sending = self._send(_slices(body), len(body), ())
        else:
            sending = self._send(body, outgoing.length_bytes, outgoing.trailers)
        self._task = loop.create_task(sending)
        self._task.add_done_callback(self._ended)

    def stop(self) -> None:
        """Nothing more is written and nothing more reported."""
        self._stopped = True
        self._task.cancel()

    async def ended(self) -> None:
        """A stopped upload lets go of its body, within a bounded time."""
        if not self._task.done():
            await asyncio.wait({self._task}, timeout=_END_S)

    async def _send(
        self,
        body: AsyncIterable[bytes | memoryview],
        length_bytes: int | None,
        trailers: Sequence[tuple[bytes, bytes]],
    ) -> None:
        wire, sent_bytes = self._wire, 0
        if length_bytes == 0:
            self._sent()
        async for piece in body:
            if self._stopped:
                return  # `body` ignores its cancellation; the connection may be somebody else's by now
            if not piece:
                continue
            if not sent_bytes:
                self._begun()
            sent_bytes += len(piece)
            if length_bytes is None:
                wire.write(b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")))
            elif sent_bytes > length_bytes:
                raise httpx.LocalProtocolError(f"The body is longer than its Content-Length {length_bytes}.")
            else:
                wire.write(piece)
                if sent_bytes == length_bytes:
                    self._sent()
            await wire.drain(self._write_s)
        if self._stopped:
            return
        if length_bytes is None:
            wire.write(last_chunk(trailers))
            self._sent()
        elif sent_bytes != length_bytes:
            raise httpx.LocalProtocolError(f"The body ended after {sent_bytes} of {length_bytes} bytes.")

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            error: BaseException | None = httpx.WriteError("The request body was cancelled.")
        else:
            error = task.exception()
        if error is not None and not self._stopped:
            self._failed(error)


async def _slices(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for start in range(0, len(body), WRITE_BYTES):
        yield view[start : start + WRITE_BYTES]

"""The client's side of one request: its bounded body, its leaving, and the way back to it.

A pump reads from the client all the time, up to a high-water mark, so that a client that leaves is noticed at once,
in any phase: while its body, the hold, a connection or the first byte is awaited, and mid-stream. Leaving cancels
the walk's task (as `asyncio.timeout` does), unless the walk asked to go on without it (`finish_without`); `left`
tells that cancellation from any other. Nothing here knows why a request is refused or where it is forwarded.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from gateway.downstream.head import Head
from gateway.errors import BadRequest, BodyTooLarge, ClientLeft, RequestTimeout

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Field = tuple[bytes, bytes]

#: Body bytes taken from the client ahead of whoever reads them.
HIGH_WATER_BYTES = 256 * 1024


class Client:
    """Used by one walk, in the task that makes it."""

    def __init__(self, receive: Receive, send: Send, patience: "Patience", head: Head | None = None) -> None:
        """head: what a connection of ours knows beside the ASGI scope; None under another server."""
        self._receive = receive
        self._send = send
        self._patience = patience
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._body_complete = False
        self._late = False
        #: Another protocol is spoken; and the client has ended its side of it.
        self._switched = self._ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._walk = asyncio.current_task()
        self._finished = False
        self._asks = head is not None and head.expects_continue
        self._goes_on: Callable[[], bool] = _never
        self._alone_ms = 0
        self._alone_bytes_max = 0
        self._alone: asyncio.TimerHandle | None = None
        #: The client closed its connection before the answer was complete.
        self.left = False
        #: The head of an answer has been sent; from here on a refusal can no longer become a response.
        self.started = False
        self.sent_bytes = 0
        #: Fields behind a chunked body; filled when the body has ended.
        self.trailers: list[Field] = []
        self._pump = asyncio.create_task(self._run_pump())

    # The request

    async def whole_body(self, body_bytes_max: int) -> bytes:
        """The complete body. Raises BodyTooLarge past the bound, RequestTimeout when the client stalls."""
        body = await self.arrived()
        if body is None:
            if self._asks:
                await self.interim(100, b"Continue", [])
            return b"".join([chunk async for chunk in self.body(body_bytes_max)])
        if len(body) > body_bytes_max:
            raise too_large(body_bytes_max)
        return body

    async def body(self, body_bytes_max: int) -> AsyncIterator[bytes]:
        """The body in the pieces it arrives in; a reader that is slow slows the client."""
        total_bytes = 0
        while True:
            while self._chunks:
                chunk = self._chunks.popleft()
                self._buffered_bytes -= len(chunk)
                self._room.set()
                total_bytes += len(chunk)
                if total_bytes > body_bytes_max:
                    raise too_large(body_bytes_max)
                yield chunk
            if self._body_complete:
                return
            await self._more()

    async def raw(self) -> bytes:
        """The next bytes after `switch`, or b"" when the client has ended. Waits without a deadline."""
        while not self._chunks and not self._ended and not self.left:
            self._changed.clear()
            await self._changed.wait()
        chunks = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered_bytes = 0
        self._room.set()
        return chunks

    async def arrived(self) -> bytes | None:
        """The whole body when it is here already, or comes with the head; None when more of it is awaited.
        A body that fits one read can be sent again to another upstream, a stream cannot."""
        if not self._body_complete and not self._chunks:
            await asyncio.sleep(0)
        if not self._body_complete:
            return None
        body = b"".join(self._chunks)
        self._chunks.clear()
        self._buffered_bytes = 0
        self._room.set()
        return body

    async def _more(self) -> None:
        """Something has changed: bytes, the end, or the client has left."""
        if self.left:  # never an empty or shortened body in place of one that did not arrive
            raise ClientLeft
        if self._late:
            raise RequestTimeout
        self._changed.clear()
        try:
            async with asyncio.timeout(self._patience.idle_s):
                await self._changed.wait()
        except TimeoutError as exc:
            raise RequestTimeout from exc

    async def _run_pump(self) -> None:
        while True:
            message = await self._receive()
            match message["type"]:
                case "http.disconnect":
                    self._leave()
                    return
                case "http.request.timeout":
                    self._late = True
                    self._changed.set()
                    continue
            if chunk := message.get("body", b""):
                self._chunks.append(chunk)
                self._buffered_bytes += len(chunk)
            if not message.get("more_body", False):
                self.trailers.extend(message.get("trailers", ()))
                self._body_complete = True
            self._changed.set()
            while self._buffered_bytes >= HIGH_WATER_BYTES:
                self._room.clear()
                await self._room.wait()

    # Leaving

    def finish_without(self, goes_on: Callable[[], bool], timeout_ms: int, bytes_max: int) -> None:
        """A client that leaves while `goes_on()` is true does not end the walk: the answer is read on and thrown
        away, until it is complete, `timeout_ms` have passed or more than `bytes_max` were read."""
        self._goes_on, self._alone_ms, self._alone_bytes_max = goes_on, timeout_ms, bytes_max

    def _leave(self) -> None:
        if self._finished:  # servers also say `disconnect` once the answer is complete
            return
        if self._switched:
            self._ended = True  # in order, or not: the other protocol knows what it has to say to that
            self._changed.set()
            return
        if not self._goes_on():
            self.give_up()
            return
        self.left = True
        self._changed.set()
        self._alone = asyncio.get_running_loop().call_later(self._alone_ms / 1000, self.give_up)

    def give_up(self) -> None:
        """The client is gone, or as good as gone: what the walk waits for, it need not wait for any more."""
        self.left = True
        self._changed.set()
        if self._walk is not None:
            self._walk.cancel()

    # The answer

    async def interim(self, status: int, reason: bytes, fields: Iterable[Field]) -> None:
        """A 1xx is on its way. The first 100 is what a client waits for that expects to be asked for its body."""
        if status == 100:
            self._asks = False
        message = {"type": "http.response.interim", "status": status, "reason": reason, "headers": list(fields)}
        await self._deliver(message)

    async def switch(self, reason: bytes, fields: Iterable[Field]) -> None:
        """A 101 is on its way; from here on `raw` and `write` carry another protocol. Raises BadRequest for a client
        that did not wait for it."""
        self.started = self._switched = True
        try:
            await self._deliver({"type": "http.response.switch", "reason": reason, "headers": list(fields)})
        except RuntimeError as exc:  # nothing was written
            self.started = self._switched = False
            raise BadRequest("The client sent too much before the protocol was switched.") from exc

    async def start(
        self, status: int, fields: Iterable[Field], *, reason: bytes | None = None, trailers: bool = False
    ) -> None:
        """The head is on its way. reason: None for the standard phrase. trailers: `finish` may bring some."""
        self.started = True
        message: Message = {"type": "http.response.start", "status": status, "headers": list(fields)}
        if reason is not None:
            message["reason"] = reason
        if trailers:
            message["trailers"] = True
        await self._deliver(message)

    async def write(self, pieces: Sequence[bytes]) -> None:
        """`pieces` are on their way, each a chunk of its own where the answer is chunked; waits while the client reads
        slower than we write."""
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self.left:
            self._alone_bytes_max -= len(body)
            if self._alone_bytes_max < 0:
                raise ClientLeft
            return
        self.sent_bytes += len(body)
        await self._deliver({"type": "http.response.body", "body": body, "pieces": pieces, "more_body": True})

    async def finish(self, body: bytes = b"", trailers: Sequence[Field] | None = None) -> None:
        """The answer is complete. trailers: exactly when `start` announced them, possibly none."""
        self.sent_bytes += len(body)
        self._finished = True
        await self._deliver({"type": "http.response.body", "body": body, "more_body": False})
        if trailers is not None:
            await self._deliver({"type": "http.response.trailers", "headers": trailers, "more_trailers": False})

    async def _deliver(self, message: Message) -> None:
        if self.left:
            return
        self._patience.begins(self)
        try:
            await self._send(message)
        except OSError as exc:  # some servers say so that the client is gone
            self.left = True
            raise ClientLeft from exc
        finally:
            self._patience.ends(self)

    def close(self) -> None:
        """The walk is over; nothing of it is cancelled any more."""
        self._finished = True
        self._pump.cancel()
        if self._alone is not None:
            self._alone.cancel()


class Patience:
    """How long a client may leave the gateway waiting. One that does not read is given up after `idle_ms`.

    All share one timer, because hardly any message to a client ever waits, and a timer for each would cost more than
    the sending itself.
    """

    def __init__(self, idle_ms: int) -> None:
        self.idle_s = idle_ms / 1000
        #: When each message that is being sent must be gone. All wait equally long, so the oldest is due first.
        self._due: dict[Client, float] = {}
        self._alarm: asyncio.TimerHandle | None = None

    def begins(self, client: Client) -> None:
        loop = asyncio.get_running_loop()
        self._due[client] = loop.time() + self.idle_s
        if self._alarm is None:
            self._alarm = loop.call_later(self.idle_s, self._ring)

    def ends(self, client: Client) -> None:
        self._due.pop(client, None)

    def _ring(self) -> None:
        self._alarm = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        for client, due in tuple(self._due.items()):
            if due > now:
                self._alarm = loop.call_at(due, self._ring)
                return
            del self._due[client]
            client.give_up()


def too_large(body_bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than the {body_bytes_max} bytes this route allows.")


def _never() -> bool:
    return False

"""The client's side of one request: what its head says, its bounded body, its leaving, and the way back to it.

A pump reads from the client all the time, up to a high-water mark, so that a client that leaves is noticed at once,
in any phase: while its body, the hold, a connection or the first byte is awaited, and mid-stream. Leaving cancels
the walk's task (as `asyncio.timeout` does); `left` tells that cancellation from any other. Nothing here knows why a
request is refused or where it is forwarded.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from gateway.errors import BodyTooLarge, ClientLeft, RequestTimeout

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Body bytes taken from the client ahead of whoever reads them.
HIGH_WATER_BYTES = 256 * 1024


class Client:
    """Used by one walk, in the task that makes it."""

    def __init__(self, receive: Receive, send: Send, patience: "Patience") -> None:
        self._receive = receive
        self._send = send
        self._patience = patience
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._body_complete = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._walk = asyncio.current_task()
        self._finished = False
        #: The client closed its connection before the answer was complete.
        self.left = False
        #: The head of an answer has been sent; from here on a refusal can no longer become a response.
        self.started = False
        self.sent_bytes = 0
        self._pump = asyncio.create_task(self._run_pump())

    # The request

    async def whole_body(self, body_bytes_max: int) -> bytes:
        """The complete body. Raises BodyTooLarge past the bound, RequestTimeout when the client stalls."""
        body = await self.arrived()
        if body is None:
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
            if self.left:  # never an empty or shortened body in place of one that did not arrive
                raise ClientLeft
            self._changed.clear()
            try:
                async with asyncio.timeout(self._patience.idle_s):
                    await self._changed.wait()
            except TimeoutError as exc:
                raise RequestTimeout from exc

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

    async def _run_pump(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._leave()
                return
            if chunk := message.get("body", b""):
                self._chunks.append(chunk)
                self._buffered_bytes += len(chunk)
            if not message.get("more_body", False):
                self._body_complete = True
            self._changed.set()
            while self._buffered_bytes >= HIGH_WATER_BYTES:
                self._room.clear()
                await self._room.wait()

    def _leave(self) -> None:
        if not self._finished:  # servers also say `disconnect` once the answer is complete
            self.give_up()

    def give_up(self) -> None:
        """The client is gone, or as good as gone: what the walk waits for, it need not wait for any more."""
        self.left = True
        self._changed.set()
        if self._walk is not None:
            self._walk.cancel()

    # The answer

    async def start(self, status: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._deliver({"type": "http.response.start", "status": status, "headers": list(fields)})

    async def write(self, chunk: bytes) -> None:
        """`chunk` is on its way; waits while the client reads slower than we write."""
        self.sent_bytes += len(chunk)
        await self._deliver({"type": "http.response.body", "body": chunk, "more_body": True})

    async def finish(self, chunk: bytes = b"") -> None:
        """The answer is complete."""
        self.sent_bytes += len(chunk)
        self._finished = True
        await self._deliver({"type": "http.response.body", "body": chunk, "more_body": False})

    async def _deliver(self, message: Message) -> None:
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

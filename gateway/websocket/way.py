"""One direction of an open WebSocket: bytes are passed on as they come, frame by frame accounted for.

    passing ──a close of ours is due, at a frame's end──▶ silent
    passing ──a message too big, or not admitted────────▶ silent

A silent way forwards nothing more; it reads on until its source has said Close, so that the source can finish too.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import GatewayError
from gateway.types import Refusal
from gateway.websocket.closing import Closing, not_admitted, too_big
from gateway.websocket.frames import CLOSE, MASK_BYTES, Header, Messages, close_code, parse


class Side(Protocol):
    """One end's connection, from the first byte behind the 101. Errors are GatewayError or OSError."""

    @property
    def gone(self) -> bool:
        """Nobody is there any more, so nobody need be told anything."""
        ...

    async def read(self) -> bytes:
        """What came, in the size of one read; b"" when the end has closed its sending side in order."""
        ...

    async def write(self, data: bytes) -> None:
        """`data` is on its way; waits while the end takes it slower than we give it."""
        ...

    async def aclose(self) -> None:
        """Everything written is delivered, then the connection ends in order."""
        ...

    def abort(self) -> None:
        """The connection is cut; nothing happens when it has ended already."""
        ...


@dataclass(slots=True)
class Message:
    """One message of the client that asks to be admitted."""

    #: 1 for the first of the connection.
    number: int
    #: The upstream may have seen a byte of it. Leaving the admission without this gives everything back.
    forwarded: bool = False


AdmitMessage = Callable[[Message], AbstractAsyncContextManager[Refusal | None]]


class Watch:
    """What the two ways of a WebSocket tell the relay around them."""

    __slots__ = ("changed", "closing", "code", "ended", "last_byte_at")

    def __init__(self) -> None:
        #: Event loop's time of the last byte from either end.
        self.last_byte_at = asyncio.get_running_loop().time()
        #: Something here or in a way is different now.
        self.changed = asyncio.Event()
        #: Why the gateway ends it; None while it does not.
        self.closing: Closing | None = None
        #: The way that ended first.
        self.ended: Way | None = None
        #: Of the first close frame that either end, or the gateway, sent; None when it named none.
        self.code: int | None = None

    @property
    def over(self) -> bool:
        return self.closing is not None or self.ended is not None

    def close(self, closing: Closing) -> None:
        """The gateway ends it, for the first reason that it is given."""
        if self.closing is None:
            self.closing = closing
            self.changed.set()


class _Broken(Exception):
    """A side failed; the cause says how."""

    def __init__(self, side: Side) -> None:
        self.side = side


class Way:
    """From `source` to `sink`; `run()` until the source has ended, either end broke, or all is said."""

    def __init__(
        self, source: Side, sink: Side, watch: Watch, message_bytes_max: int, admit: AdmitMessage | None = None
    ) -> None:
        self.source = source
        self.sink = sink
        self._watch = watch
        self._message_bytes_max = message_bytes_max
        self._admit = admit
        #: Held while bytes are passed on, so that a close of ours never falls into the middle of a frame.
        self._turn = asyncio.Lock()
        self._messages = Messages()
        #: The frame that has begun, and how much of it is still to come.
        self._frame: Header | None = None
        self._left_bytes = 0
        #: The first bytes behind a close frame's header: the mask and the code.
        self._close_rest = b""
        #: The beginning of a header that is not whole yet.
        self._held = b""
        self._goodbye = b""
        self._silent = False
        self.forwarded_bytes = 0
        #: The source has said Close; and that has been passed on.
        self.said_close = False
        self.passed_close = False
        #: `run` is over: the source ended in order (`eof`), or `broken` failed, or all is said.
        self.ended = False
        self.eof = False
        self.broken: Side | None = None

    @property
    def messages(self) -> int:
        """Messages that began to pass."""
        return self._messages.count

    @property
    def stuck(self) -> bool:
        """It ended within a frame: the sink can be told nothing more, it can only be cut."""
        return self.ended and not self._silent and self._frame is not None

    async def run(self) -> None:
        """The source has ended, either end broke, or all is said."""
        try:
            await self._pass()
        except _Broken as broken:
            self.broken = broken.side
        self.ended = True
        self._watch.ended = self._watch.ended or self
        self._watch.changed.set()

    async def _pass(self) -> None:
        loop = asyncio.get_running_loop()
        while not (self._silent and self.said_close):
            data = await self._read()
            if not data:
                self.eof = True
                return
            self._watch.last_byte_at = loop.time()
            async with self._turn:
                await self._take(data)

    async def say(self, goodbye: bytes) -> None:
        """The close frame `goodbye` is sent as soon as no frame is under way, and nothing after it. Not sent behind
        the source's own Close, nor when the way ends within a frame."""
        self._goodbye = goodbye
        async with self._turn:
            if self._silent or self._frame is None:
                try:
                    await self._say_goodbye()
                except _Broken as broken:
                    self.broken = broken.side
                    self._watch.changed.set()

    async def _say_goodbye(self) -> None:
        goodbye, self._goodbye, self._silent = self._goodbye, b"", True
        if goodbye and not self.passed_close:
            await self._write(goodbye)

    async def _take(self, data: bytes) -> None:
        """Everything in `data` that may pass has passed, but for a header's beginning."""
        if self._held:
            data, self._held = self._held + data, b""
        begin = at = 0
        while True:
            at = self._through_frame(data, at)
            if self._frame is not None:
                break
            if self._goodbye and not self._silent:
                await self._forward(data[begin:at])
                await self._say_goodbye()
            header = parse(data, at)
            if header is None:
                self._held = data[at:]
                break
            if not self._silent:
                if self._messages.bytes_with(header) > self._message_bytes_max:
                    await self._forward(data[begin:at])
                    self._stop(too_big(self._message_bytes_max))
                elif self._admit is not None and self._messages.begins(header):
                    await self._forward(data[begin:at])
                    begin = at = await self._forward_admitted(self._admit, header, data, at)
                    continue
                else:
                    self._messages.add(header)
            at = self._enter(header, at)
        if not self._silent:
            await self._forward(data[begin:at] if begin or at < len(data) else data)

    async def _forward_admitted(self, admit: AdmitMessage, header: Header, data: bytes, at: int) -> int:
        """A message begins at `data[at]`: what is there of its first frame has passed, or the way is silent now.
        Returns where that ends."""
        message = Message(self._messages.count + 1)
        try:
            async with admit(message) as refusal:
                if refusal is not None:
                    self._stop(not_admitted(refusal))
                elif self._watch.over:
                    self._silent = True  # it ended while we asked: what is not forwarded costs nothing
                else:
                    self._messages.add(header)
                    end = self._through_frame(data, self._enter(header, at))
                    message.forwarded = True
                    await self._forward(data[at:end])
                    return end
        except GatewayError as exc:
            if message.forwarded:
                raise
            self._stop(not_admitted(exc.refusal()))
        return self._through_frame(data, self._enter(header, at))

    def _stop(self, closing: Closing) -> None:
        self._silent = True
        self._watch.close(closing)

    def _enter(self, header: Header, at: int) -> int:
        self._frame, self._left_bytes, self._close_rest = header, header.rest_bytes, b""
        return at + header.header_bytes

    def _through_frame(self, data: bytes, at: int) -> int:
        """Where in `data` the frame that is under way ends, or `data` does."""
        frame = self._frame
        if frame is None:
            return at
        end = min(at + self._left_bytes, len(data))
        if frame.opcode == CLOSE:
            self._close_rest = (self._close_rest + data[at:end])[: MASK_BYTES + 2]
        self._left_bytes -= end - at
        if self._left_bytes == 0:
            self._frame = None
            if frame.opcode == CLOSE and not self.said_close:
                self._closed(close_code(frame, self._close_rest))
        return end

    def _closed(self, code: int | None) -> None:
        self.said_close = True
        self.passed_close = not self._silent
        if self._watch.code is None and self._watch.closing is None:
            self._watch.code = code
        self._watch.changed.set()

    async def _read(self) -> bytes:
        try:
            return await self.source.read()
        except (GatewayError, OSError) as exc:
            raise _Broken(self.source) from exc

    async def _forward(self, data: bytes) -> None:
        if data:
            self.forwarded_bytes += len(data)
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            await self.sink.write(data)
        except (GatewayError, OSError) as exc:
            raise _Broken(self.sink) from exc

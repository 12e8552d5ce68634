"""Ends of a WebSocket for tests: in memory, or sockets; and a door that has nothing but the room behind it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from websockets.utils import apply_mask

from gateway.config import WebSocket
from gateway.errors import UpstreamBroke
from gateway.types import Refusal
from gateway.websocket import AdmitMessage, Ended, Message, Relay, Side

TEXT, BINARY, CLOSE, PING, PONG, CONTINUATION = 1, 2, 8, 9, 10, 0
KEY = b"\x37\xfa\x21\x3d"


def masked(payload: bytes, key: bytes = KEY) -> bytes:
    return bytes(apply_mask(payload, key))


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    key: bytes | None = KEY,
    length: int | None = None,
    wide: int = 0,
) -> bytes:
    """One frame, valid or not. key: None leaves it unmasked. length: the one it claims. wide: bytes of the length's
    form, 2 or 8; else the shortest."""
    claimed = len(payload) if length is None else length
    form = wide or (0 if claimed < 126 else 2 if claimed < 65536 else 8)
    short = {0: claimed, 2: 126, 8: 127}[form]
    head = bytes([(fin << 7) | (rsv << 4) | opcode, (0x80 if key is not None else 0) | short])
    head += claimed.to_bytes(form) if form else b""
    return head + payload if key is None else head + key + masked(payload, key)


def close(code: int | None = 1000, reason: bytes = b"", *, key: bytes | None = KEY) -> bytes:
    return frame(CLOSE, b"" if code is None else code.to_bytes(2) + reason, key=key)


class End:
    """An end in memory: the test says what it sends and sees what it got."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes | Exception] = asyncio.Queue()
        self.got = bytearray()
        self.writes: list[int] = []
        self.takes = asyncio.Event()
        self.takes.set()
        #: Raised by the next write.
        self.failure: Exception | None = None
        self.closed = False
        self.aborted = False
        self.gone = False

    def sends(self, *pieces: bytes | Exception) -> None:
        for piece in pieces:
            self.sent.put_nowait(piece)

    async def read(self) -> bytes:
        piece = await self.sent.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def write(self, data: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.got += data
        self.writes.append(len(data))
        await self.takes.wait()

    async def aclose(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class SocketSide:
    """A side on a socket of asyncio's."""

    gone = False

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self) -> bytes:
        return await self._reader.read(65536)

    async def write(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise UpstreamBroke
        self._writer.write(data)
        await self._writer.drain()

    async def aclose(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    def abort(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def free(_: Message) -> AsyncIterator[Refusal | None]:
    yield None


@dataclass
class Door:
    """Forwards each connection's handshake as it is, and relays once the upstream has answered."""

    address: str = ""
    ended: list[Ended] = field(default_factory=list)
    open: set[asyncio.Task[None]] = field(default_factory=set)

    def shut(self) -> None:
        for task in self.open:
            task.cancel()


@asynccontextmanager
async def door(upstream: tuple[str, int], rules: WebSocket, admit: AdmitMessage = free) -> AsyncIterator[Door]:
    this = Door()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        this.open.add(task)
        with suppress(asyncio.CancelledError, asyncio.IncompleteReadError, OSError):
            up_reader, up_writer = await asyncio.open_connection(*upstream)
            up_writer.write(await reader.readuntil(b"\r\n\r\n"))
            writer.write(await up_reader.readuntil(b"\r\n\r\n"))
            sides: tuple[Side, Side] = SocketSide(reader, writer), SocketSide(up_reader, up_writer)
            relay = Relay(*sides, rules, admit)
            try:
                await relay.run()
            finally:
                this.ended.append(relay.ended())
                for side in sides:
                    side.abort()
        this.open.discard(task)

    listening = await asyncio.start_server(visit, "127.0.0.1", 0)
    this.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield this
    finally:
        listening.close()
        this.shut()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*this.open, return_exceptions=True)

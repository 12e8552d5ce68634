"""An echo server whose answers depend on nothing but the bytes it gets: the `websockets` library's protocol, without
its event loop. What it says to a stream does not change with how TCP cut that stream up."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from websockets.exceptions import InvalidHandshake
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import OPEN, Event
from websockets.server import ServerProtocol

MESSAGE_BYTES_MAX = 64 << 20


class Echo:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = ServerProtocol(
            extensions=[ServerPerMessageDeflateFactory(compress_settings={"memLevel": 5})],
            max_size=MESSAGE_BYTES_MAX,
        )
        self._message: list[bytes] = []
        self._opcode = Opcode.TEXT

    async def serve(self) -> None:
        """The connection has ended."""
        try:
            self._take(await self._reader.readuntil(b"\r\n\r\n"))
            while True:
                # One frame at a time, so that a pong and an echo are in the same order every time.
                self._take(await self._frame())
                await self._writer.drain()
        except asyncio.IncompleteReadError as exc:
            self._take(exc.partial)
        self._protocol.receive_eof()
        self._flush()

    async def _frame(self) -> bytes:
        head = await self._reader.readexactly(2)
        length = head[1] & 0x7F
        if length >= 126:
            more = await self._reader.readexactly(2 if length == 126 else 8)
            head, length = head + more, int.from_bytes(more)
        return head + await self._reader.readexactly(length + (4 if head[1] & 0x80 else 0))

    def _take(self, data: bytes) -> None:
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            self._answer(event)
        self._flush()

    def _answer(self, event: Event) -> None:
        protocol = self._protocol
        if isinstance(event, Request):
            with suppress(InvalidHandshake):
                response = protocol.accept(event)
                del response.headers["Date"]
                protocol.send_response(response)
        elif isinstance(event, Frame) and event.opcode in DATA_OPCODES and protocol.state is OPEN:
            if event.opcode is not Opcode.CONT:
                self._message, self._opcode = [], event.opcode
            self._message.append(bytes(event.data))
            if event.fin:
                self._echo(b"".join(self._message))

    def _echo(self, message: bytes) -> None:
        if self._opcode is Opcode.BINARY:
            self._protocol.send_binary(message)
            return
        try:
            message.decode()
        except UnicodeDecodeError:
            self._protocol.fail(1007, "invalid UTF-8")
        else:
            self._protocol.send_text(message)

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._writer.write(data)
            elif self._writer.can_write_eof():
                self._writer.write_eof()


@asynccontextmanager
async def echo_server() -> AsyncIterator[tuple[str, int]]:
    """Where it listens."""
    tasks: set[asyncio.Task[None]] = set()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await Echo(reader, writer).serve()
        finally:
            tasks.discard(task)
            writer.transport.abort()

    listening = await asyncio.start_server(visit, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[:2]
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

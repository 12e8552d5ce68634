"""One connection of a storm's client: what has arrived on it, and the ways to leave."""

import asyncio
import socket
import struct
from typing import cast

from tests.walk.storm.reading import Reader

WAYS = ("close", "reset", "half_close")
LINGER_NOT = struct.pack("ii", 1, 0)


class Line(asyncio.Protocol):
    """A client's connection."""

    def __init__(self) -> None:
        self.reader = Reader()
        self.received = 0
        self.lost = False
        self.transport: asyncio.Transport
        self._stirred: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        self.reader.feed(data)
        self._stir()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._stir()

    def _stir(self) -> None:
        if self._stirred is not None and not self._stirred.done():
            self._stirred.set_result(None)

    async def stirred(self) -> None:
        """More has arrived, or the connection is lost."""
        self._stirred = asyncio.get_running_loop().create_future()
        try:
            await self._stirred
        finally:
            self._stirred = None

    async def answered(self, count: int = 1) -> bool:
        """`count` whole answers are there; False when the connection ended before."""
        while len(self.reader.done) < count and not self.lost:
            await self.stirred()
        return len(self.reader.done) >= count

    async def leave(self, way: str) -> None:
        """The gateway is told in this way that nobody is there any more."""
        if self.lost:
            return
        if way == "half_close":
            self.transport.write_eof()
            while not self.lost:
                await self.stirred()
            return
        if way == "reset":
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.transport.close()

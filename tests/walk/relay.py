"""A TCP relay between the gateway and a store: what stands behind it can vanish, freeze and come back elsewhere."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit


class Relay:
    """Listens on a port of its own for as long as the test lasts."""

    def __init__(self, host: str, port: int) -> None:
        self.target: tuple[str, int] | None = (host, port)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ("", 0)

    def cut(self) -> None:
        """Nobody is there any more: connections are reset, new ones too."""
        self.target = None
        for writer in self._writers:
            writer.transport.abort()

    def restore(self, host: str, port: int) -> None:
        self.target = (host, port)

    def freeze(self) -> None:
        """Connections stay open and not a byte passes."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._flowing.wait()
            if self.target is not None:
                await self._relay(reader, writer, *self.target)
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's own stream callback would report it as an error
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            return
        self._writers.add(far_writer)
        try:
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pump(reader, far_writer)),
                    asyncio.ensure_future(self._pump(far_reader, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            self._writers.discard(far_writer)
            far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def relay(url: str) -> AsyncIterator[tuple[Relay, str]]:
    """A relay to the server of `url`, and the same URL through the relay."""
    parts = urlsplit(url)
    between = Relay(parts.hostname or "", parts.port or 0)
    listening = await asyncio.start_server(between.serve, "127.0.0.1", 0)
    between.address = listening.sockets[0].getsockname()[:2]
    credentials, at, _ = parts.netloc.rpartition("@")
    netloc = f"{credentials}{at}127.0.0.1:{between.address[1]}"
    try:
        yield between, urlunsplit(parts._replace(netloc=netloc))
    finally:
        listening.close()
        await between.close()

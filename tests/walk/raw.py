"""A scripted upstream and a raw client: sockets whose every byte and end the test controls."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Head = bytes
Script = Callable[["Visit"], Awaitable[None]]


@dataclass
class Visit:
    """One connection to the scripted upstream."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    head: bytes = b""
    #: Monotonic time at which the gateway closed its side; None while it is open.
    closed_at: float | None = None

    async def read_head(self) -> bytes:
        self.head = await self.reader.readuntil(b"\r\n\r\n")
        return self.head

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def until_closed(self) -> None:
        """Until the gateway closes the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.closed_at = time.monotonic()


@dataclass
class Upstream:
    url: str
    visits: list[Visit] = field(default_factory=list)


@asynccontextmanager
async def upstream(script: Script) -> AsyncIterator[Upstream]:
    """Each connection is handled by `script`; when it returns, the connection is closed."""
    tasks: set[asyncio.Task[None]] = set()
    scripted = Upstream("")

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        current = Visit(reader, writer)
        scripted.visits.append(current)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await script(current)
        except asyncio.CancelledError:
            pass  # the test is over; asyncio's own stream callback would report it as an error
        finally:
            tasks.discard(task)
            writer.transport.abort()

    listening = await asyncio.start_server(visit, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client's socket; left open or aborted as the test likes."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def request(secret: str, path: str = "/echo", method: str = "POST", body: bytes = b"{}") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body

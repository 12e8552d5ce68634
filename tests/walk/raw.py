"""A scripted upstream, a raw client and a relay: sockets whose every byte and end the test controls."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

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

    listening = await asyncio.start_server(visit, "127.0.0.1", 0, backlog=4_096)
    scripted.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Relay:
    """Stands between the gateway and a server, and lets that server go away and come back.

    open ──freeze()──▶ frozen    connections stand and are made, no byte passes; `thaw()` delivers what was held
    open ──close()───▶ closed    connections are cut and refused, until `open()` on the same port
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._parts = parts
        self._port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def url(self) -> str:
        """The server's URL with the relay's address in it."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self._port}").geturl()

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    async def open(self, target_url: str | None = None) -> None:
        """Connections are taken again; the server may have come back elsewhere."""
        if target_url is not None:
            moved = urlsplit(target_url)
            assert moved.hostname is not None and moved.port is not None
            self._target = (moved.hostname, moved.port)
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        target: asyncio.StreamWriter | None = None
        try:
            with contextlib.suppress(OSError):
                answers, target = await asyncio.open_connection(*self._target)
                back = asyncio.create_task(self._pump(answers, writer))
                try:
                    await self._pump(reader, target)
                finally:
                    back.cancel()
                    await asyncio.gather(back, return_exceptions=True)
        except asyncio.CancelledError:
            pass  # closed by the test; asyncio's own stream callback would report it as an error
        finally:
            self._tasks.discard(task)
            writer.transport.abort()
            if target is not None:
                target.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                # Read first: what was on its way when the relay froze is delivered, even if its sender has left.
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            # One side has ended, so the other learns it.
            writer.close()


@asynccontextmanager
async def relay(url: str, *, is_open: bool = True) -> AsyncIterator[Relay]:
    """A relay to the server at `url`; with `is_open=False` its port refuses connections at first."""
    relayed = Relay(url)
    await relayed.open()
    if not is_open:
        await relayed.close()
    try:
        yield relayed
    finally:
        relayed.thaw()
        await relayed.close()


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

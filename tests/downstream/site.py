"""A uvicorn server with our connections in front of a small application, and raw clients for it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from gateway.downstream import Bounds, connection_type
from tests.waiting import until

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Field = tuple[bytes, bytes]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HOST = b"Host: site\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
ANSWERED = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@dataclass
class Seen:
    """One request as the application had it."""

    scope: MutableMapping[str, Any]
    body: bytes = b""
    trailers: list[Field] = field(default_factory=list)
    #: The body had its end; False when the client left before it.
    whole: bool = False

    @property
    def heard(self) -> tuple[object, ...]:
        """What must not depend on how the bytes arrived."""
        scope, head = self.scope, self.scope["extensions"]["gateway.http1"]
        named = tuple(scope[key] for key in ("method", "path", "raw_path", "query_string", "http_version"))
        return (*named, tuple(scope["headers"]), head, self.body, tuple(self.trailers), self.whole)


@dataclass
class Recorder:
    """Reads every request to its end and answers `ok`."""

    requests: list[Seen] = field(default_factory=list)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        seen = Seen(scope)
        self.requests.append(seen)
        await read(seen, receive)
        if seen.whole:
            await answer(send, b"ok")


async def read(seen: Seen, receive: Receive) -> None:
    """The request has arrived as far as it comes."""
    while not seen.whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        assert message["type"] == "http.request"
        seen.body += message["body"]
        seen.trailers += message.get("trailers", [])
        seen.whole = not message["more_body"]


async def start(send: Send, *fields: Field, status: int = 200, **more: object) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(fields), **more})


async def write(send: Send, body: bytes = b"", *, more: bool = True, **extra: object) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more, **extra})


async def answer(send: Send, body: bytes = b"", status: int = 200) -> None:
    await start(send, (b"Content-Length", b"%d" % len(body)), status=status)
    await write(send, body, more=False)


@dataclass
class Site:
    port: int
    server: uvicorn.Server

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @property
    def tasks(self) -> int:
        return len(self.server.server_state.tasks)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator["Peer"]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Peer(reader, writer)
        finally:
            writer.transport.abort()

    async def ask(self, request: bytes) -> bytes:
        """Everything the server says until it ends the connection."""
        async with self.connect() as peer:
            peer.write(request)
            return await peer.rest()


@dataclass
class Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def end(self) -> None:
        self.writer.write_eof()

    def leave(self) -> None:
        self.writer.transport.abort()

    async def until(self, end: bytes) -> bytes:
        return await asyncio.wait_for(self.reader.readuntil(end), 10)

    async def exactly(self, expected: bytes) -> None:
        """These bytes come next."""
        assert await asyncio.wait_for(self.reader.readexactly(len(expected)), 10) == expected

    async def rest(self) -> bytes:
        """Up to the orderly end; a reset raises ConnectionResetError."""
        return await asyncio.wait_for(self.reader.read(), 10)


@asynccontextmanager
async def serving(app: Application, bounds: Bounds | None = None, *, keep_alive_s: int = 75) -> AsyncIterator[Site]:
    """Started as uvicorn starts, ended without its pauses; what the application raises fails the test."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    config = uvicorn.Config(
        app,
        http=connection_type(bounds or Bounds()),
        ws="none",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_s,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup([listener])
    try:
        yield Site(listener.getsockname()[1], server)
        # Nobody is left behind: clients have gone, and every application has noticed.
        await until(lambda: not server.server_state.connections and not server.server_state.tasks)
    finally:
        for running in server.servers:
            running.close()
        listener.close()

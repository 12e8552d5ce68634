"""An upstream that does exactly what a test says, byte by byte, and the requests tests send to it."""

import asyncio
import socket
import ssl
import struct
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from types import TracebackType

import httpx

from gateway.upstream import Transport
from gateway.upstream.exchange import Exchange

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """One connection as the upstream sees it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        #: 1 for the first connection the server accepted.
        self.number = number
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        """The next request's head, line breaks included. Raises EOFError when the gateway closed."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def request(self) -> tuple[bytes, bytes]:
        """The next request: its head, and its body without framing."""
        head = await self.head()
        fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n")[1:])}
        if b"content-length" in fields:
            return head, await self.reader.readexactly(int(fields[b"content-length"]))
        body = b""
        while b"transfer-encoding" in fields:
            size = int(await self.reader.readline(), 16)
            body += (await self.reader.readexactly(size + 2))[:-2]
            if size == 0:
                break
        return head, body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self) -> None:
        """The gateway has closed its side, in order or not."""
        try:
            while await self.reader.read(65_536):
                pass
        except ConnectionError:
            return

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with a RST."""
        raw: socket.socket = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


async def answer_ok(peer: Peer) -> None:
    while True:
        await peer.request()
        await peer.send(OK)


class Server:
    """Listens on a port of its own; `script` runs for every connection and ends it."""

    def __init__(
        self, script: Script = answer_ok, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        """port: 0 for any that is free."""
        self.script = script
        self.connections = 0
        self.failures: list[BaseException] = []
        self._host = host
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = port

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._accepted, self._host, self.port, ssl=self._tls, limit=1_000_000)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if error is None and self.failures:
            raise self.failures[0]

    def stop_listening(self) -> None:
        """New connections are refused; those that are open go on."""
        assert self._server is not None
        self._server.close()

    @property
    def open(self) -> int:
        """Connections whose script has not ended."""
        return len(self._tasks)

    def owns(self, task: "asyncio.Task[object]") -> bool:
        """`task` serves one of its connections."""
        return task in self._tasks

    @property
    def origin(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self.port}"

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(Peer(self.connections, reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, peer: Peer) -> None:
        try:
            await self.script(peer)
        except (EOFError, ConnectionError):
            pass  # the gateway closed the connection: for the test to judge
        except AssertionError as exc:
            self.failures.append(exc)
        finally:
            peer.writer.close()


def answering(data: bytes) -> Script:
    """Every request gets `data`, and then the connection stays open."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(data)

    return script


def request(
    server: Server,
    method: str = "GET",
    *,
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes | AsyncIterable[bytes] = b"",
    path: str = "/",
    target: bytes | None = None,
    timeout: Mapping[str, float] | None = None,
    **extra: object,
) -> httpx.Request:
    """As `forward.py` makes them: nothing added but Host. extra: more request extensions."""
    extensions: dict[str, object] = {**extra}
    if target is not None:
        extensions["target"] = target
    if timeout is not None:
        extensions["timeout"] = timeout
    return httpx.Request(
        method,
        server.origin + path,
        headers=[(b"Host", b"upstream"), *headers],
        stream=httpx.ByteStream(body) if isinstance(body, bytes) else Stream(body),
        extensions=extensions,
    )


class Stream(httpx.AsyncByteStream):
    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._body = body

    def __aiter__(self):  # type: ignore[no-untyped-def]  # an iterator of whatever the test gave
        return aiter(self._body)


def stream_of(response: httpx.Response) -> httpx.AsyncByteStream:
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response.stream


async def exchange_of(transport: Transport, message: httpx.Request) -> Exchange:
    """The stream of the answer, which is the exchange itself."""
    stream = stream_of(await transport.handle_async_request(message))
    assert isinstance(stream, Exchange)
    return stream


async def read(response: httpx.Response) -> bytes:
    """The whole body; the stream is closed whatever happens."""
    stream = stream_of(response)
    try:
        return b"".join([chunk async for chunk in stream])
    finally:
        await stream.aclose()


async def exchange(transport: Transport, message: httpx.Request) -> tuple[int, bytes]:
    """Status and body of one request."""
    response = await transport.handle_async_request(message)
    return response.status_code, await read(response)


async def turns(count: int) -> None:
    """The event loop went round `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """`condition` holds. Polls with a deadline, for what has no event."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while not condition():
        assert loop.time() < deadline, "the condition never came true"
        await asyncio.sleep(0.001)


async def steady(value: Callable[[], int], for_s: float = 0.05) -> int:
    """What `value` stays at for a while."""
    loop = asyncio.get_running_loop()
    seen, since = value(), loop.time()
    deadline = since + 5.0
    while loop.time() - since < for_s:
        assert loop.time() < deadline, "the value never came to rest"
        await asyncio.sleep(0.002)
        if value() != seen:
            seen, since = value(), loop.time()
    return seen

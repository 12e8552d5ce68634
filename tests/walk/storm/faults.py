"""A proxy between the gateway and an upstream that breaks the connection exactly where a request asks it to.

Owns sockets and where they break, not HTTP beyond the request heads that it looks for its orders in: a request says
what is to happen to its own connection in the field `X-Fault: kind@n`. Kinds, by what happens to the connection:

    reset, close, half_close    once n bytes of the answer have passed: RST; FIN and gone; FIN, then only listening
    stall                       once n bytes of the answer have passed: silence, until the gateway closes
    drip                        the whole answer passes, every byte on its own
    upload_reset, upload_stall  once n bytes of the request have been read: RST; nothing more is read until `thaw`
    stale_reset, stale_close    as the request arrives, if the connection has had one before: RST; FIN

Sockets are used directly, because a transport may hold back bytes that a reset then discards.
"""

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

ORDER = re.compile(rb"\r\nx-fault: (\w+)@(\d+)\r\n", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"
READ_BYTES = 65_536
#: Small, so that a request that nobody reads soon stands still on the gateway's side.
RECEIVE_BUFFER_BYTES = 16_384
LINGER_NOT = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Crossing:
    """One connection from the gateway, and the one to the upstream behind it."""

    near: socket.socket
    far: socket.socket
    kind: str = ""
    at: int = 0
    #: Bytes of the request, and of its answer, that passed since the last order was read.
    asked: int = 0
    answered: int = 0
    requests: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def order(self, data: bytes) -> None:
        """`data` begins a request; what it wants done holds until the next one."""
        self.requests += 1
        self.asked = self.answered = 0
        found = ORDER.search(data)
        self.kind, self.at = (found[1].decode(), int(found[2])) if found else ("", 0)


class FaultProxy:
    """Relays until it is told otherwise, by a request or by these attributes.

    greeting: what a new connection gets before it has said anything. accept_max: connections taken before the port
    refuses them.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._listener: socket.socket | None = None
        self._port = 0
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._crossings: set[Crossing] = set()
        self._thawed = asyncio.Event()
        self.greeting: Literal["", "close", "reset"] = ""
        self.accept_max: int | None = None
        self.accepted = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def open_count(self) -> int:
        """Connections from the gateway that stand."""
        return len(self._crossings)

    def open(self) -> None:
        """The port takes connections, the same one every time."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(1024)
        listener.setblocking(False)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener))

    async def refuse(self) -> None:
        """The port refuses connections until `open`; those that stand go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._accepting = None

    def close_idle(self) -> None:
        """Every connection gets a FIN now, without a turn of the loop in between."""
        for crossing in self._crossings:
            _half_close(crossing.near)

    def thaw(self) -> None:
        """Requests that nobody read are read to their end, and dropped."""
        self._thawed.set()

    async def close(self) -> None:
        await self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self.accept_max is None or self.accepted < self.accept_max:
                near, _ = await loop.sock_accept(listener)
                self.accepted += 1
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.greeting:
                    _reset(near) if self.greeting == "reset" else near.close()
                    continue
                task = asyncio.create_task(self._cross(near))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            listener.close()

    async def _cross(self, near: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        near.setblocking(False)
        far = socket.socket()
        far.setblocking(False)
        crossing = Crossing(near, far)
        self._crossings.add(crossing)
        pumps: list[asyncio.Task[None]] = []
        try:
            await loop.sock_connect(far, self._target)
            pumps = [asyncio.create_task(self._requests(crossing)), asyncio.create_task(self._answers(crossing))]
            await crossing.ended.wait()
        finally:
            for pump in pumps:
                pump.cancel()
            # Closed only when nobody waits for it any more: the loop would go on watching a number that is reused.
            await asyncio.gather(*pumps, return_exceptions=True)
            _reset(near) if crossing.kind.endswith("reset") else near.close()
            far.close()
            self._crossings.discard(crossing)

    async def _requests(self, crossing: Crossing) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(crossing.near, READ_BYTES):
                # A gateway that pipelined would be found out by the upstream behind us.
                if crossing.answered or not crossing.requests:
                    crossing.order(data)
                if crossing.kind.startswith("stale") and crossing.requests > 1:
                    return
                crossing.asked += len(data)
                if crossing.kind.startswith("upload") and crossing.asked >= crossing.at:
                    if crossing.kind == "upload_stall":
                        # The gateway's end can only be read behind what it has sent.
                        await self._thawed.wait()
                        while await loop.sock_recv(crossing.near, READ_BYTES):
                            pass
                    return
                await loop.sock_sendall(crossing.far, data)
        except OSError:
            return
        finally:
            crossing.ended.set()

    async def _answers(self, crossing: Crossing) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(crossing.far, READ_BYTES):
                await self._pass_on(crossing, data)
        except OSError:
            return
        finally:
            crossing.ended.set()

    async def _pass_on(self, crossing: Crossing, data: bytes) -> None:
        """`data` of the answer has passed, or the connection met its fate. Raises ConnectionError for the latter."""
        loop, near = asyncio.get_running_loop(), crossing.near
        if crossing.kind == "drip":
            for number in range(len(data)):
                await loop.sock_sendall(near, data[number : number + 1])
                await asyncio.sleep(0)
        elif crossing.kind in ("reset", "close", "half_close", "stall"):
            data = data[: crossing.at - crossing.answered]
            if data:
                await loop.sock_sendall(near, data)
        else:
            await loop.sock_sendall(near, data)
        crossing.answered += len(data)
        if crossing.kind in ("reset", "close", "half_close", "stall") and crossing.answered == crossing.at:
            if crossing.kind == "half_close":
                _half_close(near)
            if crossing.kind in ("half_close", "stall"):
                await asyncio.Event().wait()  # until `_requests` sees that the gateway has closed
            raise ConnectionAbortedError


def _half_close(near: socket.socket) -> None:
    with contextlib.suppress(OSError):
        near.shutdown(socket.SHUT_WR)


def _reset(near: socket.socket) -> None:
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    near.close()


@asynccontextmanager
async def fault_proxy(url: str) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(url)
    proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()

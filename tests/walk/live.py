"""WebSockets through a whole gateway: the `websockets` library at both ends, or bare sockets."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.utils import accept_key

from tests.walk.house import House, Running, in_process
from tests.walk.raw import Visit

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept_key(KEY).encode()
)

Handler = Callable[[ServerConnection], Awaitable[None]]


def routes(rules: str = "", dialect: str = "problem") -> str:
    return f"\n  - {{ path: /live, upstream: ai_router, dialect: {dialect}, websocket: {{ {rules} }} }}\n" + (
        f"  - {{ path: /*, upstream: ai_router, dialect: {dialect} }}\n"
    )


async def echo(websocket: ServerConnection) -> None:
    async for message in websocket:
        await websocket.send(message)


@dataclass
class Live:
    """A gateway in front of a WebSocket server."""

    house: House
    gateway: Running
    #: The server's ends, in the order they were opened.
    served: list[ServerConnection] = field(default_factory=list)

    def connect(self, path: str = "/live", secret: str | None = None, **options: Any) -> connect:
        address = self.gateway.address.replace("http", "ws", 1) + path
        credential = {"Authorization": f"Bearer {secret or self.house.secret}"}
        return connect(address, proxy=None, additional_headers=credential, **{"max_size": None, **options})


@asynccontextmanager
async def live(house: House, handler: Handler = echo, rules: str = "", **options: Any) -> AsyncIterator[Live]:
    house.settings.setdefault("routes", routes(rules))
    served: list[ServerConnection] = []

    async def handle(websocket: ServerConnection) -> None:
        served.append(websocket)
        await handler(websocket)

    async with serve(handle, "127.0.0.1", 0, **{"max_size": None, **options}) as server:
        house.upstream_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with in_process(house) as gateway:
            yield Live(house, gateway, served)


def handshake(secret: str, *more: str, path: str = "/live", method: str = "GET", version: str = "13") -> bytes:
    lines = (
        f"{method} {path} HTTP/1.1",
        "Host: gateway",
        f"Authorization: Bearer {secret}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Version: {version}",
        f"Sec-WebSocket-Key: {KEY}",
        *more,
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


@dataclass
class Open:
    """A script of an upstream that agrees to every handshake; then the connection is the test's."""

    visits: asyncio.Queue[Visit] = field(default_factory=asyncio.Queue)
    answer: bytes = SWITCH

    async def __call__(self, visit: Visit) -> None:
        await visit.read_head()
        await visit.send(self.answer)
        self.visits.put_nowait(visit)
        await asyncio.Event().wait()

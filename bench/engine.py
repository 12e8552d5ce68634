"""A client for the upstream as the only thing behind the server: what forwarding itself costs, in either of two ways.

`python -m bench.engine own|httpx PORT UPSTREAM_PORT` puts the least application that forwards behind the gateway's own
client connections: the body is read, the request sent on with its header fields as they came, the answer handed back
piece by piece. No identity, no policy, no log; no header field is added or removed.

own     the gateway's transport, called directly, as `gateway.upstream.forward` does
httpx   an `httpx.AsyncClient` with its own transport, used as its documentation shows
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx
import uvicorn
import uvloop

from gateway.downstream import Bounds, Receive, Send, connection_type
from gateway.upstream.transport import Transport

HOST = "127.0.0.1"
CONNECTIONS_MAX = 1024

Fields = list[tuple[bytes, bytes]]
#: The answer's status, its fields, and its body as it arrives.
Answer = tuple[int, Fields, AsyncIterator[bytes]]


class Engine(Protocol):
    """Sends one request on."""

    async def ask(self, method: str, target: bytes, headers: Fields, body: bytes) -> Answer: ...


class Own:
    """The gateway's transport."""

    def __init__(self, base: str) -> None:
        self._url = httpx.URL(base)
        self._transport = Transport(connections_max=CONNECTIONS_MAX)

    async def ask(self, method: str, target: bytes, headers: Fields, body: bytes) -> Answer:
        request = httpx.Request(
            method, self._url, headers=headers, stream=httpx.ByteStream(body), extensions={"target": target}
        )
        response = await self._transport.handle_async_request(request)
        return response.status_code, response.headers.raw, _pieces(response.stream)


async def _pieces(stream: httpx.SyncByteStream | httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    assert isinstance(stream, httpx.AsyncByteStream)
    try:
        async for piece in stream:
            yield piece
    finally:
        await stream.aclose()


class Plain:
    """httpx as it comes, except that it may keep as many connections as there are clients."""

    def __init__(self, base: str) -> None:
        limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX)
        self._client = httpx.AsyncClient(base_url=base, limits=limits, timeout=60)

    async def ask(self, method: str, target: bytes, headers: Fields, body: bytes) -> Answer:
        request = self._client.build_request(method, target.decode("ascii"), headers=headers, content=body)
        response = await self._client.send(request, stream=True)
        return response.status_code, response.headers.raw, response.aiter_raw()


class Forwarder:
    """The ASGI application."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        ask = self._engine.ask
        status, headers, pieces = await ask(scope["method"], scope["raw_path"], list(scope["headers"]), body)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        async for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _serve(kind: str, port: int, upstream_port: int) -> None:
    base = f"http://{HOST}:{upstream_port}"
    engine: Engine = Own(base) if kind == "own" else Plain(base)
    config = uvicorn.Config(
        Forwarder(engine),
        host=HOST,
        port=port,
        http=connection_type(Bounds()),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        date_header=False,
        server_header=False,
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

"""The upstream of every row: a bare uvloop protocol that answers each request with the same bytes.

`python -m bench.upstream PORT EVENTS GAP_MS`: a streamed answer has EVENTS events, GAP_MS apart, each written alone.
"""

import asyncio
import sys
from typing import cast

import httptools
import uvloop

from bench import exchange


class Answering(asyncio.Protocol):
    """One client connection; requests on it come one after the other."""

    def __init__(self, events: int, gap_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events, self._gap_s = events, gap_s
        self._whole, self._event, self._last = exchange.answer(), exchange.event(), exchange.last_events()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._stream = False

    def on_body(self, body: bytes) -> None:
        self._stream = self._stream or b'"stream":true' in body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if self._stream:
            self._transport.write(exchange.STREAM_HEAD)
            self._next(self._events)
        else:
            self._transport.write(self._whole)

    def _next(self, left: int) -> None:
        if self._transport is None:
            return
        if left:
            self._transport.write(self._event)
            self._loop.call_later(self._gap_s, self._next, left - 1)
        else:
            self._transport.write(self._last)


async def _serve(port: int, events: int, gap_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Answering(events, gap_s), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) / 1000))

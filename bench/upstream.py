"""The upstream of every row: a bare uvloop protocol that answers each request with the same bytes.

`python -m bench.upstream PORT`. The events of a stream are as many, and as far apart, as the request asks for, and each
is written alone.
"""

import asyncio
import sys
import time
from typing import cast

import httptools
import uvloop

from bench import exchange


class Answering(asyncio.Protocol):
    """One client connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._whole, self._last = exchange.answer(), exchange.last_events()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        events, gap_ms = exchange.asked_for(self._body)
        if events:
            self._transport.write(exchange.STREAM_HEAD)
            self._next(events, gap_ms / 1000)
        else:
            self._transport.write(self._whole)

    def _next(self, left: int, gap_s: float) -> None:
        if self._transport is None:
            return
        if left:
            self._transport.write(exchange.event(time.monotonic_ns()))
            self._loop.call_later(gap_s, self._next, left - 1, gap_s)
        else:
            self._transport.write(self._last)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))

"""HTTP/1.1 to upstreams as an `httpx.AsyncBaseTransport`: pools per origin, one exchange per request.

Owns what a request goes through between `httpx.Request` and `httpx.Response`. Does nothing an HTTP client would add
(redirects, cookies, decoding, default headers). httpx's own transport costs a multiple and loses pool slots when
requests are cancelled (encode/httpcore #1093), and a gateway cancels all day.
"""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from gateway.upstream.exchange import Exchange, Interim
from gateway.upstream.pool import Origin, Pool, dial
from gateway.upstream.request import compose
from gateway.upstream.timeouts import Deadlines, Timeouts
from gateway.upstream.tls import tls_context
from gateway.upstream.wire import StaleConnection

HEAD_BYTES_MAX = 65_536
_DEFAULT_PORTS = {"http": 80, "https": 443}
_DEFAULT_TIMEOUTS = Timeouts()


@dataclass(frozen=True, slots=True)
class Stats:
    """Connections of a transport, over all origins."""

    open: int
    idle: int
    in_use: int
    #: Requests without a connection yet.
    waiting: int
    #: Connections that are being opened.
    dialling: int


class Transport(httpx.AsyncBaseTransport):
    """Sends requests exactly as given and returns answers exactly as received, chunked coding apart.

    Request extensions: `target` (bytes, instead of the URL's path and query), `timeout` (seconds: connect, first_byte,
    read, write, pool), `interim` (awaited with status, reason and fields of every 1xx before the answer; without it
    they are dropped), `trailers` (a list of fields, sent behind a streamed body in chunks when that has ended).
    `reached` is set there to whether a byte of the request may have been sent, and `exchange` to the exchange, whose
    `sent` says whether every byte was.
    Response extensions: http_version, reason_phrase, framing, trailers (filled when the body has ended), request_sent,
    and after a 101 to a request with Upgrade also network_stream, a `Tunnel`. The stream is an `Exchange`, which has
    `pieces`; closing it closes the tunnel too.
    """

    def __init__(
        self,
        *,
        timeouts: Timeouts = _DEFAULT_TIMEOUTS,
        connections_max: int = 256,
        keepalive_ms: int = 4_000,
        head_bytes_max: int = HEAD_BYTES_MAX,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """connections_max: per origin. tls: for https; None verifies against the system's authorities."""
        self._deadlines = Deadlines.of(timeouts)
        self._connections_max = connections_max
        self._keepalive_s = keepalive_ms / 1000
        self._head_bytes_max = head_bytes_max
        self._tls = tls
        # Origins come from the configuration, never from a client, so this cannot grow without bound.
        self._pools: dict[tuple[str, bytes, int | None], Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer's head is there and its body can be read. Raises httpx.TransportError.

        Cancelling it closes the connection if anything was sent.
        """
        extensions = request.extensions
        extensions["reached"] = False
        outgoing = compose(request)
        timeout: Mapping[str, float | None] | None = extensions.get("timeout")
        deadlines = self._deadlines if timeout is None else self._deadlines.overridden(timeout)
        pool = self._pool(request.url)
        connection = pool.take()
        if connection is None:
            connection = await pool.wait(deadlines)
        exchange = Exchange(asyncio.get_running_loop(), connection, outgoing, deadlines, self._head_bytes_max)
        connection.begin(exchange)
        extensions["reached"] = True
        extensions["exchange"] = exchange
        try:
            exchange.send(outgoing)
            interim: Interim | None = extensions.get("interim")
            await exchange.head(interim)
        except StaleConnection:
            pool.drop_idle()
            await exchange.aclose()
            raise
        except BaseException:
            await exchange.aclose()
            raise
        incoming = exchange.incoming
        found: dict[str, object] = {
            "http_version": incoming.version,
            "reason_phrase": incoming.reason,
            "framing": incoming.framing,
            "trailers": incoming.trailers,
            "request_sent": exchange.sent,
        }
        if exchange.tunnel is not None:
            found["network_stream"] = exchange.tunnel
        return httpx.Response(incoming.status, headers=incoming.headers, stream=exchange, extensions=found)

    async def probe(self, url: httpx.URL) -> None:
        """The origin of `url` accepts connections, TLS included. Raises ConnectError or ConnectTimeout."""
        pool = self._pool(url)
        connection = await dial(pool.origin, pool, self._deadlines.connect_s)
        connection.abort()

    def stats(self) -> Stats:
        pools = self._pools.values()
        opened, idle = sum(pool.open for pool in pools), sum(pool.idle for pool in pools)
        waiting, dialling = sum(pool.waiting for pool in pools), sum(pool.dialling for pool in pools)
        return Stats(opened, idle, opened - idle, waiting, dialling)

    async def aclose(self) -> None:
        """Every connection is closed; answers still being read fail."""
        for pool in tuple(self._pools.values()):
            await pool.aclose()

    def _pool(self, url: httpx.URL) -> Pool:
        key = (url.scheme, url.raw_host, url.port)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = Pool(self._origin(url), self._connections_max, self._keepalive_s)
        return pool

    def _origin(self, url: httpx.URL) -> Origin:
        port = url.port or _DEFAULT_PORTS.get(url.scheme)
        if port is None or not url.host:
            raise httpx.UnsupportedProtocol(f"Cannot connect to {url.scheme!r} URLs.")
        if url.scheme == "https" and self._tls is None:
            self._tls = tls_context()
        # raw_host is the IDNA form, and an IPv6 address without its brackets.
        return Origin(url.raw_host.decode("ascii"), port, self._tls if url.scheme == "https" else None)

"""One client's connection: a protocol of our own, run by uvicorn's server. Owns whose turn it is, and how long it has.

    head ──► exchange (its body, its answer) ──► head ──► ...        one request at a time, in order
      │          ├──► switched: bytes both ways
      └──────────┴──► the end (line.py): nothing is read as a request any more

Requests that arrive ahead of their turn (pipelining) wait as bytes, up to a bound; a client that sends more gets the
answer under way and then the end of the connection. A client that closes its sending side has left: browsers, SDKs
and proxies never half-close, and a client that was killed looks just like it.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from gateway.downstream import answer
from gateway.downstream.exchange import Exchange
from gateway.downstream.incoming import Message
from gateway.downstream.line import Line
from gateway.downstream.request import HEAD_BYTES_MAX, HTTP2_PREFACE, Request, Unreadable, is_hopeless, read_head
from gateway.downstream.scope import connection_scope, request_scope

#: Requests that wait for the answer to an earlier one.
AHEAD_BYTES_MAX = 65_536
#: How long a client that comes when there are too many may take to read so.
TURN_AWAY_S = 1.0

_HEAD_END = b"\r\n\r\n"

log = structlog.get_logger("gateway.downstream")

Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


def _unheard(status: int) -> None:
    """Nobody counts refusals."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take: time and room; and who hears of a client that was refused."""

    #: From the connection, or from the first byte of a later request, to the end of the head.
    head_timeout_s: float = 60.0
    #: From the head to the last byte of the body.
    body_timeout_s: float = 300.0
    #: Connected at once, to one server.
    connections_max: int = 10_000
    #: Told the status of every refusal that no application ever hears of.
    on_refusal: Callable[[int], None] = _unheard


class Config(Protocol):
    """What a connection reads of uvicorn's configuration."""

    loaded_app: Application
    timeout_keep_alive: int

    @property
    def asgi_version(self) -> str: ...


class ServerState(Protocol):
    """What uvicorn's server and its connections share."""

    total_requests: int
    connections: set[Any]
    tasks: set[asyncio.Task[None]]


def connection_type(bounds: Bounds) -> type["Connection"]:
    """Connections within these bounds, for uvicorn's `http`."""
    return type("Connection", (Connection,), {"__slots__": (), "bounds": bounds})


class Connection(Line):
    """Satisfies `incoming.Wire`."""

    __slots__ = ("_ahead", "_app_state", "_config", "_context", "_deaf", "_exchange", "_scope", "_server", "_used")

    bounds = Bounds()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Called by uvicorn, which names the arguments."""
        super().__init__(_loop or asyncio.get_running_loop())
        self._config = config
        self._server = server_state
        self._app_state = app_state
        #: Every request starts with a copy: what one sets for itself, the next on the connection must not see.
        self._context = contextvars.copy_context()
        self._scope: dict[str, Any] = {}
        self._exchange: Exchange | None = None
        #: A head that is not complete, or requests that wait for their turn.
        self._ahead = bytearray()
        #: Something came behind the current request that will never be read.
        self._deaf = False
        #: A head has been complete before.
        self._used = False

    def shutdown(self) -> None:
        """uvicorn stops: closed now, or after the answer under way."""
        if self._exchange is None:
            self.close()
        else:
            self._exchange.keep_alive = False

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self._server.connections) >= self.bounds.connections_max:
            busy = "This gateway has as many clients as it can take; try again shortly."
            self.bounds.on_refusal(503)
            self.write(answer.refusal(503, busy, more=b"Retry-After: 1\r\n"))
            self.linger()
            self.alarm.set(TURN_AWAY_S)
            return
        self._server.connections.add(self)
        self._scope = connection_scope(transport, self._config.asgi_version)
        self.alarm.set(self.bounds.head_timeout_s)

    def eof_received(self) -> bool:
        exchange = self._exchange
        if exchange is not None and exchange.switched:
            exchange.end_input()
            return True
        if exchange is not None:
            exchange.leave()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            self.throw_away(data)
            return
        exchange = self._exchange
        if exchange is None:
            self._take_head(data)
            return
        try:
            rest = exchange.feed(data)
        except Unreadable as exc:
            self.alarm.clear()
            self._deaf = True
            exchange.fail(exc)
            return
        if rest:
            self._keep_ahead(exchange, rest)

    def expired(self) -> None:
        exchange = self._exchange
        if exchange is None:
            self.close()  # at rest for too long, or a head that does not end: no request yet that could be answered
        elif exchange.failure is None:
            exchange.time_out()
            self.alarm.set(self.bounds.head_timeout_s)
        else:
            exchange.leave()  # the application knows, and goes on waiting
            self.abort()

    # -- requests ------------------------------------------------------------------------------------------------

    def _take_head(self, data: bytes) -> None:
        """`data` continues a head, or begins one."""
        known_bytes = len(self._ahead)
        if known_bytes:
            self._ahead += data
            end = self._ahead.find(_HEAD_END, max(0, known_bytes - 3), HEAD_BYTES_MAX)
        else:
            end = data.find(_HEAD_END, 0, HEAD_BYTES_MAX)
        try:
            if end < 0:
                if not known_bytes:
                    self._ahead += data
                self._await_head(known_bytes)
                return
            if known_bytes:
                data = bytes(self._ahead)
                self._ahead.clear()
            if data.startswith(HTTP2_PREFACE):
                self.linger()  # no answer of ours would be understood
                return
            end += len(_HEAD_END)
            self._begin(read_head(data[:end]), data[end:])
        except Unreadable as exc:
            self._refuse(exc.status, str(exc))

    def _await_head(self, known_bytes: int) -> None:
        """Raises Unreadable when waiting for the rest makes no sense."""
        if len(self._ahead) >= HEAD_BYTES_MAX:
            raise Unreadable(431, f"The head of the request is larger than {HEAD_BYTES_MAX} bytes.")
        if is_hopeless(self._ahead, known_bytes):
            raise Unreadable(400, "The request holds control characters, or line ends other than CR LF.")
        if self._used and not known_bytes:
            self.alarm.set(self.bounds.head_timeout_s)

    def _begin(self, request: Request, rest: bytes) -> None:
        """The application has the request. Raises Unreadable when what is here of its body is malformed."""
        self._used = True
        exchange = Exchange(self._loop, self, request)
        if rest and not exchange.received:
            rest = exchange.feed(rest)
        self._exchange = exchange
        if exchange.received:
            self.alarm.clear()
        else:
            self.alarm.set(self.bounds.body_timeout_s)
        if rest:
            self._keep_ahead(exchange, rest)
        scope = request_scope(self._scope, request, self._app_state)
        exchange.task = self._loop.create_task(self._run(exchange, scope), context=self._context.copy())
        self._server.tasks.add(exchange.task)

    def _keep_ahead(self, exchange: Exchange, data: bytes) -> None:
        """Bytes behind the request: the next ones, unless the connection ends with this one."""
        may_be_read = exchange.keep_alive or exchange.request.head.upgrade
        if self._deaf or not may_be_read or len(self._ahead) + len(data) > AHEAD_BYTES_MAX:
            self._deaf = True
            self._ahead.clear()
            exchange.keep_alive = False
        else:
            self._ahead += data

    async def _run(self, exchange: Exchange, scope: dict[str, Any]) -> None:
        """The application has ended, and its answer is complete, made up for, or cut."""
        status = 500
        try:
            await self._config.loaded_app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            status = 503
            raise
        except Exception:
            log.exception("the application failed")
        finally:
            if exchange.task is not None:
                self._server.tasks.discard(exchange.task)
            if not exchange.complete and not exchange.gone:
                self._make_up(exchange, status)

    def _make_up(self, exchange: Exchange, status: int) -> None:
        """The application has ended before its answer did."""
        if not exchange.started:
            failure = exchange.failure or Unreadable(status, "The gateway could not handle the request.")
            self._refuse(failure.status, str(failure))
            return
        exchange.flush()
        exchange.leave()
        if exchange.ends_with_connection:
            self.reset()
        else:
            self.close()

    def _refuse(self, status: int, says: str) -> None:
        """An answer of our own, and the end."""
        exchange, self._exchange = self._exchange, None
        to_head = exchange is not None and exchange.request.method == "HEAD"
        if exchange is not None:
            exchange.leave()
        else:
            self.bounds.on_refusal(status)
        self.write(answer.refusal(status, says, to_head=to_head))
        self.linger()

    # -- Wire ----------------------------------------------------------------------------------------------------

    def body_arrived(self) -> None:
        self.alarm.clear()

    def take_early(self) -> bytes:
        """What came behind a request that becomes a switch of protocols. Raises RuntimeError when it was too much."""
        if self._deaf:
            raise RuntimeError("the client sent too much before the protocol was switched")
        early = bytes(self._ahead)
        self._ahead.clear()
        return early

    def answered(self) -> None:
        """The answer is complete: the next request, or the end of the connection."""
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        self._server.total_requests += 1
        if exchange.keep_alive:
            self.alarm.set(self._config.timeout_keep_alive)
            if self._ahead:
                ahead = bytes(self._ahead)
                self._ahead.clear()
                self._take_head(ahead)
        elif exchange.input_ended or (exchange.received and not self._deaf and not exchange.request.head.upgrade):
            self.close()
        else:
            self.linger()

"""One request on its way to an upstream: its place in the queue, its attempts, and the answer.

    at the gate ──► attempt ──► answered ──► over        leaving the block gives back place, target and connection
                     ▲   │
                     └───┴── failed: another target, or the same again, or over

Owns when a request is sent again and that it leaves nothing behind. Which header fields cross is the caller's decision.
"""

from collections.abc import AsyncIterable, AsyncIterator, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias

import httpx

from gateway.errors import BadRequest, GatewayError, UpstreamBusy, UpstreamUnreachable
from gateway.upstream.exchange import Interim
from gateway.upstream.failures import mapped
from gateway.upstream.framing import Framing
from gateway.upstream.relayed import Pieces, Tunnel, framing_of, pieces_of
from gateway.upstream.targets import Target, Upstream
from gateway.upstream.wire import StaleConnection, Unanswered

#: Of one request, whatever the reason for the next.
ATTEMPTS_MAX = 3
#: RFC 9110 §9.2.2: may be sent again when the connection closed without an answer.
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})

Field: TypeAlias = tuple[bytes, bytes]
Retry: TypeAlias = Literal["connect", "idempotent", "never"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream answered: the head as it stood on the wire, the body as it arrives."""

    status: int
    reason: bytes
    headers: list[Field]
    #: What arrived in one read, cut where the upstream cut its chunks. Raises UpstreamBroke or UpstreamTimeout where
    #: the body ends early.
    pieces: AsyncIterator[list[bytes]]
    #: How the body ends: `length` and `chunked` say so themselves, `close` with the connection; `none` has no body.
    framing: Framing
    #: False when the upstream answered before it had the whole request.
    sent: bool
    #: Fields after a chunked body; filled when `pieces` has ended.
    trailers: list[Field]
    #: The connection itself, after a 101.
    tunnel: Tunnel | None
    #: `1.1`, or `1.0`.
    http_version: str


class Forwarding:
    """`async with` it for the answer; leaving gives the connection back or closes it."""

    __slots__ = (
        "_body",
        "_extensions",
        "_headers",
        "_host_at",
        "_inside",
        "_interim",
        "_method",
        "_pulled",
        "_repeated",
        "_retry",
        "_sent",
        "_stream",
        "_target",
        "_trailers",
        "_tried",
        "_tunnel",
        "_upstream",
        "_with",
        "reached",
    )

    def __init__(
        self,
        upstream: Upstream,
        method: str,
        target: bytes,
        headers: Sequence[Field],
        body: bytes | AsyncIterable[bytes] | None,
        interim: Interim | None,
        trailers: list[Field] | None,
        retry: Retry,
    ) -> None:
        self._upstream = upstream
        self._method = method
        self._target = target
        self._headers = headers
        self._host_at = [i for i, (name, _) in enumerate(headers) if len(name) == 4 and name.lower() == b"host"]
        self._body = body
        self._interim = interim
        self._trailers = trailers
        self._retry = retry
        self._inside = False
        #: The target that has the request now.
        self._with: Target | None = None
        #: Where attempts have failed, one for each.
        self._tried: list[Target] = []
        #: The request was sent again although the first upstream may have read it.
        self._repeated = False
        #: Somebody began to read a streamed body: it cannot be sent again.
        self._pulled = False
        self._extensions: MutableMapping[str, object] = {}
        self._stream: httpx.AsyncByteStream | None = None
        self._tunnel: Tunnel | None = None
        self._sent = False
        #: Whether any upstream may have seen a byte of the request; False is certain. Good once the block is left.
        self.reached = False

    @property
    def request_sent(self) -> bool:
        """Every byte of the request was handed to the socket. Good at any time."""
        return self._sent or getattr(self._extensions.get("exchange"), "sent", False)

    async def __aenter__(self) -> Answer:
        if not self._target.startswith(b"/"):
            # "@host/" or ":1/" behind an authority would name another one.
            raise BadRequest("The request target must begin with '/'.")
        gate = self._upstream.gate
        if not gate.enter_at_once():
            await gate.enter()
        self._inside = True
        try:
            response = await self._answered()
        except BaseException:
            self._leave()
            raise
        stream, found, headers = response.stream, response.extensions, response.headers.raw
        assert isinstance(stream, httpx.AsyncByteStream)
        self._stream = stream
        self._sent = sent = found.get("request_sent", True)
        network = found.get("network_stream")
        self._tunnel = tunnel = None if network is None else Tunnel(network)
        reason: bytes = found.get("reason_phrase", b"")
        return Answer(
            response.status_code,
            reason,
            headers,
            Pieces(pieces_of(stream)),
            found.get("framing") or framing_of(self._method, response.status_code, headers),
            sent,
            found.get("trailers", []),
            tunnel,
            "1.0" if found.get("http_version") == b"HTTP/1.0" else "1.1",
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stream, self._stream = self._stream, None
        tunnel, self._tunnel = self._tunnel, None
        try:
            if tunnel is not None and error is not None:
                tunnel.abort()
            elif tunnel is not None:
                await tunnel.aclose()
            if stream is not None:
                await stream.aclose()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._let_go()
        if self._inside:
            self._inside = False
            self._upstream.gate.leave()

    def _let_go(self) -> None:
        target, self._with = self._with, None
        if target is not None:
            target.outstanding -= 1

    async def _answered(self) -> httpx.Response:
        target = self._upstream.balancer.choose()
        assert target is not None
        while True:
            self._with = target
            target.outstanding += 1
            try:
                return await self._attempt(target)
            except httpx.TransportError as exc:
                self._let_go()
                self._tried.append(target)
                another = self._next(exc, target)
                if another is None:
                    raise self._failed(exc) from exc
                target = another

    def _next(self, error: httpx.TransportError, target: Target) -> Target | None:
        """Who gets the request after `error` at `target`; None: nobody."""
        if self._retry == "never" or len(self._tried) == ATTEMPTS_MAX or self._pulled:
            return None
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            # Nothing was sent. Who is refused and asks again at once is refused again: only other targets help.
            return self._upstream.balancer.choose(self._tried)
        if self._repeated or not isinstance(error, Unanswered):
            return None
        self._repeated = True
        if isinstance(error, StaleConnection):
            # An idle connection ran out as it was taken. The target is well; its next connection is a new one.
            return target if self._retry == "idempotent" or self._method in _IDEMPOTENT else None
        if self._retry == "idempotent":
            return self._upstream.balancer.choose(self._tried) or target
        return None

    async def _attempt(self, target: Target) -> httpx.Response:
        request = self._request(target)
        extensions = self._extensions = request.extensions
        standing = target.standing
        epoch = standing.begin(extensions)
        connected = True
        try:
            return await self._upstream.transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
            extensions["reached"] = False
            standing.failed(epoch, extensions, exc)
            raise
        except httpx.PoolTimeout:
            extensions["reached"] = False
            raise
        except StaleConnection:
            connected = False  # once, but who knows how long ago
            raise
        finally:
            # A transport that does not say is assumed to have sent something.
            reached: bool = extensions.get("reached", True)
            self.reached = self.reached or reached
            if not standing.spotless:
                standing.end(epoch, extensions, connected=connected and reached)

    def _request(self, target: Target) -> httpx.Request:
        body = self._body
        extensions: dict[str, object] = {"target": target.prefix + self._target}
        if self._interim is not None:
            extensions["interim"] = self._interim
        if self._trailers is not None:
            extensions["trailers"] = self._trailers
        request = httpx.Request(
            self._method,
            target.url(self._target),
            headers=self._fields(target),
            stream=_Stream(body, self._on_pull) if isinstance(body, AsyncIterable) else httpx.ByteStream(body or b""),
            extensions=extensions,
        )
        request.method = self._method  # as it is: httpx writes it in capitals
        return request

    def _fields(self, target: Target) -> Sequence[Field]:
        """The header with the Host that the upstream is to see, where and as the client wrote that field's name."""
        at = self._host_at
        if not at:
            return [(b"Host", target.authority), *self._headers]
        if self._upstream.keeps_host:
            return self._headers
        fields = list(self._headers)
        for position in reversed(at[1:]):
            del fields[position]
        fields[at[0]] = (fields[at[0]][0], target.authority)
        return fields

    def _on_pull(self) -> None:
        self._pulled = True

    def _failed(self, error: httpx.TransportError) -> GatewayError:
        failure = mapped(error)
        if isinstance(failure, (UpstreamUnreachable, UpstreamBusy)):
            # An earlier attempt may have got further than the last.
            failure.reached = self.reached
        return failure


class _Stream(httpx.AsyncByteStream):
    """A body as httpx wants it; says when somebody begins to read it."""

    __slots__ = ("_body", "_on_pull")

    def __init__(self, body: AsyncIterable[bytes], on_pull: Callable[[], None]) -> None:
        self._body = body
        self._on_pull = on_pull

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._on_pull()
        return aiter(self._body)

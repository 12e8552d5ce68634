"""Forwarding to named upstreams: which target, which attempt, and what a failure is called in this house.

Owns attempts, retries and the mapping of httpx's errors. Which header fields cross is the caller's decision.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx

from gateway.errors import (
    BadRequest,
    GatewayError,
    UpstreamBroke,
    UpstreamConnectTimeout,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.upstream.targets import Target, Upstream, UpstreamConfig, transport_for
from gateway.upstream.transport import Stats, Transport
from gateway.upstream.wire import StaleConnection

#: RFC 9110 §9.2.2: may be sent again when the connection closed without an answer.
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream answered: the head as it stood on the wire, the body as it arrives."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    #: Raises UpstreamBroke or UpstreamTimeout where the body ends early.
    chunks: AsyncIterator[bytes]
    #: False when the upstream answered before it had the whole request.
    sent: bool
    #: Fields after a chunked body; filled when `chunks` has ended.
    trailers: list[tuple[bytes, bytes]]
    framing: str = "chunked"
    tunnel: None = None

    @property
    async def pieces(self) -> AsyncIterator[list[bytes]]:
        async for chunk in self.chunks:
            yield [chunk]


class Upstreams:
    """The upstreams of one process, by name. Close with `aclose`."""

    def __init__(
        self, upstreams: Mapping[str, UpstreamConfig], *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """transport: used for everything instead of connections of our own (tests). Raises ConfigError."""
        self._injected = transport
        #: For `fetch`: documents of the operator's choosing, which no upstream's TLS settings apply to.
        self._documents = transport or Transport(connections_max=4, keepalive_ms=0)
        self._upstreams = {
            name: Upstream(tuple(Target(name, url) for url in config.targets), transport or transport_for(name, config))
            for name, config in upstreams.items()
        }

    def forward(
        self,
        upstream: str,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        *,
        interim: object = None,
        trailers: object = None,
        retry: str = "connect",
    ) -> "Forwarding":
        """`async with` it: the answer's head is there; leaving gives the connection back or closes it.

        target: raw path and query, sent as it is behind the path of the upstream's URL. headers: sent as they are; a
        Host field is added only when there is none. Raises UpstreamUnreachable, UpstreamTimeout, UpstreamBroke, and
        BadRequest for a request that cannot be put on the wire unambiguously.
        """
        return Forwarding(self._upstreams[upstream], method, target, headers, body)

    async def fetch(self, url: str, *, timeout_ms: int, bytes_max: int) -> bytes:
        """The document at `url`, not redirected, at most `bytes_max` long, within `timeout_ms` altogether.

        Raises UpstreamUnreachable, UpstreamTimeout, or UpstreamBroke for any status but 200 and for too much.
        """
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._fetch(httpx.URL(url), bytes_max)
        except TimeoutError as exc:
            raise UpstreamTimeout from exc
        except (httpx.TransportError, httpx.InvalidURL) as exc:
            raise _mapped(exc) from exc

    async def _fetch(self, url: httpx.URL, bytes_max: int) -> bytes:
        head = [(b"Host", url.netloc), (b"Accept", b"application/json")]
        request = httpx.Request("GET", url, headers=head, stream=httpx.ByteStream(b""))
        response = await self._documents.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            if response.status_code != 200:
                raise UpstreamBroke(f"The document's server answered {response.status_code}.")
            document = bytearray()
            async for chunk in response.stream:
                document += chunk
                if len(document) > bytes_max:
                    raise UpstreamBroke(f"The document is larger than {bytes_max} bytes.")
            return bytes(document)
        finally:
            await response.stream.aclose()

    async def probe(self, upstream: str) -> None:
        """At least one target accepts connections within the connect deadline. Raises UpstreamUnreachable."""
        transport = self._upstreams[upstream].transport
        if not isinstance(transport, Transport):
            return  # an injected transport has nothing to connect to
        failure: httpx.TransportError | None = None
        for target in self._upstreams[upstream].targets:
            try:
                await transport.probe(target.base)
            except httpx.TransportError as exc:
                failure = exc
            else:
                return
        assert failure is not None
        raise _mapped(failure) from failure

    def stats(self) -> dict[str, Stats]:
        """The connections of each upstream, by its name."""
        return {
            name: upstream.transport.stats()
            for name, upstream in self._upstreams.items()
            if isinstance(upstream.transport, Transport)
        }

    async def aclose(self) -> None:
        """Every connection is closed. An injected transport stays open: it belongs to whoever made it."""
        if self._injected is not None:
            return
        for upstream in self._upstreams.values():
            await upstream.transport.aclose()
        await self._documents.aclose()


class Forwarding:
    """One request on its way to one of an upstream's targets, and its answer."""

    __slots__ = ("_body", "_headers", "_host_given", "_method", "_stream", "_target", "_upstream", "reached", "request_sent")

    def __init__(
        self,
        upstream: Upstream,
        method: str,
        target: bytes,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
    ) -> None:
        self._upstream = upstream
        self._method = method
        self._target = target
        self._headers = headers
        self._host_given = any(len(name) == 4 and name.lower() == b"host" for name, _ in headers)
        self._body = body
        self._stream: httpx.AsyncByteStream | None = None
        #: Whether any upstream may have seen a byte of the request; False is certain. Good at any time.
        self.reached = False
        self.request_sent = True

    async def __aenter__(self) -> Answer:
        if not self._target.startswith(b"/"):
            # "@host/" or ":1/" behind an authority would name another one.
            raise BadRequest("The request target must begin with '/'.")
        targets = self._upstream.in_turn()
        again = self._method.upper() in _IDEMPOTENT and not isinstance(self._body, AsyncIterable)
        number = 0
        while True:
            try:
                response = await self._attempt(targets[number])
                break
            except StaleConnection as exc:
                if not again:
                    raise self._failed(exc) from exc
                again = False
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                number += 1
                if number == len(targets):
                    raise self._failed(exc) from exc
            except httpx.TransportError as exc:
                raise self._failed(exc) from exc
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        self._stream = stream
        found = response.extensions
        reason: bytes = found.get("reason_phrase", b"")
        return Answer(
            response.status_code,
            reason,
            response.headers.raw,
            _Chunks(stream),
            found.get("request_sent", True),
            found.get("trailers", []),
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()

    async def _attempt(self, target: Target) -> httpx.Response:
        body = self._body
        if isinstance(body, AsyncIterable):
            stream: httpx.AsyncByteStream = _Stream(body)
        else:
            stream = httpx.ByteStream(body or b"")
        request = httpx.Request(
            self._method,
            target.url(self._target),
            headers=self._headers if self._host_given else [(b"Host", target.authority), *self._headers],
            stream=stream,
            extensions={"target": target.prefix + self._target},
        )
        try:
            return await self._upstream.transport.handle_async_request(request)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            request.extensions["reached"] = False
            raise
        finally:
            # A transport that does not say is assumed to have sent something.
            self.reached = self.reached or request.extensions.get("reached", True)

    def _failed(self, error: httpx.TransportError) -> GatewayError:
        failure = _mapped(error)
        if isinstance(failure, UpstreamUnreachable):
            # An earlier attempt may have got further than the last.
            failure.reached = self.reached
        return failure


class _Stream(httpx.AsyncByteStream):
    """A body as httpx wants it."""

    __slots__ = ("_body",)

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._body)


class _Chunks:
    """The body of an answer, with failures in the words of `gateway.errors`."""

    __slots__ = ("_chunks",)

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._chunks = aiter(stream)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._chunks.__anext__()
        except httpx.TransportError as exc:
            raise _mapped(exc) from exc


def _mapped(error: httpx.TransportError | httpx.InvalidURL) -> GatewayError:
    """`error` in the words of `gateway.errors`."""
    match error:
        case httpx.ConnectTimeout():
            return UpstreamConnectTimeout()
        case httpx.ConnectError() | httpx.PoolTimeout() | httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return UpstreamUnreachable()
        case httpx.TimeoutException():
            return UpstreamTimeout()
        case httpx.LocalProtocolError():
            return BadRequest(str(error))
        case _:
            return UpstreamBroke()

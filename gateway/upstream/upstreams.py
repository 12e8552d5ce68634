"""The upstreams by name: opened from the configuration, watched, counted and closed together.

What happens to one request is forward.py's. Documents that the gateway needs itself (signing keys) come through here
too, because this is the only way out to other servers.
"""

import asyncio
import time
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import httpx

from gateway.errors import UpstreamBroke, UpstreamTimeout, UpstreamUnreachable
from gateway.upstream.checkup import CheckRules, Checkup
from gateway.upstream.exchange import Interim
from gateway.upstream.failures import mapped
from gateway.upstream.forward import Field, Forwarding, Retry
from gateway.upstream.targets import Target, UpstreamConfig, open_upstream, tls_for, transport_for, transport_for_checks
from gateway.upstream.transport import Stats, Transport

_NO_CONNECTIONS = Stats(0, 0, 0, 0, 0)


class CheckedConfig(UpstreamConfig, Protocol):
    """What this room reads of `config.Upstream`."""

    @property
    def health_check(self) -> CheckRules | None: ...


@dataclass(frozen=True, slots=True)
class TargetStats:
    """One target, now."""

    origin: str
    #: `ejected`: gets no requests as long as there is a healthy one, because connecting or its health check fails.
    state: Literal["healthy", "ejected"]
    in_flight: int


@dataclass(frozen=True, slots=True)
class UpstreamStats(Stats):
    """One upstream, now: its connections, and the requests that use or want them."""

    in_flight: int
    queued: int
    targets: tuple[TargetStats, ...]


class Upstreams:
    """The upstreams of one process. `run` beside the requests, `aclose` last."""

    def __init__(
        self,
        upstreams: Mapping[str, CheckedConfig],
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """transport: used for everything instead of connections of our own (tests). Raises ConfigError."""
        self._owned: list[Transport] = []
        #: For `fetch`: documents of the operator's choosing, which no upstream's TLS settings apply to.
        self._documents = transport or self._own(Transport(connections_max=4, keepalive_ms=0))
        self._upstreams = {}
        self._checkups: list[Checkup] = []
        for name, config in upstreams.items():
            tls = tls_for(name, config)
            requests_by = transport or self._own(transport_for(config, tls))
            upstream = self._upstreams[name] = open_upstream(name, config, requests_by, clock)
            check = config.health_check
            if check is not None:
                checks_by = transport or self._own(transport_for_checks(check.timeout_ms, tls))
                self._checkups += [Checkup(target, checks_by, check) for target in upstream.targets]

    def _own(self, transport: Transport) -> Transport:
        self._owned.append(transport)
        return transport

    def forward(
        self,
        upstream: str,
        method: str,
        target: bytes,
        headers: Sequence[Field],
        body: bytes | AsyncIterable[bytes] | None,
        *,
        interim: Interim | None = None,
        trailers: list[Field] | None = None,
        retry: Retry = "connect",
    ) -> Forwarding:
        """`async with` it: the answer's head is there; leaving gives everything back.

        target: raw path and query, sent as it is behind the path of the upstream's URL. headers: sent as they are,
        but that Host becomes the target's own unless the upstream is to see the client's. interim: called with every
        1xx before the answer. trailers: read when a streamed body has ended. retry: which failures are tried again.
        Raises UpstreamBusy, UpstreamUnreachable, UpstreamTimeout, UpstreamBroke, and BadRequest for a request that
        cannot be put on the wire unambiguously.
        """
        return Forwarding(self._upstreams[upstream], method, target, headers, body, interim, trailers, retry)

    async def run(self) -> None:
        """Health checks, until cancelled."""
        async with asyncio.TaskGroup() as checks:
            for checkup in self._checkups:
                checks.create_task(checkup.run())
            await asyncio.Event().wait()

    async def fetch(self, url: str, *, timeout_ms: int, bytes_max: int) -> bytes:
        """The document at `url`, not redirected, at most `bytes_max` long, within `timeout_ms` altogether.

        Raises UpstreamUnreachable, UpstreamTimeout, UpstreamBusy, or UpstreamBroke for any status but 200 and for too
        much.
        """
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._fetch(httpx.URL(url), bytes_max)
        except TimeoutError as exc:
            raise UpstreamTimeout from exc
        except (httpx.TransportError, httpx.InvalidURL) as exc:
            raise mapped(exc) from exc

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
        """At least one target that passes its health check accepts connections within the connect deadline.

        Raises UpstreamUnreachable.
        """
        transport = self._upstreams[upstream].transport
        if not isinstance(transport, Transport):
            return  # an injected transport has nothing to connect to
        fit = [target for target in self._upstreams[upstream].targets if not target.standing.unfit]
        if not fit:
            raise UpstreamUnreachable("No target passes its health check.")
        # All at once: the first may be one that answers nothing for as long as it may.
        asked = {asyncio.create_task(_connect(transport, target)) for target in fit}
        failure: httpx.TransportError | None = None
        try:
            for attempt in asyncio.as_completed(asked):
                failure = await attempt
                if failure is None:
                    return
        finally:
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
        assert failure is not None
        raise mapped(failure) from failure

    def stats(self) -> dict[str, UpstreamStats]:
        """What each upstream has to do now, by its name."""
        found = {}
        for name, upstream in self._upstreams.items():
            transport = upstream.transport
            connections = transport.stats() if isinstance(transport, Transport) else _NO_CONNECTIONS
            found[name] = UpstreamStats(
                open=connections.open,
                idle=connections.idle,
                in_use=connections.in_use,
                waiting=connections.waiting,
                dialling=connections.dialling,
                in_flight=upstream.gate.inside,
                queued=upstream.gate.queued,
                targets=tuple(
                    TargetStats(target.origin, "healthy" if target.standing.healthy else "ejected", target.outstanding)
                    for target in upstream.targets
                ),
            )
        return found

    async def aclose(self) -> None:
        """Every connection is closed. An injected transport stays open: it belongs to whoever made it."""
        for transport in self._owned:
            await transport.aclose()


async def _connect(transport: Transport, target: Target) -> httpx.TransportError | None:
    """What keeps us from connecting to `target`, if anything does."""
    try:
        await transport.probe(target.base)
    except httpx.TransportError as exc:
        return exc
    target.standing.connected()
    return None

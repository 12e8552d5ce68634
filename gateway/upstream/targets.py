"""Where an upstream is: its targets' URLs, what is known of each, and the transport to them.

Owns what is read of the configuration. The models of `config` satisfy the protocols here.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import httpx

from gateway.errors import ConfigError
from gateway.upstream.balance import Balancer
from gateway.upstream.gate import Gate
from gateway.upstream.standing import EjectionRules, Standing
from gateway.upstream.timeouts import Timeouts
from gateway.upstream.tls import tls_context
from gateway.upstream.transport import Transport

#: Parsed URLs kept per target, and the longest request target worth keeping: at most 2 MiB of keys.
_URLS_MAX = 4_096
_URL_BYTES_MAX = 512


class UpstreamTimeouts(Protocol):
    """The deadlines of `config.Upstream`."""

    @property
    def connect_ms(self) -> int: ...
    @property
    def first_byte_ms(self) -> int: ...
    @property
    def idle_ms(self) -> int: ...
    @property
    def write_ms(self) -> int: ...


class UpstreamConfig(Protocol):
    """What this room reads of `config.Upstream`."""

    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def timeouts(self) -> UpstreamTimeouts: ...
    @property
    def host(self) -> Literal["target", "client"]: ...
    @property
    def connections_max(self) -> int: ...
    @property
    def requests_max(self) -> int | None: ...
    @property
    def queue_max(self) -> int: ...
    @property
    def queue_timeout_ms(self) -> int: ...
    @property
    def ejection(self) -> EjectionRules: ...
    @property
    def keepalive_ms(self) -> int: ...
    @property
    def tls_verify(self) -> bool: ...
    @property
    def ca_file(self) -> str | None: ...
    @property
    def client_cert_file(self) -> str | None: ...
    @property
    def client_key_file(self) -> str | None: ...


class Target:
    """One URL of an upstream, split into what every request needs of it, and how things are there."""

    __slots__ = ("_urls", "authority", "base", "origin", "outstanding", "prefix", "standing")

    def __init__(self, upstream: str, url: str, ejection: EjectionRules, clock: Callable[[], float]) -> None:
        """clock: monotonic seconds. Raises ConfigError."""
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as exc:
            raise ConfigError([f"upstreams.{upstream}.targets: '{url}' is not a URL: {exc}"]) from exc
        if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment or base.userinfo:
            raise ConfigError([f"upstreams.{upstream}.targets: '{url}' is not like http://host:port/path"])
        self.base = base
        self.authority: bytes = base.netloc
        self.prefix: bytes = base.raw_path.rstrip(b"/")
        #: `http://host:port`, without a path.
        self.origin = f"{base.scheme}://{self.authority.decode('ascii')}"
        self._urls: dict[bytes, httpx.URL] = {}
        #: Requests sent there and not over.
        self.outstanding = 0
        self.standing = Standing(upstream, self.origin, ejection, clock)

    def url(self, target: bytes) -> httpx.URL:
        """The whole URL of a request, for transports that route by it; ours sends `target` itself."""
        url = self._urls.get(target)
        if url is not None:
            return url
        try:
            url = httpx.URL(self.origin + (self.prefix + target).decode("latin-1"))
        except httpx.InvalidURL:
            return self.base  # httpx is stricter than the wire
        if len(target) <= _URL_BYTES_MAX:
            if len(self._urls) >= _URLS_MAX:
                del self._urls[next(iter(self._urls))]
            self._urls[target] = url
        return url


@dataclass(frozen=True, slots=True)
class Upstream:
    """The targets of one upstream, the way to them, and how many requests may be on it."""

    targets: tuple[Target, ...]
    transport: httpx.AsyncBaseTransport
    balancer: Balancer[Target]
    gate: Gate
    #: It sees the Host that the client used instead of its own.
    keeps_host: bool


def open_upstream(
    name: str, config: UpstreamConfig, transport: httpx.AsyncBaseTransport, clock: Callable[[], float]
) -> Upstream:
    """The upstream `name` as configured, reached through `transport`. clock: monotonic seconds. Raises ConfigError."""
    targets = tuple(Target(name, url, config.ejection, clock) for url in config.targets)
    requests_max = config.requests_max or config.connections_max * len(targets)
    return Upstream(
        targets,
        transport,
        Balancer(targets),
        Gate(requests_max, config.queue_max, config.queue_timeout_ms),
        config.host == "client",
    )


def transport_for(config: UpstreamConfig, tls: ssl.SSLContext | None) -> Transport:
    """Connections for requests."""
    timeouts = config.timeouts
    return Transport(
        timeouts=Timeouts(
            connect_ms=timeouts.connect_ms,
            first_byte_ms=timeouts.first_byte_ms,
            idle_ms=timeouts.idle_ms,
            write_ms=timeouts.write_ms,
            # Waiting is the queue's business; who waits behind it, for a target that is alone for a while, waits in
            # another one like it.
            pool_ms=config.queue_timeout_ms,
        ),
        connections_max=config.connections_max,
        keepalive_ms=config.keepalive_ms,
        tls=tls,
    )


def transport_for_checks(timeout_ms: int, tls: ssl.SSLContext | None) -> Transport:
    """A new connection for every health check, so that what keeps a target busy is not taken for what ails it."""
    timeouts = Timeouts(timeout_ms, timeout_ms, timeout_ms, timeout_ms, timeout_ms)
    return Transport(timeouts=timeouts, connections_max=1, keepalive_ms=0, tls=tls)


def tls_for(name: str, config: UpstreamConfig) -> ssl.SSLContext | None:
    """How targets of the upstream `name` are trusted, None when none of them speaks TLS. Raises ConfigError."""
    if not any(url.lower().startswith("https:") for url in config.targets):
        return None
    verify, ca_file, cert_file = config.tls_verify, config.ca_file, config.client_cert_file
    try:
        tls = tls_context(verify=verify, ca_file=ca_file)
    except OSError as exc:
        raise ConfigError([f"upstreams.{name}.ca_file: {ca_file} cannot be used: {exc}"]) from exc
    if cert_file is None:
        return tls
    try:
        return tls_context(verify=verify, ca_file=ca_file, cert_file=cert_file, key_file=config.client_key_file)
    except OSError as exc:
        raise ConfigError([f"upstreams.{name}.client_cert_file: {cert_file} cannot be used: {exc}"]) from exc

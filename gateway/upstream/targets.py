"""Where an upstream is: its targets' URLs, whose turn it is, and the transport to them.

Owns what is read of the configuration. The models of `config` satisfy the protocols here.
"""

import ssl
from typing import Protocol

import httpx

from gateway.errors import ConfigError
from gateway.upstream.timeouts import Timeouts
from gateway.upstream.transport import Transport, tls_context

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
    def connections_max(self) -> int: ...
    @property
    def keepalive_ms(self) -> int: ...
    @property
    def tls_verify(self) -> bool: ...
    @property
    def ca_file(self) -> str | None: ...


class Target:
    """One URL of an upstream, split into what every request needs of it."""

    __slots__ = ("_origin", "_urls", "authority", "base", "prefix")

    def __init__(self, upstream: str, url: str) -> None:
        try:
            base = httpx.URL(url)
        except httpx.InvalidURL as exc:
            raise ConfigError([f"upstreams.{upstream}.targets: '{url}' is not a URL: {exc}"]) from exc
        if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment or base.userinfo:
            raise ConfigError([f"upstreams.{upstream}.targets: '{url}' is not like http://host:port/path"])
        self.base = base
        self.authority: bytes = base.netloc
        self.prefix: bytes = base.raw_path.rstrip(b"/")
        self._origin = f"{base.scheme}://{self.authority.decode('ascii')}"
        self._urls: dict[bytes, httpx.URL] = {}

    def url(self, target: bytes) -> httpx.URL:
        """The whole URL of a request, for transports that route by it; ours sends `target` itself."""
        url = self._urls.get(target)
        if url is not None:
            return url
        try:
            url = httpx.URL(self._origin + (self.prefix + target).decode("latin-1"))
        except httpx.InvalidURL:
            return self.base  # httpx is stricter than the wire
        if len(target) <= _URL_BYTES_MAX:
            if len(self._urls) >= _URLS_MAX:
                del self._urls[next(iter(self._urls))]
            self._urls[target] = url
        return url


class Upstream:
    """The targets of one upstream and the transport to them."""

    __slots__ = ("_next", "targets", "transport")

    def __init__(self, targets: tuple[Target, ...], transport: httpx.AsyncBaseTransport) -> None:
        self.targets = targets
        self.transport = transport
        self._next = 0

    def in_turn(self) -> tuple[Target, ...]:
        """All targets, each call beginning with the next one."""
        if len(self.targets) == 1:
            return self.targets
        first = self._next
        self._next = (first + 1) % len(self.targets)
        return self.targets[first:] + self.targets[:first]


def transport_for(name: str, config: UpstreamConfig) -> Transport:
    tls: ssl.SSLContext | None = None
    if any(url.lower().startswith("https:") for url in config.targets):
        try:
            tls = tls_context(verify=config.tls_verify, ca_file=config.ca_file)
        except OSError as exc:
            raise ConfigError([f"upstreams.{name}.ca_file: {config.ca_file} cannot be used: {exc}"]) from exc
    timeouts = config.timeouts
    return Transport(
        timeouts=Timeouts(
            connect_ms=timeouts.connect_ms,
            first_byte_ms=timeouts.first_byte_ms,
            idle_ms=timeouts.idle_ms,
            write_ms=timeouts.write_ms,
            # Whether the upstream or its last free connection keeps a request waiting is the same to the client.
            pool_ms=timeouts.connect_ms,
        ),
        connections_max=config.connections_max,
        keepalive_ms=config.keepalive_ms,
        tls=tls,
    )

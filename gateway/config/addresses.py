"""URLs and networks: the addresses a configuration may name, each read from text or refused with a sentence.

No message repeats a URL, because it may carry a password. Nothing here resolves a name or opens a connection.
"""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, PlainValidator

from gateway.config.problems import describe, quoted
from gateway.redis_address import SCHEMES, RedisAddress

Network: TypeAlias = IPv4Network | IPv6Network


def _read_network(value: object) -> Network:
    if isinstance(value, IPv4Network | IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError(f"expected a network such as 10.0.0.0/8, got {describe(value)}")
    try:
        return ip_network(value)
    except ValueError:
        pass
    try:
        meant = f", did you mean '{ip_network(value, strict=False)}'?"
    except ValueError:
        meant = ": write it as 10.0.0.0/8, 192.0.2.7 or fd00::/8"
    raise ValueError(f"{quoted(value)} is not a network{meant}")


def _read_target(value: str) -> str:
    if value == "demo":
        return value
    return _origin(value, ("http", "https"), "'demo' or a URL such as http://127.0.0.1:3000, without a path").rstrip(
        "/"
    )


def _origin(value: str, schemes: tuple[str, ...], form: str) -> str:
    parts = split_url(value)
    if parts is None or parts.scheme not in schemes or parts.username is not None:
        raise ValueError(f"expected {form}")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"expected {form}: the client's own path and query are forwarded as they are")
    return value


def _read_redis(value: str) -> str:
    scheme, found, _ = value.partition("://")
    if value != "embedded":
        if not found or scheme.lower() not in SCHEMES:
            raise ValueError("expected 'embedded' or a URL such as redis://host:6379/0 (rediss:// for TLS)")
        RedisAddress.parse(value)
    return value


def _read_postgres(value: str) -> str:
    parts = split_url(value)
    if value != "embedded" and (parts is None or parts.scheme not in ("postgres", "postgresql")):
        raise ValueError("expected 'embedded' or a URL such as postgresql://user@host:5432/database")
    return value


def _read_jwks(value: str) -> str:
    parts = split_url(value)
    if parts is None or parts.scheme not in ("http", "https"):
        raise ValueError("expected a URL such as https://issuer.example/.well-known/jwks.json")
    if parts.scheme == "http" and not _is_private(parts.hostname):
        raise ValueError("signing keys fetched over plain http can be replaced on the way: use https")
    return value


@dataclass(frozen=True, slots=True)
class UrlParts:
    """What the checks need of a URL."""

    scheme: str
    hostname: str
    username: str | None
    path: str
    query: str
    fragment: str


def split_url(value: str) -> UrlParts | None:
    """The parts of an absolute URL with a host, None when it is no such URL."""
    if any(c.isspace() or not c.isprintable() for c in value):
        return None
    try:
        parts = urlsplit(value)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return None
    if not parts.hostname or not port_ok:
        return None
    return UrlParts(parts.scheme, parts.hostname, parts.username, parts.path, parts.query, parts.fragment)


def _is_private(hostname: str) -> bool:
    """Hosts that only a private network can name: no dot, a local suffix, or a private address."""
    try:
        return ip_address(hostname).is_private
    except ValueError:
        return "." not in hostname or hostname.endswith((".local", ".internal", ".localhost"))


Target: TypeAlias = Annotated[str, AfterValidator(_read_target)]
RedisUrl: TypeAlias = Annotated[str, AfterValidator(_read_redis)]
PostgresUrl: TypeAlias = Annotated[str, AfterValidator(_read_postgres)]
JwksUrl: TypeAlias = Annotated[str, AfterValidator(_read_jwks)]
NetworkText: TypeAlias = Annotated[Network, PlainValidator(_read_network, json_schema_input_type=str)]

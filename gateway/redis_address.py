"""Where Redis or Valkey is, read from a URL: one server, the sentinels that know it, or nodes of a cluster. Pure.

    redis[s]://[user:password@]host[:6379][/db]
    unix://[user:password@]/path/of.sock[?db=0]
    redis[s]+sentinel://[user:password@]host[:26379],host[:26379]/service[/db]
    redis[s]+cluster://[user:password@]host[:6379],host[:6379]

With the second `s` everything is TLS, sentinels too: `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile` name PEM files.
`sentinel_username` and `sentinel_password` sign in to the sentinels. No message repeats a part of the URL: a password
with a `/` in it ends up in the path.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, unquote

Topology: TypeAlias = Literal["single", "sentinel", "cluster"]
#: A host name or address without brackets, and a port.
Place: TypeAlias = tuple[str, int]

#: Scheme -> how many servers there are and who knows them, and whether connections are TLS.
SCHEMES: Mapping[str, tuple[Topology, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("single", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
PORT, SENTINEL_PORT, PORT_MAX = 6379, 26379, 65535

_PLACE = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[^\[\]:%]+))(?::(?P<port>[0-9]{1,5}))?")
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_OPTIONS = ("db", "username", "password", *_TLS_OPTIONS, *_SENTINEL_OPTIONS)


@dataclass(frozen=True, slots=True)
class Login:
    """Who signs in; without a password nobody does."""

    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def command(self) -> tuple[str, ...]:
        """The words after AUTH; none when nobody signs in."""
        return tuple(word for word in (self.username, self.password) if word) if self.password else ()


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files; without an authority of its own the system's are believed."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where the server is, or who knows where it is, and how to sign in."""

    topology: Topology
    #: The server; the sentinels; nodes of the cluster to ask first. Empty for a socket file.
    places: tuple[Place, ...]
    login: Login = Login()
    db: int = 0
    tls: Tls | None = None
    #: A socket file in place of host and port.
    path: str | None = None
    #: What the sentinels call the server.
    service: str = ""
    sentinel_login: Login = Login()

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Raises ValueError with a sentence that says what is wrong, never with a part of the URL."""
        scheme, _, rest = url.partition("://")
        if scheme.lower() not in SCHEMES or any(c.isspace() or not c.isprintable() for c in url):
            raise ValueError("expected a URL such as redis://host:6379/0, with one of " + ", ".join(SCHEMES))
        topology, tls = SCHEMES[scheme.lower()]
        rest, _, query = rest.partition("?")
        options = _read_options(query, topology, tls)
        hosts, _, path = rest.partition("/")
        credentials, _, hosts = hosts.rpartition("@")
        username, _, password = map(unquote, credentials.partition(":"))
        address = cls(
            topology=topology,
            places=(),
            login=_login(username or options.get("username"), password or options.get("password")),
            tls=Tls(*map(options.get, _TLS_OPTIONS)) if tls else None,
            sentinel_login=_login(*map(options.get, _SENTINEL_OPTIONS)),
        )
        if scheme.lower() == "unix":
            if hosts or not path:
                raise ValueError("expected a socket file such as unix:///run/redis.sock")
            return replace(address, path="/" + unquote(path), db=_read_db("", options))
        places = _read_places(hosts, topology)
        if topology == "sentinel":
            service, _, path = path.partition("/")
            if not service:
                raise ValueError("the name of the service is missing: redis+sentinel://host:26379,host:26379/service")
            address = replace(address, service=unquote(service))
        db = _read_db(path.rstrip("/"), options)
        if topology == "cluster" and db:
            raise ValueError("a cluster has database 0 only: leave the number out")
        return replace(address, places=places, db=db)

    @property
    def host(self) -> str:
        return self.places[0][0]

    @property
    def port(self) -> int:
        return self.places[0][1]

    def at(self, place: Place) -> "RedisAddress":
        """The one server there, signed in to and secured as this address says."""
        return RedisAddress("single", (place,), self.login, self.db, self.tls)

    def sentinel_at(self, place: Place) -> "RedisAddress":
        return RedisAddress("single", (place,), self.sentinel_login, 0, self.tls)

    def __str__(self) -> str:
        """For logs: never the password."""
        if self.path:
            return f"unix:{self.path}"
        places = ",".join(shown(place) for place in self.places)
        if self.topology == "cluster":
            return f"cluster {places}"
        if self.topology == "sentinel":
            return f"service {self.service} of sentinels {places}"
        return f"{places}/{self.db}"


def shown(place: Place) -> str:
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read_options(query: str, topology: Topology, tls: bool) -> dict[str, str]:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError("an option stands there twice")
    for name in options:
        if name not in _OPTIONS:
            near = get_close_matches(name, _OPTIONS, 1)
            meant = f"did you mean '{near[0]}'?" if near else "known are " + ", ".join(_OPTIONS)
            raise ValueError(f"an option is unknown: {meant}{_ENCODE}")
        if name in _TLS_OPTIONS and not tls:
            raise ValueError(f"{name} is for TLS: write rediss instead of redis")
        if name in _SENTINEL_OPTIONS and topology != "sentinel":
            raise ValueError(f"{name} is for redis+sentinel:// and rediss+sentinel://")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("ssl_keyfile needs the certificate of the key: ssl_certfile")
    return options


_ENCODE = " (in a password, / ? # and @ are written %2F %3F %23 and %40)"


def _read_places(hosts: str, topology: Topology) -> tuple[Place, ...]:
    port = SENTINEL_PORT if topology == "sentinel" else PORT
    places = tuple(_read_place(text, port) for text in hosts.split(","))
    if topology == "single" and len(places) > 1:
        raise ValueError("several hosts are for redis+sentinel:// and redis+cluster://")
    if len(set(places)) < len(places):
        raise ValueError("a host stands there twice")
    return places


def _read_place(text: str, default_port: int) -> Place:
    found = _PLACE.fullmatch(text)
    port = int(found["port"] or default_port) if found else 0
    if not found or not 0 < port <= PORT_MAX:
        raise ValueError(f"expected a host and its port, such as cache.internal:6379 or [fd00::7]:6379{_ENCODE}")
    return found["v6"] or found["name"], port


def _read_db(path: str, options: Mapping[str, str]) -> int:
    if path and "db" in options:
        raise ValueError("the number of the database stands there twice")
    text = path or options.get("db", "0")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError(f"what follows the last / is not the number of a database{_ENCODE}")
    return int(text)


def _login(username: str | None, password: str | None) -> Login:
    if username and not password:
        raise ValueError("a user name needs a password: user:password@host, or :password@host for the default user")
    return Login(username or None, password or None)

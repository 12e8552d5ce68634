"""A Redis (or Valkey) server, kept connected for ever, and the scripts it runs.

Calls fail fast: within the command deadline when the server does not reply, at once while it is known to be
away. Connecting goes on in the background with a growing, jittered pause; only changes of state are logged.
Nothing is sent twice: after a lost connection or a deadline the caller decides (DESIGN.md §5).
"""

import asyncio
import contextlib
import random
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any
from urllib.parse import urlsplit

import hiredis
import structlog
from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError

from gateway.errors import ConfigError, StoreRefused, StoreUnavailable
from gateway.stores.link import Link, LinkLost, LinkTimeout

#: What a reply can be: a status or bulk string, a number, nothing, or a list of these.
Reply = Any

RECONNECT_PAUSE_MIN_S = 0.05
RECONNECT_PAUSE_MAX_S = 2.0

#: Error replies that say the command or script was not begun.
DID_NOT_RUN = frozenset(
    "LOADING READONLY MASTERDOWN CLUSTERDOWN MOVED BUSY OOM MISCONF NOAUTH NOPERM NOREPLICAS".split()
)

#: Error replies that say the server is well and the key or the value is at fault.
WILL_NOT_DO = frozenset(("WRONGTYPE", "ERR"))

#: UnicodeError: what asyncio raises for a host name that IDNA cannot encode.
CONNECT_FAILURES = (OSError, TimeoutError, UnicodeError, LinkLost, LinkTimeout, RedisError, hiredis.ReplyError)

log = structlog.get_logger("gateway.redis")


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script; its SHA-1 is its version, so gateways of two releases can share one server."""

    name: str
    text: str
    #: Worked out once: it leaves with every call, and the text has thousands of bytes.
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where the server is and how to sign in, read from a redis://, rediss:// or unix:// URL."""

    host: str
    port: int
    path: str | None
    username: str | None
    password: str | None
    db: int
    tls: bool
    ca_file: str | None

    @classmethod
    def parse(cls, url: str) -> "RedisAddress":
        """Raises ConfigError for a URL that redis clients would not understand."""
        try:
            parts: dict[str, Any] = dict(parse_url(url))
        except ValueError as exc:
            raise ConfigError([f"REDIS_URL: {exc}"]) from exc
        # redis-py takes a path that is no number for database 0.
        path = urlsplit(url).path.strip("/")
        if not url.startswith("unix:") and path and not path.isdigit():
            raise ConfigError([f"REDIS_URL: '/{path}' is not the number of a database"])
        return cls(
            host=parts.get("host", "localhost"),
            port=parts.get("port", 6379),
            path=parts.get("path"),
            username=parts.get("username"),
            password=parts.get("password"),
            db=int(parts.get("db", 0)),
            tls=url.startswith("rediss://"),
            ca_file=parts.get("ssl_ca_certs"),
        )

    def __str__(self) -> str:
        """For logs: never the password."""
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}/{self.db}"


class Redis:
    """`start()` begins connecting; `send`/`call`/`run` use the connection of the moment; `close()` ends it."""

    def __init__(self, url: str, *, timeout_ms: int, connect_timeout_ms: int, scripts: Iterable[Script] = ()) -> None:
        self.address = RedisAddress.parse(url)
        self._timeout_s = timeout_ms / 1000
        self._connect_timeout_s = connect_timeout_ms / 1000
        self._scripts = {script.sha: script for script in scripts}
        self._link: Link | None = None
        self._settled = asyncio.Event()  # an attempt to connect has ended, well or badly
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._refusing: str | None = None
        #: Why the server cannot be used right now; None while connected.
        self.trouble: str | None = "not connected yet"

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep_connected(), name="redis-keeper")

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        if self._link is not None:
            self._link.abort()
            self._link = None

    @property
    def usable(self) -> bool:
        """There is a connection right now."""
        return self._link is not None

    def send(self, *args: bytes | str | int) -> asyncio.Future[Reply]:
        """Queue one command on the live connection; commands queued in one turn travel together.

        The future is for `reply()`. Raises StoreUnavailable at once when there is no connection."""
        if self._link is None:
            raise StoreUnavailable(detail=f"redis {self.address}: {self.trouble}")
        return self._link.send(*args)

    async def reply(self, future: asyncio.Future[Reply]) -> Reply:
        """The reply of a sent command. Raises StoreUnavailable on a deadline, a lost connection or an error reply."""
        try:
            reply = await future
        except (LinkLost, LinkTimeout) as exc:
            raise StoreUnavailable(detail=f"redis {self.address}: {exc}", ambiguous=True) from exc
        return self._checked(reply, "command")

    def _checked(self, reply: Reply, what: str) -> Reply:
        if not isinstance(reply, hiredis.ReplyError):
            self._refusing = None
            return reply
        kind = str(reply).partition(" ")[0]
        if self._refusing != kind:  # one line per change, not one per request
            self._refusing = kind
            log.error("redis refused", what=what, error=str(reply))
        failure = StoreRefused if kind in WILL_NOT_DO else StoreUnavailable
        detail = f"redis {self.address}: {what}: {reply}"
        raise failure(detail=detail, ambiguous=kind not in DID_NOT_RUN) from reply

    async def call(self, *args: bytes | str | int) -> Reply:
        """One command, one reply."""
        await self.connected()
        return await self.reply(self.send(*args))

    async def run(self, script: Script, keys: list[str], args: list[str | int | bytes]) -> Reply:
        """EVALSHA; a server that lost its script cache is given the script again, once."""
        await self.connected()
        try:
            reply = await self.send("EVALSHA", script.sha, len(keys), *keys, *args)
            if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                # NOSCRIPT means that nothing ran, so sending it again cannot act twice.
                reply = await self.send("EVAL", script.text, len(keys), *keys, *args)
        except (LinkLost, LinkTimeout) as exc:
            raise StoreUnavailable(detail=f"redis {self.address}: {script.name}: {exc}", ambiguous=True) from exc
        return self._checked(reply, script.name)

    def send_detached(self, *args: bytes | str | int) -> None:
        """The command leaves in this turn; nobody learns how it went. Only for what the next call makes good."""
        self.send(*args).add_done_callback(self.ignore)

    def run_detached(self, script: Script, keys: list[str], args: list[str | int | bytes]) -> None:
        """Like `send_detached`, for a script."""

        def replied(future: asyncio.Future[Reply]) -> None:
            self.ignore(future)
            if not future.cancelled() and future.exception() is None and self.usable:
                if isinstance(reply := future.result(), hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                    self.send_detached("EVAL", script.text, len(keys), *keys, *args)

        self.send("EVALSHA", script.sha, len(keys), *keys, *args).add_done_callback(replied)

    @staticmethod
    def ignore(future: asyncio.Future[Reply]) -> None:
        """Done-callback that takes note of a failure, so that the loop does not report it as unseen."""
        if not future.cancelled():
            future.exception()

    async def connected(self) -> None:
        """There is a connection. A reconnect that has just begun is waited for, at most one command deadline;
        once an attempt has failed, callers are turned away at once until one succeeds."""
        if self._link is not None:
            return
        if not self._settled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self._timeout_s)
        if self._link is None:
            raise StoreUnavailable(detail=f"redis {self.address}: {self.trouble}")

    async def _keep_connected(self) -> None:
        pause_s = RECONNECT_PAUSE_MIN_S
        while True:
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    link = await self._connect()
            except CONNECT_FAILURES as exc:
                reason = str(exc) or f"no connection within {self._connect_timeout_s * 1000:.0f} ms"
                if self.trouble != reason:
                    log.warning("redis unreachable", address=str(self.address), error=reason)
                self.trouble = reason
                self._settled.set()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, RECONNECT_PAUSE_MAX_S)
                continue
            if link.lost:  # between its sign-in and now
                continue
            self._link, self.trouble = link, None
            self._settled.set()
            pause_s = RECONNECT_PAUSE_MIN_S
            log.info("redis connected", address=str(self.address))
            await self._lost.wait()
            self._lost.clear()
            log.warning("redis connection lost", address=str(self.address), error=self.trouble)

    def _on_lost(self, link: Link, reason: str) -> None:
        if link is self._link:  # and not one that never got through its sign-in
            self._link, self.trouble = None, reason
            self._settled.clear()
            self._lost.set()

    async def _connect(self) -> Link:
        loop, address = asyncio.get_running_loop(), self.address

        def new_link() -> Link:
            return Link(loop, self._timeout_s, self._on_lost)

        link: Link
        tls = ssl.create_default_context(cafile=address.ca_file) if address.tls else None
        if address.path:
            _, link = await loop.create_unix_connection(new_link, address.path)
        else:
            _, link = await loop.create_connection(new_link, address.host, address.port, ssl=tls)
        try:
            await self._sign_in(link)
        except BaseException:
            link.abort()
            raise
        return link

    async def _sign_in(self, link: Link) -> None:
        """Authenticate, choose the database, load the scripts: one round trip. PING proves that it can serve."""
        address = self.address
        commands: list[tuple[str, ...]] = []
        if address.password:
            commands.append(("AUTH", *([address.username] if address.username else []), address.password))
        if address.db:
            commands.append(("SELECT", str(address.db)))
        commands.append(("PING",))
        commands.extend(("SCRIPT", "LOAD", script.text) for script in self._scripts.values())
        for reply in await asyncio.gather(*(link.send(*command) for command in commands)):
            if isinstance(reply, hiredis.ReplyError):
                raise reply

"""Redis (or Valkey) behind one interface, be it one server, the one that sentinels name, or a cluster.

Calls fail fast: within the command deadline when the server does not reply, at once while it is known to be away.
Nothing is sent twice: after a lost connection or a deadline the caller decides.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha1

import hiredis
import structlog

from gateway.errors import ConfigError, StoreRefused, StoreUnavailable
from gateway.redis_address import RedisAddress
from gateway.stores.cluster import Cluster
from gateway.stores.link import Link, LinkLost, LinkTimeout, NotSent, Reply
from gateway.stores.node import Node, Server, Terms, error_kind
from gateway.stores.sentinel import Sentinels

#: Error replies that say the command or script was not begun.
DID_NOT_RUN = frozenset(
    "LOADING READONLY MASTERDOWN BUSY OOM MISCONF NOAUTH NOPERM NOREPLICAS"
    " CLUSTERDOWN MOVED ASK TRYAGAIN CROSSSLOT".split()
)

#: Error replies that say the server is well and the key or the value is at fault.
WILL_NOT_DO = frozenset(("WRONGTYPE", "ERR"))

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


class Redis:
    """`start()` begins connecting; `send`/`call`/`run` use the connection of the moment; `close()` ends it.

    All keys of one call share a hash tag: in a cluster it goes where the first one belongs."""

    def __init__(
        self, url: str | RedisAddress, *, timeout_ms: int, connect_timeout_ms: int, scripts: Iterable[Script] = ()
    ) -> None:
        """Raises ConfigError for a URL that is none."""
        try:
            self.address = url if isinstance(url, RedisAddress) else RedisAddress.parse(url)
        except ValueError as exc:
            raise ConfigError([f"REDIS_URL: {exc}"]) from exc
        texts = tuple({script.sha: script.text for script in scripts}.values())
        terms = Terms(timeout_ms / 1000, connect_timeout_ms / 1000, texts)
        self._sentinels = Sentinels(self.address, terms) if self.address.topology == "sentinel" else None
        self._servers: Node | Cluster
        if self.address.topology == "cluster":
            self._servers = Cluster(self.address, terms, self._changed)
        elif self._sentinels is not None:
            self._servers = Node(self._sentinels.primary, terms, self._changed, moves=True)
        else:
            self._servers = Node(self._where, terms, self._changed)
        #: Where commands go right now.
        self._link: Link | Cluster | None = None
        self._refusing: str | None = None

    async def _where(self) -> RedisAddress:
        return self.address

    def _changed(self) -> None:
        self._link = self._servers.link

    def start(self) -> None:
        self._servers.start()

    async def close(self) -> None:
        await self._servers.close()
        self._link = None

    @property
    def usable(self) -> bool:
        """There is a connection right now; to a cluster, one at least."""
        return self._link is not None

    @property
    def trouble(self) -> str | None:
        """Why the server cannot be used right now, or which part of a cluster cannot; None while all is connected."""
        return self._servers.trouble

    async def servers(self) -> tuple[Server, ...]:
        """Every server there is behind the address, replicas included where somebody knows them. Raises
        StoreUnavailable when nobody can tell."""
        await self.connected()
        if isinstance(self._servers, Cluster):
            return self._servers.servers()
        if self._sentinels is None:
            return (Server(self.address),)
        try:
            return await self._sentinels.servers()
        except NotSent as exc:
            raise self._failure(exc) from exc

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
            raise self._failure(exc) from exc
        return self._checked(reply, "command")

    def _checked(self, reply: Reply, what: str) -> Reply:
        if not isinstance(reply, hiredis.ReplyError):
            self._refusing = None
            return reply
        kind = error_kind(reply)
        if self._refusing != kind:  # one line per change, not one per request
            self._refusing = kind
            log.error("redis refused", what=what, error=str(reply))
        failure = StoreRefused if kind in WILL_NOT_DO else StoreUnavailable
        detail = f"redis {self.address}: {what}: {reply}"
        raise failure(detail=detail, ambiguous=kind not in DID_NOT_RUN) from reply

    def _failure(self, exc: LinkLost | LinkTimeout, what: str = "") -> StoreUnavailable:
        detail = ": ".join(filter(None, (f"redis {self.address}", what, str(exc))))
        return StoreUnavailable(detail=detail, ambiguous=not isinstance(exc, NotSent))

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
            raise self._failure(exc, script.name) from exc
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
        """There is a connection. A reconnect that has just begun is waited for, at most one command deadline; once an
        attempt has failed, callers are turned away at once until one succeeds."""
        if self._link is None:
            try:
                await self._servers.connected()
            except NotSent as exc:
                raise self._failure(exc) from exc

"""One Redis (or Valkey) server, kept connected for ever.

Connecting goes on in the background with a growing, jittered pause; only changes of state are logged. Where the server
is may change: it is asked for before every attempt.
"""

import asyncio
import contextlib
import random
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import hiredis
import structlog

from gateway.redis_address import RedisAddress, Tls
from gateway.stores.link import Link, LinkLost, LinkTimeout, NotSent, Reply, Waiting

PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 2.0

#: What can become of asking a server. The middle ones: a host name that IDNA cannot encode, a certificate that is none,
#: a reply of something that is no Redis.
FAILURES = (OSError, ValueError, TypeError, LookupError, LinkLost, LinkTimeout, hiredis.ReplyError)

#: Error replies of a server that is no primary any more: the one that took its place has to be found.
DEMOTED = frozenset(("READONLY", "MASTERDOWN"))
#: A connection is given up for such a reply when it is at least so old: a server that is meant to be a replica, and the
#: only one there is, is not reconnected for every command.
DEMOTED_AFTER_S = 2.0
#: After a failover that was asked for, the former primary takes writes for eight seconds more, and loses them then.
MOVES_ASKED_S = 1.0

#: Of 160 random bits: enough to tell any two processes apart.
INCARNATION_CHARS = 16

_IN_SCRIPT = re.compile(r"ERR Error running script \(.*?\): @user_script:\d+:(?: @user_script: \d+:)? -?([A-Z]+) ")

log = structlog.get_logger("gateway.redis")


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every connection."""

    #: From a command to its reply.
    timeout_s: float
    #: From an attempt to connect to a server that has proved that it serves.
    connect_timeout_s: float
    #: Texts of the scripts that every server is given when a connection begins.
    scripts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Server:
    """One server of those behind an address."""

    address: RedisAddress
    primary: bool = True
    #: How many slots of a cluster it serves.
    slots: int = 0


class Node:
    """`start()` begins connecting; `link` is the connection of the moment; `close()` ends it.

    find: where the server is now; raises one of FAILURES when nobody can tell. on_change: called whenever a connection
    came, went, or could not be made. on_refused: like a Link's. moves: another server may take over while this one goes
    on as if nothing had happened, so it is asked for its role, and others again and again where it is."""

    def __init__(
        self,
        find: Callable[[], Awaitable[RedisAddress]],
        terms: Terms,
        on_change: Callable[[], None],
        *,
        on_refused: Callable[["Node", Waiting, hiredis.ReplyError], bool] | None = None,
        moves: bool = False,
    ) -> None:
        self._find = find
        self._terms = terms
        self._on_change = on_change
        self._on_refused = on_refused
        self._moves = moves
        role = [("ROLE",)] if moves else []
        self._greeting = (*role, ("PING",), ("INFO", "server"), *(("SCRIPT", "LOAD", text) for text in terms.scripts))
        self._settled = asyncio.Event()
        self._lost = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._connected_at = 0.0
        #: Connections of a server that is none of ours any more; what is under way on them has its time.
        self._left: set[Link] = set()
        #: Where it is; None until it was found.
        self.address: RedisAddress | None = None
        self.link: Link | None = None
        #: Why the server cannot be used right now; None while connected.
        self.trouble: str | None = "not connected yet"

    @property
    def settled(self) -> bool:
        """An attempt to connect has ended, well or badly, since the last connection was lost."""
        return self._settled.is_set()

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep_connected(), name="redis-keeper")

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        for link in (self.link, *self._left):
            if link is not None:
                link.abort()
        self.link = None
        await asyncio.sleep(0)  # sockets are closed in the loop's next turn

    async def connected(self) -> Link:
        """The connection. A reconnect that has just begun is waited for, at most one command deadline; once an attempt
        has failed, callers are turned away at once with NotSent until one succeeds."""
        if self.link is None and not self.settled:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self._terms.timeout_s)
        if self.link is None:
            raise NotSent(self.trouble)
        return self.link

    async def _keep_connected(self) -> None:
        pause_s = PAUSE_MIN_S
        while True:
            self.address = None
            try:
                self.address = await self._find()
                link: Link | None = await self._connect(self.address)
            except FAILURES as exc:
                reason = str(exc) or f"no connection within {self._terms.connect_timeout_s * 1000:.0f} ms"
                if self.trouble != reason:
                    log.warning("redis unreachable", address=str(self.address or "unknown"), error=reason)
                self.trouble = reason
                self._changed()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, PAUSE_MAX_S)
                continue
            pause_s = PAUSE_MIN_S
            while link is not None and not link.lost:  # between its sign-in and now
                self.link, self.trouble = link, None
                self._connected_at = asyncio.get_running_loop().time()
                self._lost.clear()
                self._changed()
                log.info("redis connected", address=str(self.address))
                link = await self._stay(link)

    async def _stay(self, link: Link) -> Link | None:
        """The connection is lost: None. Or a better one is there and this one was left: the server is elsewhere now."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(MOVES_ASKED_S if self._moves else None):
                    await self._lost.wait()
            if self._lost.is_set():
                log.warning("redis connection lost", address=str(self.address), error=self.trouble)
                return None
            with contextlib.suppress(
                *FAILURES
            ):  # while nobody can tell, or what they tell is wrong, it is where it was
                found = await self._find()
                if found != self.address:
                    better = await self._connect(found)
                    log.warning("redis primary was replaced", address=str(self.address), by=str(found))
                    self._leave(link, f"{found} has taken over")
                    self.address = found
                    return better

    def _changed(self) -> None:
        self._settled.set()
        self._on_change()

    def _link_lost(self, link: Link, reason: str) -> None:
        self._left.discard(link)
        if link is self.link:  # and not one that never got through its sign-in
            self.link, self.trouble = None, reason
            self._settled.clear()
            self._lost.set()
            self._on_change()

    def _leave(self, link: Link, reason: str) -> None:
        """Nothing new goes there."""
        if link is self.link:
            self._link_lost(link, reason)
            self._left.add(link)
            asyncio.get_running_loop().call_later(self._terms.timeout_s, link.abort)

    def _link_refused(self, link: Link, waiting: Waiting, error: hiredis.ReplyError) -> bool:
        age_s = asyncio.get_running_loop().time() - self._connected_at
        if error_kind(error) in DEMOTED and age_s >= DEMOTED_AFTER_S:
            self._leave(link, str(error))
        return self._on_refused is not None and self._on_refused(self, waiting, error)

    async def _connect(self, address: RedisAddress) -> Link:
        async with asyncio.timeout(self._terms.connect_timeout_s):
            link, replies = await connect(
                address, self._terms.timeout_s, self._greeting, on_lost=self._link_lost, on_refused=self._link_refused
            )
        if self._moves and replies[0][0] != b"master":
            link.abort()
            raise NotSent(f"{address} is said to be the primary, but is none")
        link.incarnation = _incarnation(replies[2 if self._moves else 1])
        return link


def _incarnation(info: bytes) -> str:
    """Of the process that said this of itself: the beginning of its run id. Raises LookupError."""
    [run_id] = [line for line in info.decode().splitlines() if line.startswith("run_id:")] or [""]
    if not run_id:
        raise LookupError("the server does not say which process it is")
    return run_id.removeprefix("run_id:")[:INCARNATION_CHARS]


async def connect(
    address: RedisAddress,
    timeout_s: float,
    greeting: Sequence[tuple[str, ...]],
    *,
    on_lost: Callable[[Link, str], None] = lambda link, reason: None,
    on_refused: Callable[[Link, Waiting, hiredis.ReplyError], bool] = lambda link, waiting, error: False,
) -> tuple[Link, list[Reply]]:
    """A connection that is signed in, and the replies to `greeting`, in one round trip. timeout_s: of every command.

    Raises one of FAILURES; then there is no connection. Bounded by the caller."""
    loop = asyncio.get_running_loop()

    def new_link() -> Link:
        return Link(loop, timeout_s, on_lost, on_refused)

    link: Link
    if address.path:
        _, link = await loop.create_unix_connection(new_link, address.path)
    else:
        tls = tls_context(address.tls) if address.tls else None
        _, link = await loop.create_connection(new_link, address.host, address.port, ssl=tls)
    try:
        login = address.login.command
        first = [("AUTH", *login)] if login else []
        if address.db:
            first.append(("SELECT", str(address.db)))
        replies = await asyncio.gather(*(link.send(*command) for command in (*first, *greeting)))
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise reply
    except BaseException:
        link.abort()
        raise
    return link, replies[len(first) :]


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Read anew for every connection: certificates are replaced while we run. Raises OSError."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def error_kind(error: hiredis.ReplyError) -> str:
    """Its first word, such as READONLY; of a command inside a script too, which Redis 6.2 wraps in a sentence."""
    text = str(error)
    kind = text.partition(" ")[0]
    inside = _IN_SCRIPT.match(text) if kind == "ERR" else None
    return inside[1] if inside else kind

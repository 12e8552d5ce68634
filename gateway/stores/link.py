"""One multiplexed Redis connection: commands queued in one turn of the event loop leave in one write, replies
come back in order. It owns the byte stream and the deadlines; finding and keeping a server is `node.py`'s.

    queued ──write──▶ waiting ──reply──▶ done
                         │ deadline over: its caller is told; its place is kept so that the late reply
                         │ is not taken for the next caller's
                         └ connection lost: every caller is told; nothing is ever sent twice
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import hiredis

#: What a reply can be: a status or bulk string, a number, nothing, or a list of these.
Reply: TypeAlias = Any
Command: TypeAlias = tuple[bytes | str | int, ...]
#: A command that left: when its caller is to be told that no reply came (loop time), its caller, the command.
Waiting: TypeAlias = tuple[float, asyncio.Future[Reply], Command]

#: As the last part of a command: the Link puts its own incarnation in its place.
INCARNATION = "\0incarnation"

#: A connection whose oldest reply is overdue by this factor is given up.
STALLED_AFTER_TIMEOUTS = 5


class LinkLost(Exception):
    """The Redis connection was lost before the reply arrived."""


class NotSent(LinkLost):
    """There is no connection to the server that the command is for: it never left."""


class LinkTimeout(Exception):
    """Redis did not reply within the deadline; the command may still take effect."""


class Link(asyncio.Protocol):
    """A connected byte stream to one Redis server.

    on_lost: told once, with the reason. on_refused: sees every error reply first, and whose caller it is for; says
    whether it will answer that caller itself."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        timeout_s: float,
        on_lost: Callable[["Link", str], None],
        on_refused: Callable[["Link", Waiting, hiredis.ReplyError], bool],
    ) -> None:
        self._loop = loop
        self._timeout_s = timeout_s
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._waiting: deque[Waiting] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.lost = False
        #: Which process of the server this is: one that was started anew may have forgotten. Empty until it has told.
        self.incarnation = ""

    def send(self, *args: bytes | str | int) -> asyncio.Future[Reply]:
        """The command will leave in this turn of the loop. The future yields the reply, an error reply as a value
        of type `hiredis.ReplyError`; it raises LinkLost or LinkTimeout."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self.lost:
            future.set_exception(NotSent("connection is closed"))
            return future
        if not self._out:
            self._loop.call_soon(self._flush)
        # What is remembered may be sent to another server, which has an incarnation of its own.
        told = args if args[-1] is not INCARNATION else (*args[:-1], self.incarnation)
        self._out.append(hiredis.pack_command(told))  # type: ignore[arg-type]  # its stub means tuple[..., ...]
        self._waiting.append((self._loop.time() + self._timeout_s, future, args))
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._expire)
        return future

    def abort(self) -> None:
        """The connection is closed at once; every waiting caller gets LinkLost."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and not self.lost:
            self._transport.write(b"".join(out))

    def _expire(self) -> None:
        """Tell every caller whose deadline is over; sleep until the next one's."""
        self._timer = None
        now = self._loop.time()
        for deadline, future, _ in self._waiting:
            if deadline > now:
                self._timer = self._loop.call_at(deadline, self._expire)
                break
            if not future.done():
                future.set_exception(LinkTimeout(f"no reply within {self._timeout_s * 1000:.0f} ms"))
        if self._waiting:
            overdue_s = now - self._waiting[0][0]
            if overdue_s > (STALLED_AFTER_TIMEOUTS - 1) * self._timeout_s:
                self.abort()
            elif self._timer is None:
                self._timer = self._loop.call_later(self._timeout_s, self._expire)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface without the base class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                waiting = self._waiting.popleft()
                if isinstance(reply, hiredis.ReplyError) and self._on_refused(self, waiting, reply):
                    continue
                if not waiting[1].done():
                    waiting[1].set_result(reply)
        except (hiredis.ProtocolError, IndexError):
            # Either side lost count: no later reply on this connection can be trusted.
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reason = str(exc) if exc else "closed by the server"
        waiting, self._waiting = self._waiting, deque()
        for _, future, _ in waiting:
            if not future.done():
                future.set_exception(LinkLost(reason))
        self._on_lost(self, reason)

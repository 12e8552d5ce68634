"""An open WebSocket from the first byte behind the 101 to its end: two ways, their bounds, and the closing handshake.

    OPEN ──an end closes, or breaks──────────────────────────▶ the other end learns it as it would have without us
     └────idle, lifetime, a message too big or not admitted,
          shutdown: close frames to both ends ──▶ CLOSING ──both have answered, or close_timeout──▶ ended

Owns the bounds and the order of ending. Does not own the connections (`Side`), nor what a message costs
(`AdmitMessage`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from gateway.config import WebSocket
from gateway.errors import GatewayError
from gateway.types import Outcome
from gateway.websocket.closing import IDLE, LIFETIME, SHUTTING_DOWN, Closing
from gateway.websocket.frames import close_frame
from gateway.websocket.way import AdmitMessage, Side, Watch, Way

Speak = Callable[[Coroutine[None, None, None]], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a WebSocket ended, and what passed: `in` is from the client, `out` to it."""

    outcome: Outcome
    #: Of the first close frame that either end, or the gateway, sent; None when there was none or it named none.
    close_code: int | None
    #: Why the gateway ended it: a word of `closing`, or the code of a refusal; None when it did not.
    why: str | None
    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int


class Relay:
    """One WebSocket. `run()` returns when it is over; `ended()` says how, also when `run()` was cancelled."""

    def __init__(self, client: Side, upstream: Side, rules: WebSocket, admit_message: AdmitMessage) -> None:
        """admit_message: asked before each message of the client when `rules.count_messages`."""
        self._client = client
        self._upstream = upstream
        self._rules = rules
        self._watch = Watch()
        admit = admit_message if rules.count_messages else None
        self._in = Way(client, upstream, self._watch, rules.message_bytes_max, admit)
        self._out = Way(upstream, client, self._watch, rules.message_bytes_max)

    async def run(self) -> None:
        """Both connections have ended. Cancelled, it still tells ends that are there that the gateway is shutting down,
        within `close_timeout`; cancelled again, it cuts them."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(way.run()) for way in (self._in, self._out)]

            def speak(goodbye: Coroutine[None, None, None]) -> None:
                running.append(tasks.create_task(goodbye))

            try:
                await self._until_over()
                await self._end(speak)
            except asyncio.CancelledError:
                if not (self._client.gone or self._watch.over or any(task.done() for task in running)):
                    self._watch.close(SHUTTING_DOWN)
                    await self._end(speak)
                raise
            finally:
                self._client.abort()
                self._upstream.abort()
                for task in running:
                    task.cancel()

    def ended(self) -> Ended:
        watch = self._watch
        closing = watch.closing
        return Ended(
            outcome=self._outcome(),
            close_code=closing.client_code if closing is not None and watch.code is None else watch.code,
            why=None if closing is None else closing.why,
            messages_in=self._in.messages,
            messages_out=self._out.messages,
            bytes_in=self._in.forwarded_bytes,
            bytes_out=self._out.forwarded_bytes,
        )

    def _outcome(self) -> Outcome:
        ended = self._watch.ended
        if self._watch.closing is not None:
            return Outcome.CUT
        if self._in.passed_close or self._out.passed_close:
            return Outcome.COMPLETE
        if ended is None:
            return Outcome.CLIENT_LEFT if self._client.gone else Outcome.CUT
        culprit = ended.broken or ended.source
        return Outcome.CLIENT_LEFT if culprit is self._client else Outcome.UPSTREAM_BROKE

    async def _until_over(self) -> None:
        """An end has ended, or the gateway has a reason to, or both have said Close and keep their connections."""
        watch, loop = self._watch, asyncio.get_running_loop()
        ends_at = loop.time() + self._rules.lifetime_ms / 1000
        parted_at: float | None = None
        while not watch.over:
            if parted_at is None and self._in.said_close and self._out.said_close:
                parted_at = loop.time() + self._rules.close_timeout_ms / 1000
            idle_at = watch.last_byte_at + self._rules.idle_ms / 1000
            due = min(idle_at, ends_at, parted_at or ends_at)
            if loop.time() < due:
                await self._changed(due)
            elif due == parted_at:
                return
            else:
                watch.close(IDLE if due == idle_at else LIFETIME)

    async def _end(self, speak: Speak) -> None:
        """What there was to say is said, and the connections end in order, as far as the ends let us: each within
        `close_timeout`."""
        watch, patience_s = self._watch, self._rules.close_timeout_ms / 1000
        deadline = asyncio.get_running_loop().time() + patience_s
        if watch.closing is not None:
            in_order = await self._part(watch.closing, speak, deadline)
        elif watch.ended is not None:
            in_order = await self._wind_down(watch.ended, deadline)
        else:
            in_order = True
        if in_order:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await asyncio.gather(_close(self._client), _close(self._upstream))

    async def _part(self, closing: Closing, speak: Speak, deadline: float) -> bool:
        """Both ends have been told and have answered; False when they have not by the `deadline`."""
        goodbye = close_frame(closing.upstream_code, closing.why, masked=True)
        speak(self._in.say(goodbye))
        speak(self._out.say(close_frame(closing.client_code, closing.reason, masked=False)))
        ways = (self._in, self._out)
        await self._until(lambda: all(map(_answered, ways)) or any(way.stuck for way in ways), deadline)
        return all(map(_answered, ways)) and not any(way.stuck for way in ways)

    async def _wind_down(self, ended: Way, deadline: float) -> bool:
        """One end is gone; the other has had what came from it. Whether that was an end in order."""
        other = self._out if ended is self._in else self._in
        if ended.broken is ended.sink:
            # It takes nothing more, but may have said why: that is still on its way to the other.
            await self._until(lambda: other.ended, deadline)
        elif ended is self._in and ended.passed_close:
            # A client may say Close and hang up at once. It is answered all the same.
            await self._until(lambda: _answered(other), deadline)
        return ended.eof or other.eof

    async def _until(self, condition: Callable[[], bool], deadline: float) -> None:
        loop = asyncio.get_running_loop()
        while not condition() and loop.time() < deadline:
            await self._changed(deadline)

    async def _changed(self, deadline: float) -> None:
        self._watch.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._watch.changed.wait()


def _answered(way: Way) -> bool:
    """The way's source has nothing more to say."""
    return way.said_close or way.ended


async def _close(side: Side) -> None:
    with contextlib.suppress(GatewayError, OSError):
        await side.aclose()

"""What an answer under way has cost so far, against what is held for it.

    used  0 ────────────────────── ask_at ────────── held ─────►
          delivered                delivered, while   nothing more is delivered until more is granted;
                                   more is asked for  when it is not, the answer ends here

Only prices by the token come here; what is flat was held in full. What is counted is what has been delivered, so an
answer runs over its hold by what arrived in one read at most, and by the error of counting: where the upstream does
not report as it goes, four bytes of text are taken for a token.
"""

import asyncio
from collections.abc import Awaitable, Callable

from gateway.admission import Hold
from gateway.errors import StoreUnavailable
from gateway.meter import Meter
from gateway.types import Peek, Quote
from gateway.usage import tokens_of

#: More is asked for when this part of a step, or of a hold smaller than one, is left.
ASKED_PART = 4
#: How long delivery waits for an answer to that, beyond which it counts as no.
WAIT_S = 2.0
#: Parts of a step may be granted; an answer that needs more of them than this at one point has run dry.
GRANTS_MAX = 8

Extend = Callable[[Hold, int], Awaitable[int]]


class Spending:
    """One stream's. State: how much is used, when more is asked for, and the question under way."""

    def __init__(self, hold: Hold, peek: Peek, meter: Meter, extend: Extend) -> None:
        """An answer has begun, so the input is used, which is what the heartbeat tells of one that is plain."""
        self._hold = hold
        hold.used_ucredits = hold.quote.price.of(tokens_of(peek.body_bytes), 0)
        self._price, self._step_ucredits = hold.quote.price, hold.quote.step_ucredits
        self._meter = meter
        self._extend = extend
        self._asking: asyncio.Task[int] | None = None
        self._ask_at = self._ahead()

    def covers(self) -> bool:
        """What was delivered is paid for by the hold, or nobody can tell; else `more` decides. `Hold.used_ucredits` is
        up to date. To be asked after every read."""
        so_far = self._meter.so_far()
        if so_far is None:
            return True
        used = self._hold.used_ucredits = self._price.of(so_far.input_tokens, so_far.output_tokens)
        if used < self._ask_at or not self._step_ucredits or so_far.over:
            return True
        self._look()
        if used > self._hold.ucredits:
            return False
        if used >= self._ask_at and self._asking is None:
            self._ask(self._step_ucredits)
        return True

    async def more(self) -> bool:
        """More was granted, so that the hold pays for what was delivered; False: the answer has to end."""
        for _ in range(GRANTS_MAX):
            lacking = self._hold.used_ucredits - self._hold.ucredits
            if lacking <= 0:
                return True
            early = self._asking is not None
            asking = self._asking or self._ask(lacking + self._step_ucredits)
            await asyncio.wait((asking,), timeout=WAIT_S)
            if not asking.done() or (self._look() == 0 and not early):
                return False
        return self._hold.used_ucredits <= self._hold.ucredits

    def stop(self) -> None:
        """Nothing more is asked for. What is granted all the same ends with the hold."""
        if self._asking is not None:
            self._asking.cancel()

    def _ask(self, ucredits: int) -> asyncio.Task[int]:
        self._asking = asyncio.create_task(self._granted(ucredits))
        return self._asking

    async def _granted(self, ucredits: int) -> int:
        try:
            return await self._extend(self._hold, ucredits)
        except StoreUnavailable:
            return 0

    def _look(self) -> int | None:
        """What the question was answered with, if it was; then the next may be asked."""
        asking = self._asking
        if asking is None or not asking.done():
            return None
        self._asking = None
        granted = asking.result()
        if granted:
            self._ask_at = self._ahead()
        else:
            # Money may come in at any time: again at half of what is left, and once more at the end of it.
            left = self._hold.ucredits - self._hold.used_ucredits
            self._ask_at = self._hold.used_ucredits + max(1, left // 2)
        return granted

    def _ahead(self) -> int:
        held = self._hold.ucredits
        return held - min(held, self._step_ucredits) // ASKED_PART


def output_paid_for(quote: Quote, held_ucredits: int, peek: Peek) -> int | None:
    """The most output tokens that a hold pays for, >= 1; None where nothing is to be held to that: output costs
    nothing, the client allows less, or the hold of its stream grows."""
    price = quote.price
    if not price.output_rate or (peek.stream and quote.step_ucredits and quote.want_ucredits < quote.estimate_ucredits):
        return None
    room_ucredits = held_ucredits - price.of(max(1, tokens_of(peek.body_bytes)), 0)
    paid = max(1, room_ucredits * 1_000_000 // price.output_rate)
    return paid if peek.max_output_tokens is None or peek.max_output_tokens > paid else None

"""What the reply to an admission says of the hold and of each limit. Pure."""

from collections.abc import Sequence

from gateway import limits
from gateway.admission.hold import Hold
from gateway.types import LimitState

#: Where it says what, in front of the pairs of the limits; amounts in micro-credits.
STATUS, JUDGED_AT_US, AVAILABLE, OWNED, GRANTED, EPOCH, NEED, BIRTH, HEAD = range(9)
ADMITTED = ("OK", "DUP")

#: What `sliding_sessions` says in place of the retry_ms.
_HAS_RECORD = -2


def note_verdict(hold: Hold, reply: Sequence[bytes]) -> str:
    """The hold knows what was judged and granted; returns the status."""
    status = reply[STATUS].decode()
    admitted = status in ADMITTED
    hold.judged_at_us = int(reply[JUDGED_AT_US])
    numbers = [int(value) for value in reply[HEAD:]]
    hold.states, hold.session_known = states_of(hold, numbers, admitted), session_known(hold, numbers)
    if admitted and hold.ucredits:
        hold.ucredits, hold.epoch = int(reply[GRANTED]), int(reply[EPOCH])
        hold.available_ucredits = int(reply[AVAILABLE]) - hold.ucredits
    return status


def states_of(hold: Hold, numbers: Sequence[int], admitted: bool) -> tuple[LimitState, ...]:
    """Each of the hold's demands as it was judged. numbers: used and retry_ms of each, one after the other; a retry_ms
    below 0 is of a demand that fits and costs nothing."""
    now_ms = hold.judged_at_us // 1000
    states = []
    for number, demand in enumerate(hold.demands):
        used, retry_ms = numbers[2 * number], numbers[2 * number + 1]
        limit, cost = demand.limit, demand.cost if retry_ms >= 0 else 0
        retry_ms = max(0, retry_ms)
        after = used + cost if admitted and not retry_ms else used
        remaining = max(0, limit.capacity - after)
        states.append(LimitState(limit, cost, used, remaining, retry_ms, limits.reset_ms(limit, after, now_ms)))
    return tuple(states)


def session_known(hold: Hold, numbers: Sequence[int]) -> bool | None:
    """Whether the server had a record of the session, of which a session limit takes nothing; None: nobody asked."""
    found = [numbers[2 * at + 1] for at, demand in enumerate(hold.demands) if demand.member]
    return _HAS_RECORD in found if found else None

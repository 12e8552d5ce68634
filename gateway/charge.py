"""What a finished request costs: the outcome table of DESIGN.md §6, as a pure function.

    outcome            credits             token limits           request limits   basis
    never reached      released            released               released         released
    upstream refused   released            released               kept             released
    complete, known    price               exact                  kept             exact
    complete, unknown  price               the estimate           kept             estimated; exact if none held
    broke / left / cut price               delivered so far       kept             under_estimate

`upstream refused` is an answer of 400 or above, or none at all (our own 502 or 504): nothing was delivered, nothing is
owed, and a client library that tries again is not charged for each try.

The price is flat per request, so whatever reached the upstream costs it in full. Two rows of DESIGN.md are not here: a
gateway that died settles nothing (the sweeper does), and under a flat price the money cannot run out in mid-stream.
"""

from typing import assert_never

from gateway.types import Charge, Outcome, Usage

NOTHING = Usage(0, 0)


def settle(outcome: Outcome, usage: Usage | None, price_ucredits: int, token_estimate: int) -> Charge:
    """The charge for a request that ended as `outcome`.

    usage: what the meter learned, None when it learned nothing. price_ucredits, token_estimate: what the hold
    reserved, both >= 0. `Charge.usage` is what to book instead of the estimate; None leaves the estimate booked.

    A client that left before the upstream gave any byte pays the flat price: the upstream has the request and may
    be working on it. Its tokens are those of the input when the caller can tell (`meter.unanswered`), else the
    estimate stays.
    """
    match outcome:
        case Outcome.NEVER_REACHED:
            return Charge(0, NOTHING, keep_requests=False, basis="released")
        case Outcome.UPSTREAM_REFUSED:
            return Charge(0, NOTHING, keep_requests=True, basis="released")
        case Outcome.COMPLETE:
            return _complete(usage, price_ucredits, token_estimate)
        case Outcome.UPSTREAM_BROKE | Outcome.CLIENT_LEFT | Outcome.CUT:
            return _cut_short(usage, price_ucredits)
        case _:
            assert_never(outcome)


def _complete(usage: Usage | None, price_ucredits: int, token_estimate: int) -> Charge:
    if usage is None:
        # A flat price is exact without any usage; only booked tokens can be an estimate.
        return Charge(price_ucredits, None, keep_requests=True, basis="estimated" if token_estimate else "exact")
    if usage.exact:
        return Charge(price_ucredits, usage, keep_requests=True, basis="exact")
    return Charge(price_ucredits, usage, keep_requests=True, basis="estimated", at_least=True)


def _cut_short(usage: Usage | None, price_ucredits: int) -> Charge:
    if usage is None:
        return Charge(price_ucredits, None, keep_requests=True, basis="under_estimate")
    # The final count had already passed when the connection ended: nothing was missed.
    basis = "exact" if usage.exact else "under_estimate"
    return Charge(price_ucredits, usage, keep_requests=True, basis=basis)

"""What a finished request costs: the table of docs/walk.md, as a pure function.

    outcome             credits                      token limits        request limits   basis
    never reached       released                     released            released         released
    upstream refused    released                     released            kept             released
    complete, known     price of what was used       exact               kept             exact
    complete, unknown   the estimate, never below    the estimate        kept             estimated; exact when nothing
                        what was delivered                                                had to be estimated
    broke / left / cut  price of what was delivered  delivered so far    kept             under_estimate
      unknown           the estimate                 the estimate        kept             under_estimate
    out of credits      price of what was delivered  delivered so far    kept             under_estimate
      unknown           what was held                the estimate        kept             under_estimate

`upstream refused` is an answer of 400 or above, or none at all (our own 502 or 504): nothing was delivered, nothing is
owed, and a client library that tries again is not charged for each try.

The flat part of a price is owed in full by whatever reached the upstream; where a final count had passed before the
answer broke off, the charge is `exact`. A price by the token is rounded up once, here. One row of docs/walk.md is not
here: a gateway that died settles nothing, the sweeper does.

What a request used beyond its hold is owed all the same (`overrun: debt`), or forgiven (`absorb`).
"""

from typing import Literal, assert_never

from gateway.config import CREDITS_MAX
from gateway.types import UCREDITS_PER_CREDIT, Charge, Outcome, Quote, Usage

NOTHING = Usage(0, 0)
#: Whatever an upstream reports: no single charge is larger than what scripts count exactly.
UCREDITS_MAX = CREDITS_MAX * UCREDITS_PER_CREDIT


def settle(
    outcome: Outcome,
    usage: Usage | None,
    quote: Quote,
    token_estimate: int,
    held_ucredits: int,
    overrun: Literal["debt", "absorb"] = "debt",
) -> Charge:
    """The charge for a request that ended as `outcome`.

    usage: what the meter learned, None when it learned nothing. token_estimate, held_ucredits: what was reserved and
    held in the end, both >= 0. `Charge.usage` is what to book instead of the estimate; None leaves the estimate booked.

    A client that left before the upstream gave any byte pays for its input: the upstream has the request and may be
    working on it. The caller says how much that is (`meter.unanswered`), else the estimate stays.
    """
    match outcome:
        case Outcome.NEVER_REACHED:
            return Charge(0, NOTHING, keep_requests=False, basis="released")
        case Outcome.UPSTREAM_REFUSED:
            return Charge(0, NOTHING, keep_requests=True, basis="released")
        case Outcome.COMPLETE:
            owed = _complete_ucredits(usage, quote)
            basis = _complete_basis(usage, quote, token_estimate)
        case Outcome.UPSTREAM_BROKE | Outcome.CLIENT_LEFT | Outcome.CUT | Outcome.OUT_OF_CREDITS:
            unknown = held_ucredits if outcome is Outcome.OUT_OF_CREDITS else quote.estimate_ucredits
            owed = unknown if usage is None else _price_of(usage, quote)
            # The final count had already passed when the connection ended: nothing was missed.
            basis = "exact" if usage is not None and usage.exact else "under_estimate"
        case _:
            assert_never(outcome)
    owed = max(owed, quote.price.flat_ucredits)
    if overrun == "absorb":
        owed = min(owed, held_ucredits)
    at_least = outcome is Outcome.COMPLETE and usage is not None and not usage.exact
    return Charge(min(owed, UCREDITS_MAX), usage, keep_requests=True, basis=basis, at_least=at_least)


def _price_of(usage: Usage, quote: Quote) -> int:
    return quote.price.of(usage.input_tokens, usage.output_tokens)


def _complete_ucredits(usage: Usage | None, quote: Quote) -> int:
    if usage is None:
        return quote.estimate_ucredits
    # A lower bound of a whole answer may raise the estimate, never lower it.
    return _price_of(usage, quote) if usage.exact else max(_price_of(usage, quote), quote.estimate_ucredits)


def _complete_basis(usage: Usage | None, quote: Quote, token_estimate: int) -> str:
    if usage is None:
        # A flat price is exact without any usage; only booked tokens can be an estimate.
        return "estimated" if token_estimate or quote.price.by_token else "exact"
    return "exact" if usage.exact else "estimated"

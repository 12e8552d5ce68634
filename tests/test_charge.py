"""The table of docs/walk.md, row by row, and what holds for every row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.hold import actual_of
from gateway.charge import UCREDITS_MAX, settle
from gateway.types import Charge, Outcome, Price, Quote, Usage
from tests.limits.given import demand

PRICE, ESTIMATE = 2_000_000, 900
EXACT = Usage(30, 12)
SO_FAR = Usage(30, 5, exact=False)
MORE_THAN_ESTIMATED = Usage(1000, 5, exact=False)

NOTHING = Usage(0, 0)
RELEASED = Charge(0, NOTHING, keep_requests=False, basis="released")
REFUSED = Charge(0, NOTHING, keep_requests=True, basis="released")


def charged(usage: Usage | None, basis: str) -> Charge:
    return Charge(PRICE, usage, keep_requests=True, basis=basis, at_least=basis == "estimated" and usage is not None)


TABLE = [
    (Outcome.NEVER_REACHED, None, RELEASED),
    (Outcome.NEVER_REACHED, EXACT, RELEASED),
    (Outcome.NEVER_REACHED, SO_FAR, RELEASED),
    (Outcome.UPSTREAM_REFUSED, None, REFUSED),
    (Outcome.UPSTREAM_REFUSED, EXACT, REFUSED),
    (Outcome.UPSTREAM_REFUSED, SO_FAR, REFUSED),
    (Outcome.COMPLETE, None, charged(None, "estimated")),
    (Outcome.COMPLETE, EXACT, charged(EXACT, "exact")),
    (Outcome.COMPLETE, SO_FAR, charged(SO_FAR, "estimated")),
    (Outcome.COMPLETE, MORE_THAN_ESTIMATED, charged(MORE_THAN_ESTIMATED, "estimated")),
    (Outcome.UPSTREAM_BROKE, None, charged(None, "under_estimate")),
    (Outcome.UPSTREAM_BROKE, EXACT, charged(EXACT, "exact")),
    (Outcome.UPSTREAM_BROKE, SO_FAR, charged(SO_FAR, "under_estimate")),
    (Outcome.CLIENT_LEFT, None, charged(None, "under_estimate")),
    (Outcome.CLIENT_LEFT, EXACT, charged(EXACT, "exact")),
    (Outcome.CLIENT_LEFT, SO_FAR, charged(SO_FAR, "under_estimate")),
    (Outcome.CUT, None, charged(None, "under_estimate")),
    (Outcome.CUT, EXACT, charged(EXACT, "exact")),
    (Outcome.CUT, SO_FAR, charged(SO_FAR, "under_estimate")),
    (Outcome.OUT_OF_CREDITS, None, charged(None, "under_estimate")),
    (Outcome.OUT_OF_CREDITS, EXACT, charged(EXACT, "exact")),
    (Outcome.OUT_OF_CREDITS, SO_FAR, charged(SO_FAR, "under_estimate")),
]


@pytest.mark.parametrize(("outcome", "usage", "expected"), TABLE)
def test_each_row_of_the_outcome_table(outcome: Outcome, usage: Usage | None, expected: Charge) -> None:
    assert settle(outcome, usage, Quote.flat(PRICE), ESTIMATE, PRICE) == expected


def test_the_table_has_a_row_for_every_outcome() -> None:
    assert {row[0] for row in TABLE} == set(Outcome)


counts = st.integers(0, 1 << 40)
usages = st.none() | st.builds(Usage, counts, counts, st.booleans())


@given(st.sampled_from(Outcome), usages, counts, counts)
def test_a_flat_price_is_charged_in_full_or_not_at_all(
    outcome: Outcome, usage: Usage | None, price: int, estimate: int
) -> None:
    charge = settle(outcome, usage, Quote.flat(price), estimate, price)

    reached = outcome not in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED)
    assert charge.ucredits == (price if reached else 0)
    assert charge.keep_requests == (outcome is not Outcome.NEVER_REACHED)
    assert reached or charge.usage == NOTHING


UNITS = ("tokens", "input_tokens", "output_tokens")


@given(
    st.sampled_from([o for o in Outcome if o not in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED)]), usages, counts
)
def test_tokens_are_never_below_what_was_delivered(outcome: Outcome, usage: Usage | None, estimate: int) -> None:
    charge = settle(outcome, usage, Quote.flat(1), estimate, 1)

    for unit in UNITS:
        booked = actual_of(demand("tpm", "sliding", unit, "org", "", 1 << 50, 60_000, estimate), charge)
        if usage is None:
            assert booked == estimate
        else:
            assert booked >= (usage.total_tokens if unit == "tokens" else getattr(usage, unit))


@given(usages.filter(bool), counts)
def test_a_lower_bound_of_a_whole_answer_never_lowers_the_estimate(usage: Usage, estimate: int) -> None:
    charge = settle(Outcome.COMPLETE, usage, Quote.flat(1), estimate, 1)

    for unit in UNITS:
        booked = actual_of(demand("tpm", "sliding", unit, "org", "", 1 << 50, 60_000, estimate), charge)
        assert usage.exact or booked >= estimate


@given(st.sampled_from(Outcome), usages, counts, counts)
def test_only_a_final_count_is_called_exact(outcome: Outcome, usage: Usage | None, price: int, estimate: int) -> None:
    charge = settle(outcome, usage, Quote.flat(price), estimate, price)

    if charge.basis == "exact" and not (outcome is Outcome.COMPLETE and usage is None and estimate == 0):
        assert usage is not None and usage.exact and charge.usage == usage


def test_a_flat_price_without_booked_tokens_needs_no_usage_to_be_exact() -> None:
    assert settle(Outcome.COMPLETE, None, Quote.flat(PRICE), 0, PRICE) == charged(None, "exact")


# Prices by the token: 2 credits, and 1 credit for 1000 tokens of input or 500 of output.
BY_TOKEN = Price(PRICE, 1_000_000_000, 2_000_000_000)
#: What is estimated, and what less is held.
QUOTED, HELD = 9_000_000, 4_000_000
QUOTE = Quote(BY_TOKEN, QUOTED, 2_100_000, QUOTED, step_ucredits=2_048_000)
LOWER = Usage(1000, 500, exact=False)

PRICED = [
    (Outcome.NEVER_REACHED, EXACT, 0, "released"),
    (Outcome.UPSTREAM_REFUSED, EXACT, 0, "released"),
    (Outcome.COMPLETE, EXACT, 2_054_000, "exact"),
    (Outcome.COMPLETE, Usage(1000, 9000), 21_000_000, "exact"),
    (Outcome.COMPLETE, None, QUOTED, "estimated"),
    (Outcome.COMPLETE, LOWER, QUOTED, "estimated"),
    (Outcome.COMPLETE, Usage(1000, 9000, exact=False), 21_000_000, "estimated"),
    (Outcome.UPSTREAM_BROKE, LOWER, 4_000_000, "under_estimate"),
    (Outcome.UPSTREAM_BROKE, EXACT, 2_054_000, "exact"),
    (Outcome.UPSTREAM_BROKE, None, QUOTED, "under_estimate"),
    (Outcome.CLIENT_LEFT, Usage(0, 0, exact=False), PRICE, "under_estimate"),
    (Outcome.CUT, LOWER, 4_000_000, "under_estimate"),
    (Outcome.OUT_OF_CREDITS, Usage(1000, 501, exact=False), 4_002_000, "under_estimate"),
    (Outcome.OUT_OF_CREDITS, None, HELD, "under_estimate"),
]


@pytest.mark.parametrize(("outcome", "usage", "ucredits", "basis"), PRICED)
def test_a_price_by_the_token_is_charged_for_what_was_used(
    outcome: Outcome, usage: Usage | None, ucredits: int, basis: str
) -> None:
    charge = settle(outcome, usage, QUOTE, ESTIMATE, HELD)

    assert (charge.ucredits, charge.basis) == (ucredits, basis)


def test_every_outcome_has_a_price_by_the_token() -> None:
    assert {row[0] for row in PRICED} == set(Outcome)


@given(st.sampled_from(Outcome), usages, counts, counts)
def test_absorbing_never_charges_beyond_the_hold_and_nothing_else_differs(
    outcome: Outcome, usage: Usage | None, held: int, estimate: int
) -> None:
    owed, absorbed = (settle(outcome, usage, QUOTE, estimate, held, overrun) for overrun in ("debt", "absorb"))

    assert absorbed.ucredits == min(owed.ucredits, held)
    assert (absorbed.usage, absorbed.basis, absorbed.keep_requests) == (owed.usage, owed.basis, owed.keep_requests)


REACHED = st.sampled_from([o for o in Outcome if o not in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED)])
rates = st.integers(0, 10**15)


@given(REACHED, usages, st.builds(Price, counts, rates, rates), counts)
def test_nobody_pays_less_than_the_flat_part_nor_less_than_was_delivered(
    outcome: Outcome, usage: Usage | None, price: Price, estimate: int
) -> None:
    quote = Quote(price, estimate, estimate, estimate)
    charge = settle(outcome, usage, quote, 0, estimate)

    assert min(UCREDITS_MAX, price.flat_ucredits) <= charge.ucredits <= UCREDITS_MAX
    if usage is not None:
        delivered = usage.input_tokens * price.input_rate + usage.output_tokens * price.output_rate
        assert charge.ucredits >= min(UCREDITS_MAX, price.flat_ucredits + delivered // 1_000_000)


def test_a_request_is_rounded_up_once() -> None:
    third = Quote(Price(0, 333_333, 333_333), 9, 1, 9)

    # Two thirds of a micro-credit: each of them rounded by itself would be two.
    assert settle(Outcome.COMPLETE, Usage(1, 1), third, 0, 9).ucredits == 1

"""The outcome table of DESIGN.md §6, row by row, and what holds for every row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.hold import actual_of
from gateway.charge import settle
from gateway.types import Charge, Outcome, Usage
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
]


@pytest.mark.parametrize(("outcome", "usage", "expected"), TABLE)
def test_each_row_of_the_outcome_table(outcome: Outcome, usage: Usage | None, expected: Charge) -> None:
    assert settle(outcome, usage, PRICE, ESTIMATE) == expected


def test_the_table_has_a_row_for_every_outcome() -> None:
    assert {row[0] for row in TABLE} == set(Outcome)


counts = st.integers(0, 1 << 40)
usages = st.none() | st.builds(Usage, counts, counts, st.booleans())


@given(st.sampled_from(Outcome), usages, counts, counts)
def test_a_flat_price_is_charged_in_full_or_not_at_all(
    outcome: Outcome, usage: Usage | None, price: int, estimate: int
) -> None:
    charge = settle(outcome, usage, price, estimate)

    reached = outcome not in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED)
    assert charge.ucredits == (price if reached else 0)
    assert charge.keep_requests == (outcome is not Outcome.NEVER_REACHED)
    assert reached or charge.usage == NOTHING


UNITS = ("tokens", "input_tokens", "output_tokens")


@given(
    st.sampled_from([o for o in Outcome if o not in (Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED)]), usages, counts
)
def test_tokens_are_never_below_what_was_delivered(outcome: Outcome, usage: Usage | None, estimate: int) -> None:
    charge = settle(outcome, usage, 1, estimate)

    for unit in UNITS:
        booked = actual_of(demand("tpm", "sliding", unit, "org", "", 1 << 50, 60_000, estimate), charge)
        if usage is None:
            assert booked == estimate
        else:
            assert booked >= (usage.total_tokens if unit == "tokens" else getattr(usage, unit))


@given(usages.filter(bool), counts)
def test_a_lower_bound_of_a_whole_answer_never_lowers_the_estimate(usage: Usage, estimate: int) -> None:
    charge = settle(Outcome.COMPLETE, usage, 1, estimate)

    for unit in UNITS:
        booked = actual_of(demand("tpm", "sliding", unit, "org", "", 1 << 50, 60_000, estimate), charge)
        assert usage.exact or booked >= estimate


@given(st.sampled_from(Outcome), usages, counts, counts)
def test_only_a_final_count_is_called_exact(outcome: Outcome, usage: Usage | None, price: int, estimate: int) -> None:
    charge = settle(outcome, usage, price, estimate)

    if charge.basis == "exact" and not (outcome is Outcome.COMPLETE and usage is None and estimate == 0):
        assert usage is not None and usage.exact and charge.usage == usage


def test_a_flat_price_without_booked_tokens_needs_no_usage_to_be_exact() -> None:
    assert settle(Outcome.COMPLETE, None, PRICE, token_estimate=0) == charged(None, "exact")

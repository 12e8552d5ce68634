"""Warnings of limits that are nearly used up, and what is left of our fields beside an upstream's own."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.ratelimit import LIMITS_MAX, beside, fields, warning
from gateway.types import Limit, LimitState
from tests.dialects.judged import EXACT_MAX, NOW_S, RPM, admitted
from tests.dialects.structured import parse_list


def test_a_warning_names_each_limit_that_has_come_so_far() -> None:
    limits = [Limit(name, "sliding", "requests", "org", 100, 60_000, warn_at=0.8) for name in ("rpm", "2nd", "third")]
    states = (admitted(limits[0], used=82), admitted(limits[1], used=99), admitted(limits[2], used=78), admitted(RPM))

    assert warning(states) == [(b"x-ratelimit-warning", b'rpm;used=0.83, "2nd";used=1.00')]


def test_a_warning_names_no_more_limits_than_the_other_fields() -> None:
    many = [Limit(f"n{number}", "sliding", "requests", "org", 1, 60_000, warn_at=0.5) for number in range(40)]

    assert len(parse_list(warning(tuple(admitted(limit) for limit in many))[0][1])) == LIMITS_MAX


def test_a_warned_share_is_rounded_down_and_bounded() -> None:
    limit = Limit("rpm", "sliding", "requests", "org", 3, 60_000, warn_at=0.5)

    assert warning((admitted(limit, used=1),)) == [(b"x-ratelimit-warning", b"rpm;used=0.66")]
    assert warning((admitted(limit, used=EXACT_MAX),)) == [(b"x-ratelimit-warning", b"rpm;used=999.99")]


@given(st.integers(1, 100), st.integers(1, EXACT_MAX))
@example(7, 100)
@example(29, 100)
def test_a_warning_begins_exactly_where_the_policy_says(percent: int, capacity: int) -> None:
    limit = Limit("x", "sliding", "requests", "org", capacity, 60_000, warn_at=percent / 100)
    begins = -(-capacity * percent // 100)

    assert warning((LimitState(limit, 0, begins, 0, 0, 0),))
    assert not warning((LimitState(limit, 0, begins - 1, 1, 0, 0),))


OURS = (
    *fields((admitted(RPM),), "openai", NOW_S),
    (b"anthropic-ratelimit-requests-limit", b"1"),
    (b"x-ratelimit-warning", b"rpm;used=0.90"),
)


@pytest.mark.parametrize(
    ("theirs", "kept"),
    [
        (b"Content-Type", {b"ratelimit", b"x-ratelimit", b"anthropic", b"warning"}),
        (b"X-RateLimit-Remaining", {b"ratelimit", b"anthropic", b"warning"}),
        (b"x-ratelimit-limit-tokens", {b"ratelimit", b"anthropic", b"warning"}),
        (b"Anthropic-Ratelimit-Tokens-Reset", {b"ratelimit", b"x-ratelimit", b"warning"}),
        (b"RateLimit", {b"x-ratelimit", b"anthropic", b"warning"}),
        (b"RateLimit-Policy", {b"x-ratelimit", b"anthropic", b"warning"}),
        (b"RateLimit-Remaining", {b"x-ratelimit", b"anthropic", b"warning"}),
        (b"X-Ratelimit-Warning", {b"ratelimit", b"x-ratelimit", b"anthropic"}),
    ],
)
def test_an_upstream_that_speaks_of_its_own_limits_is_not_talked_over(theirs: bytes, kept: set[bytes]) -> None:
    def family(name: bytes) -> bytes:
        if name == b"x-ratelimit-warning":
            return b"warning"
        return name.split(b"-")[0] if not name.startswith(b"x-") else b"x-ratelimit"

    left = beside(OURS, [(b"Date", b"now"), (theirs, b"1")])

    assert {family(name) for name, _ in left} == kept
    assert left == [field for field in OURS if family(field[0]) in kept]

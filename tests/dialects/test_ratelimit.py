"""The limit fields say what was judged, in order, within bounds, and as the standards spell it."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import DIALECTS
from gateway.dialects.ratelimit import LIMITS_MAX, duration, fields, instant, warning
from gateway.types import Calendar, Limit, LimitState, Refusal
from tests.dialects.cases import REQUEST_ID
from tests.dialects.judged import (
    AT_ONCE,
    CREDITS,
    EXACT_MAX,
    NOW_S,
    RPM,
    TPM,
    TRIED_OUT,
    USER_RPM,
    admitted,
    judged,
    said,
)
from tests.dialects.structured import parse_list

ITPM = Limit("itpm", "sliding", "input_tokens", "org", 50_000, 60_000)


def policy_of(limit: Limit) -> bytes:
    return said((admitted(limit),))[b"ratelimit-policy"]


def test_nothing_is_said_where_there_is_no_limit() -> None:
    assert fields((), "openai", NOW_S) == [] == warning(())


def test_one_limit_reads_as_the_draft_has_it() -> None:
    limit = Limit("rpm", "sliding", "requests", "org", 600, 60_000)

    assert fields((admitted(limit),), "problem", NOW_S) == [
        (b"ratelimit-policy", b'"rpm";q=600;w=60'),
        (b"ratelimit", b'"rpm";r=599;t=60'),
    ]


@pytest.mark.parametrize(
    ("limit", "policy"),
    [
        (USER_RPM, b'"user-rpm";q=20;w=2'),
        (Limit("slow", "gcra", "requests", "org", 3, 60_000, burst=1), b'"slow";q=1;w=20'),
        (Limit("odd", "gcra", "tokens", "org", 7, 1_000, burst=50), b'"odd";q=50;qu="tokens";w=8'),
        (Limit("never", "gcra", "requests", "org", 0, 60_000, burst=2), b'"never";q=2;w=120'),
        (
            Limit("ages", "gcra", "requests", "org", 1, 1 << 52, burst=1 << 52),
            b'"ages";q=999999999999999;w=999999999999999',
        ),
        (Limit("fast", "sliding", "requests", "org", 5, 100), b'"fast";q=5;w=1'),
        (Limit("odd", "sliding", "requests", "org", 5, 1_500), b'"odd";q=5;w=2'),
        (TPM, b'"tpm";q=100000;qu="tokens";w=60'),
        (ITPM, b'"itpm";q=50000;qu="input-tokens";w=60'),
        (Limit("o", "sliding", "output_tokens", "org", 9, 60_000), b'"o";q=9;qu="output-tokens";w=60'),
        (Limit("talks", "sliding", "sessions", "org", 9, 60_000), b'"talks";q=9;qu="sessions";w=60'),
        (AT_ONCE, b'"at-once";q=20;qu="concurrent-requests"'),
        (CREDITS, b'"credits";q=500;qu="credits";w=86400'),
    ],
)
def test_a_policy_says_how_much_of_what_in_how_long(limit: Limit, policy: bytes) -> None:
    assert policy_of(limit) == policy


@pytest.mark.parametrize(
    ("period", "seconds"), [("hour", 3600), ("day", 86_400), ("week", 604_800), ("month", 2_678_400)]
)
def test_a_calendar_says_the_length_of_its_period_and_when_it_ends(period: str, seconds: int) -> None:
    limit = Limit("quota", "calendar", "requests", "org", 9, 10**10, calendar=Calendar(period))

    found = said((admitted(limit, reset_ms=3_000_001),))
    assert found == {b"ratelimit-policy": b'"quota";q=9;w=%d' % seconds, b"ratelimit": b'"quota";r=8;t=3001'}


def test_what_runs_at_the_same_time_has_no_time() -> None:
    assert said((admitted(AT_ONCE, used=3, reset_ms=None),))[b"ratelimit"] == b'"at-once";r=16'


def test_credits_are_shown_whole_and_never_more_than_there_are() -> None:
    state = LimitState(CREDITS, 1, 0, 1_999_999, 0, 1_000)

    assert said((state,))[b"ratelimit"] == b'"credits";r=1;t=1'


def test_the_limit_with_the_least_left_comes_first() -> None:
    states = (admitted(RPM, used=5), admitted(TPM, used=98_000), admitted(AT_ONCE, used=10, reset_ms=None))

    found = said(states)
    assert [name for name, _ in parse_list(found[b"ratelimit"])] == ["tpm", "at-once", "rpm"]


def test_on_a_refusal_those_that_refused_come_first_the_longest_wait_before_all() -> None:
    # `empty` has nothing left, yet it is not what refused.
    empty = LimitState(Limit("empty", "sliding", "requests", "org", 5, 60_000), 1, 4, 0, 0, 60_000)
    weighted = LimitState(TPM, 30_000, 80_000, 20_000, 9_000, 60_000)
    quick = LimitState(USER_RPM, 1, 20, 0, 100, 2_000)

    found = said((empty, quick, weighted))
    assert found[b"ratelimit"] == b'"tpm";r=20000;t=9, "user-rpm";r=0;t=1, "empty";r=0;t=60'


def test_the_policy_reads_the_same_whatever_is_left() -> None:
    states = (admitted(RPM, used=50), admitted(TPM), admitted(AT_ONCE, used=1))

    assert {
        said(order)[b"ratelimit-policy"] for order in (states, states[::-1], judged(9)[:3][::-1], judged(7)[:3])
    } == {
        b'"at-once";q=20;qu="concurrent-requests", "rpm";q=60;w=60, "tpm";q=100000;qu="tokens";w=60',
        b'"rpm";q=60;w=60, "tpm";q=100000;qu="tokens";w=60, "user-rpm";q=20;w=2',
    }


def test_a_limit_that_is_only_tried_out_is_nobody_s_business() -> None:
    shadow = LimitState(TRIED_OUT, 1, 5, 0, 59_000, 59_000)

    for family in DIALECTS:
        assert fields((shadow,), family, NOW_S) == []
        assert b"tried-out" not in b"".join(value for _, value in fields(judged(9), family, NOW_S))
    assert (
        warning((LimitState(Limit("w", "sliding", "requests", "o", 1, 9, shadow=True, warn_at=0.1), 1, 1, 0, 0, 9),))
        == []
    )


def test_no_more_limits_are_named_than_the_most_restrictive_ones() -> None:
    states = tuple(
        admitted(Limit(f"l{number:02}", "sliding", "requests", "org", 100, 60_000), used=number) for number in range(40)
    )

    found = said(states)
    names = [name for name, _ in parse_list(found[b"ratelimit"])]
    assert names == [f"l{number:02}" for number in range(39, 39 - LIMITS_MAX, -1)]
    assert [name for name, _ in parse_list(found[b"ratelimit-policy"])] == sorted(names)


def test_openai_gets_the_most_restrictive_limit_of_each_unit() -> None:
    wide = Limit("rpd", "sliding", "requests", "org", 10_000, 86_400_000)
    states = (admitted(wide, used=10), admitted(RPM, used=40, reset_ms=20), admitted(TPM, used=99, reset_ms=360_000))

    assert fields(states, "openai", NOW_S)[2:] == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"19"),
        (b"x-ratelimit-reset-requests", b"20ms"),
        (b"x-ratelimit-limit-tokens", b"100000"),
        (b"x-ratelimit-remaining-tokens", b"99900"),
        (b"x-ratelimit-reset-tokens", b"6m0s"),
    ]


def test_openai_gets_no_fields_for_units_that_nothing_limits() -> None:
    assert set(said((admitted(AT_ONCE, reset_ms=None), admitted(ITPM)), "openai")) == {
        b"ratelimit-policy",
        b"ratelimit",
    }


def test_anthropic_gets_each_kind_of_token_and_instants() -> None:
    output = Limit("otpm", "sliding", "output_tokens", "org", 8_000, 60_000)
    states = (
        admitted(RPM, reset_ms=59_750),
        admitted(TPM, cost=1_400, reset_ms=1),
        admitted(ITPM, cost=600),
        admitted(output, cost=1),
    )

    assert fields(states, "anthropic", NOW_S)[2:] == [
        (b"anthropic-ratelimit-requests-limit", b"60"),
        (b"anthropic-ratelimit-requests-remaining", b"59"),
        (b"anthropic-ratelimit-requests-reset", b"2025-11-24T16:01:00Z"),
        (b"anthropic-ratelimit-tokens-limit", b"100000"),
        (b"anthropic-ratelimit-tokens-remaining", b"99000"),
        (b"anthropic-ratelimit-tokens-reset", b"2025-11-24T16:00:01Z"),
        (b"anthropic-ratelimit-input-tokens-limit", b"50000"),
        (b"anthropic-ratelimit-input-tokens-remaining", b"49000"),
        (b"anthropic-ratelimit-input-tokens-reset", b"2025-11-24T16:01:01Z"),
        (b"anthropic-ratelimit-output-tokens-limit", b"8000"),
        (b"anthropic-ratelimit-output-tokens-remaining", b"7999"),
        (b"anthropic-ratelimit-output-tokens-reset", b"2025-11-24T16:01:01Z"),
    ]


def test_requests_are_never_rounded() -> None:
    found = said((admitted(Limit("rpd", "sliding", "requests", "org", 20_000, 60_000), used=1_200),), "anthropic")

    assert found[b"anthropic-ratelimit-requests-remaining"] == b"18799"


def test_rounding_never_makes_more_of_a_limit_than_it_is_nor_denies_its_refusal() -> None:
    limit = Limit("tpm", "sliding", "tokens", "org", 10_700, 60_000)

    def remaining(state: LimitState) -> bytes:
        return said((state,), "anthropic")[b"anthropic-ratelimit-tokens-remaining"]

    assert remaining(admitted(limit)) == b"10700"
    assert remaining(LimitState(limit, 1_800, 9_000, 1_700, 5_000, 60_000)) == b"1700"


@pytest.mark.parametrize(
    ("milliseconds", "written"),
    [
        (0, b"0s"),
        (1, b"1ms"),
        (20, b"20ms"),
        (999, b"999ms"),
        (1_000, b"1s"),
        (1_500, b"1.5s"),
        (8_640, b"8.64s"),
        (59_999, b"59.999s"),
        (60_000, b"1m0s"),
        (60_020, b"1m0.02s"),
        (360_000, b"6m0s"),
        (86_400, b"1m26.4s"),
        (3_600_000, b"1h0m0s"),
        (3_723_004, b"1h2m3.004s"),
        (2_678_400_000, b"744h0m0s"),
    ],
)
def test_a_duration_reads_as_openai_writes_it(milliseconds: int, written: bytes) -> None:
    assert duration(milliseconds) == written


@given(st.integers(0, EXACT_MAX))
def test_a_duration_reads_back_to_the_millisecond(milliseconds: int) -> None:
    found = re.fullmatch(rb"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?|(\d+)ms", duration(milliseconds))
    assert found is not None
    hours, minutes, seconds, alone = (Decimal((part or b"0").decode()) for part in found.groups())
    assert (hours * 3600 + minutes * 60 + seconds) * 1000 + alone == milliseconds
    assert minutes < 60 and seconds < 60


def test_an_instant_is_never_early_and_always_has_four_digits_of_a_year() -> None:
    assert instant(1_764_000_000.0) == b"2025-11-24T16:00:00Z"
    assert instant(1_764_000_000.001) == b"2025-11-24T16:00:01Z"
    assert instant(1e15) == b"9999-12-31T23:59:59Z"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_refusal_without_limits_has_no_limit_fields(dialect: str) -> None:
    rendered = DIALECTS[dialect].render(Refusal(429, "c", "m", 1), REQUEST_ID)

    assert not any(b"ratelimit" in name for name, _ in rendered.headers)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_retry_after_comes_no_earlier_than_what_refused_has_more(dialect: str) -> None:
    """The draft's section 6; both speak of the same instant."""
    headers = dict(DIALECTS[dialect].render(Refusal(429, "c", "m", 1_001, limits=judged(1_001)), REQUEST_ID).headers)

    waits = {name: parameters["t"] for name, parameters in parse_list(headers[b"ratelimit"])[:2]}
    assert waits == {"rpm": 2, "user-rpm": 1} and headers[b"retry-after"] == b"2"

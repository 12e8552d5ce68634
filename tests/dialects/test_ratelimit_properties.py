"""Whatever was judged, the limit fields are well-formed, bounded, in order, and never negative."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import DIALECTS
from gateway.dialects.ratelimit import INTEGER_MAX, LIMITS_MAX, fields, warning
from gateway.types import Calendar, Limit, LimitState
from tests.dialects.judged import EXACT_MAX, said
from tests.dialects.structured import Token, parse_list

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True) | st.text(max_size=8)
amounts = st.integers(0, EXACT_MAX)
limits = st.builds(
    Limit,
    name=names,
    kind=st.just("sliding"),
    unit=st.sampled_from(
        ("requests", "tokens", "input_tokens", "output_tokens", "ucredits", "concurrent", "sessions", "new-unit")
    ),
    scope=st.just("org"),
    limit=amounts,
    window_ms=amounts,
    burst=st.just(0) | amounts,
    calendar=st.none() | st.builds(Calendar, st.sampled_from(("hour", "day", "week", "month"))),
    shadow=st.booleans(),
    warn_at=st.none() | st.floats(0.001, 1),
)
in_flight = st.builds(
    Limit,
    name=names,
    kind=st.just("concurrent"),
    unit=st.just("concurrent"),
    scope=st.just("org"),
    limit=amounts,
    window_ms=amounts,
)
states_of_any_kind = st.lists(
    st.builds(LimitState, limits | in_flight, amounts, amounts, amounts, st.just(0) | amounts, st.none() | amounts),
    max_size=20,
    unique_by=lambda state: state.limit.name,
).map(tuple)


@given(states_of_any_kind)
def test_whatever_was_judged_both_lists_parse_and_name_the_same_limits(states: tuple[LimitState, ...]) -> None:
    shown = [state for state in states if not state.limit.shadow]
    found = said(states)
    if not shown:
        assert found == {}
        return
    policies, left = (parse_list(found[name]) for name in (b"ratelimit-policy", b"ratelimit"))

    assert len(policies) == len(left) == min(len(shown), LIMITS_MAX)
    assert sorted(name for name, _ in policies) == sorted(name for name, _ in left)
    for name, parameters in (*policies, *left):
        assert not isinstance(name, Token)
        assert all(isinstance(value, str) or 0 <= value <= INTEGER_MAX for value in parameters.values())
        assert parameters.get("w") != 0
    assert all(set(parameters) in ({"q"}, {"q", "w"}, {"q", "qu"}, {"q", "qu", "w"}) for _, parameters in policies)
    assert all(set(parameters) in ({"r"}, {"r", "t"}) for _, parameters in left)


@given(states_of_any_kind)
def test_whatever_was_judged_no_limit_is_followed_by_a_more_restrictive_one(states: tuple[LimitState, ...]) -> None:
    by_name = {f"n{number}": state for number, state in enumerate(states)}
    renamed = tuple(
        LimitState(
            replace(state.limit, name=name), state.cost, state.used, state.remaining, state.retry_ms, state.reset_ms
        )
        for name, state in by_name.items()
    )

    order = [by_name[str(name)] for name, _ in parse_list(said(renamed).get(b"ratelimit", b""))]
    # Shares closer than a double can tell count as the same.
    ranks = [(-state.retry_ms, float(Fraction(state.remaining, max(state.limit.capacity, 1)))) for state in order]
    assert ranks == sorted(ranks)


@given(states_of_any_kind, st.sampled_from(sorted(DIALECTS)), st.floats(0, 4e9))
def test_whatever_was_judged_the_fields_are_ascii_and_never_negative(
    states: tuple[LimitState, ...], family: str, now_s: float
) -> None:
    found = fields(states, family, now_s) + warning(states)

    for name, value in found:
        assert re.fullmatch(rb"[a-z-]+", name) and re.fullmatch(rb"[ -~]+", value)
        assert not re.search(rb"(^|=)-", value)
    assert len({name for name, _ in found}) == len(found)
    prefixes = {"openai": b"x-ratelimit-", "anthropic": b"anthropic-ratelimit-", "problem": b"x-ratelimit-warning"}
    assert all(name.startswith((b"ratelimit", prefixes[family], b"x-ratelimit-warning")) for name, _ in found)
    for name, value in found:
        if name.startswith(b"anthropic-") and name.endswith(b"-reset"):
            at = datetime.strptime(value.decode(), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
            assert at.timestamp() >= int(now_s)


@given(states_of_any_kind)
def test_whatever_was_judged_a_warning_parses(states: tuple[LimitState, ...]) -> None:
    for _, value in warning(states):
        for name, parameters in parse_list(value):
            assert isinstance(name, str) and set(parameters) == {"used"}
            assert isinstance(parameters["used"], Decimal)

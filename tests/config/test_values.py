"""Durations, sizes and the other forms of a value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import format_duration, format_size, parse_duration, parse_size
from gateway.config.addresses import split_url
from gateway.config.values import DURATION_UNITS_MS, SIZE_UNITS_BYTES


@given(st.integers(0, 10**12))
def test_a_duration_survives_being_written_and_read(duration_ms: int) -> None:
    assert parse_duration(format_duration(duration_ms)) == duration_ms


@given(st.integers(0, 10**12))
def test_a_size_survives_being_written_and_read(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(0, 10**9), st.sampled_from(sorted(DURATION_UNITS_MS)))
def test_every_duration_unit_multiplies(number: int, unit: str) -> None:
    assert parse_duration(f"{number}{unit}") == number * DURATION_UNITS_MS[unit]


@given(st.integers(0, 10**9), st.sampled_from(sorted(SIZE_UNITS_BYTES)))
def test_every_size_unit_multiplies(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * SIZE_UNITS_BYTES[unit]


@given(st.text(max_size=12))
def test_any_other_text_is_refused_with_the_forms_or_a_guess(text: str) -> None:
    for parse in (parse_duration, parse_size):
        try:
            parse(text)
        except ValueError as exc:
            assert "write" in str(exc) or "did you mean" in str(exc)


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [("250ms", 250), ("2s", 2_000), ("1m", 60_000), ("24h", 86_400_000), ("30d", 2_592_000_000), ("0s", 0)],
)
def test_durations_mean_what_they_say(text: str, duration_ms: int) -> None:
    assert parse_duration(text) == duration_ms


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1B", 1), ("64KiB", 65_536), ("2MiB", 2_097_152), ("10MB", 10_000_000), ("1GiB", 1 << 30), ("3KB", 3_000)],
)
def test_sizes_mean_what_they_say(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("5 min", "5m"), ("5M", "5m"), ("2 hours", "2h"), ("10secs", "10s"), ("7days", "7d"), ("3 s", "3s")],
)
def test_a_duration_in_other_words_is_guessed(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        parse_duration(wrong)


@pytest.mark.parametrize(("wrong", "meant"), [("2M", "2MiB"), ("2mib", "2MiB"), ("10mb", "10MB"), ("5 bytes", "5B")])
def test_a_size_in_other_words_is_guessed(wrong: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        parse_size(wrong)


@pytest.mark.parametrize("text", ["٣s", "1_000ms", "+5s", "5s\n", " 5s", "9" * 16 + "s", ""])
def test_digits_are_ascii_and_bounded(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://host:port", "http://a b", "host:80", "http://h:70000"]
)
def test_what_is_no_url_with_a_host_has_no_parts(url: str) -> None:
    assert split_url(url) is None

"""When periods begin: in every zone, over every change of its clocks."""

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.limits import calendar
from gateway.limits.calendar import Periods, periods
from gateway.types import Calendar
from tests.limits.history import DAY_MS, HOUR_MS, ZONES, rules
from tests.limits.oracle import period_begin_ms, period_end_ms
from tests.limits.test_histories import HERE

#: Clocks that are set by half an hour, over midnight, four times a year; and three quarters of an hour off all year.
ODD_ZONES = ("Australia/Lord_Howe", "America/Santiago", "Africa/Casablanca", "Pacific/Chatham")
FROM_MS = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * 1000
moments = st.integers(FROM_MS, FROM_MS + 6 * 365 * DAY_MS)


def worked_out(rule: Calendar, at_ms: int) -> Periods:
    """Not remembered from the last time somebody asked."""
    calendar._known.clear()
    return periods(rule, at_ms)


def test_periods_begin_when_the_wall_says_so(full: bool) -> None:
    @settings(HERE, max_examples=3000 if full else 200)
    @given(rules(), moments)
    def every(rule: Calendar, at_ms: int) -> None:
        before, start, end, after = worked_out(rule, at_ms)
        assert periods(rule, end - 1) == (before, start, end, after)
        assert (start, end) == (period_begin_ms(rule, at_ms), period_end_ms(rule, at_ms))
        assert (before, after) == (period_begin_ms(rule, start - 1), period_end_ms(rule, end))

    every()


@pytest.mark.parametrize("zone", [*ZONES, *ODD_ZONES])
@pytest.mark.parametrize(
    ("period", "anchor_minutes"),
    [("hour", 0), ("hour", 15), ("day", 0), ("day", 150), ("week", 0), ("week", 4 * 1440 + 150), ("month", 0)],
)
def test_periods_follow_each_other_without_gap_or_overlap_over_two_years(
    zone: str, period: str, anchor_minutes: int
) -> None:
    rule = Calendar(period, zone, anchor_minutes)
    found = [periods(rule, FROM_MS)]
    step_ms = {"hour": 400 * HOUR_MS, "day": DAY_MS, "week": 7 * DAY_MS, "month": 28 * DAY_MS}[period]
    while found[-1][1] < FROM_MS + 2 * 365 * DAY_MS:
        start, end = found[-1][1:3]
        # Asked anywhere in a period, the answer is the same.
        assert {worked_out(rule, at_ms) for at_ms in (start, start + 2_400_000, (start + end) // 2, end - 1)} == {
            found[-1]
        }
        found.append(periods(rule, end if period != "hour" else end + step_ms))
    for earlier, later in pairwise(found):
        if period != "hour":
            assert earlier[1:] == later[:3]
        assert later[0] < later[1] < later[2] < later[3]


@pytest.mark.parametrize("on", ["2026-04-04", "2026-10-03"])
def test_where_clocks_are_set_by_half_an_hour_one_hour_is_shorter_and_none_begins_twice(on: str) -> None:
    rule = Calendar("hour", "Australia/Lord_Howe")
    midnight = int(datetime.fromisoformat(on + "T00:00+00:00").timestamp() * 1000)
    starts = [worked_out(rule, at_ms)[1] for at_ms in range(midnight, midnight + 2 * DAY_MS, 60_000)]
    assert starts == sorted(starts)
    lengths = sorted(starts.count(start) for start in set(starts))
    assert lengths[:2] == [30, 30] and set(lengths[2:]) == {60}  # one of them is cut off by the end of the test


@pytest.mark.parametrize(
    ("zone", "on", "hours"),
    [
        ("Europe/Berlin", "2026-03-29", 23),
        ("Europe/Berlin", "2026-10-25", 25),
        ("Europe/Berlin", "2026-06-01", 24),
        ("Australia/Lord_Howe", "2026-04-05", 24.5),
        ("Australia/Lord_Howe", "2026-10-04", 23.5),
        ("America/Santiago", "2026-09-06", 23),  # midnight itself is left out
    ],
)
def test_a_day_is_as_long_as_it_is(zone: str, on: str, hours: float) -> None:
    noon = datetime.fromisoformat(on + "T12:00").replace(tzinfo=ZoneInfo(zone))
    _, start, end, _ = periods(Calendar("day", zone), int(noon.timestamp() * 1000))
    local = datetime.fromtimestamp(start / 1000, UTC).astimezone(ZoneInfo(zone))
    assert local.date().isoformat() == on
    assert (end - start) / HOUR_MS == hours


@pytest.mark.parametrize(("month", "days"), [(1, 31), (2, 29), (3, 31), (4, 30), (12, 31)])
def test_a_month_is_as_long_as_it_is(month: int, days: int) -> None:
    at_ms = int(datetime(2024, month, 20, tzinfo=UTC).timestamp() * 1000)
    _, start, end, _ = periods(Calendar("month"), at_ms)
    assert (end - start) == days * DAY_MS
    assert datetime.fromtimestamp(start / 1000, UTC) == datetime(2024, month, 1, tzinfo=UTC)


def test_a_month_that_begins_on_the_28th_does_so_in_february_too() -> None:
    rule = Calendar("month", "UTC", 27 * 1440)
    _, start, end, after = periods(rule, int(datetime(2025, 2, 1, tzinfo=UTC).timestamp() * 1000))
    dates = [datetime.fromtimestamp(at_ms / 1000, UTC).date().isoformat() for at_ms in (start, end, after)]
    assert dates == ["2025-01-28", "2025-02-28", "2025-03-28"]

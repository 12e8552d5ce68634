"""Limits as a server may have judged them, and what is then said of them."""

from gateway.dialects.ratelimit import fields
from gateway.types import Calendar, Limit, LimitState

#: When every refusal of the golden files was given, and all else was judged: 2025-11-24T16:00:00.25Z.
NOW_S = 1_764_000_000.25
#: The largest amount that Redis scripts count exactly, and one.
EXACT_MAX = 1 << 53

RPM = Limit("rpm", "sliding", "requests", "org", 60, 60_000)
USER_RPM = Limit("user-rpm", "gcra", "requests", "user", 600, 60_000, burst=20)
TPM = Limit("tpm", "sliding", "tokens", "org", 100_000, 60_000, warn_at=0.8)
CREDITS = Limit("credits", "calendar", "ucredits", "org", 500_000_000, 90_000_000, calendar=Calendar("day"))
AT_ONCE = Limit("at-once", "concurrent", "concurrent", "org", 20, 30_000)
TRIED_OUT = Limit("tried-out", "sliding", "requests", "org", 1, 60_000, shadow=True)


def judged(longest_ms: int) -> tuple[LimitState, ...]:
    """Two limits refuse, the one for `longest_ms`; three do not, and one does so in shadow."""
    return (
        LimitState(RPM, 1, 60, 0, longest_ms, 59_000),
        LimitState(USER_RPM, 1, 20, 0, 100, 2_000),
        LimitState(TPM, 1_800, 98_400, 1_600, 0, 58_999),
        LimitState(CREDITS, 1_000_000, 124_600_001, 374_399_999, 0, 43_200_000),
        LimitState(AT_ONCE, 1, 3, 17, 0, None),
        LimitState(TRIED_OUT, 1, 1, 0, 59_000, 59_000),
    )


def admitted(limit: Limit, used: int = 0, cost: int = 1, reset_ms: int | None = 60_000) -> LimitState:
    return LimitState(limit, cost, used, max(limit.capacity - used - cost, 0), 0, reset_ms)


def said(states: tuple[LimitState, ...], family: str = "problem") -> dict[bytes, bytes]:
    found = fields(states, family, NOW_S)
    assert len(dict(found)) == len(found), "a field stands twice"
    return dict(found)

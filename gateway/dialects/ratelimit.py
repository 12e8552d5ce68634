"""Limits as header fields: what a client is told about them beside its answer, whether it was admitted or refused.

Every client gets `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers-11, lists of RFC 9651): one
item per limit, so the names in both say what belongs together. The clients of a dialect also get the fields that its
SDKs know, which have room for one limit per unit: the most restrictive one. That is on a refusal the one that has to be
waited for longest, else the one of which the smallest share is left.

`RateLimit-Policy` is in order of names, because the draft (§3) wants it to stay the same from answer to answer;
`RateLimit` begins with the most restrictive limit. Limits in shadow mode are nobody's business. Values are what the
server judged: nothing is rounded up but times, and tokens where Anthropic documents it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil
from time import gmtime, strftime
from types import MappingProxyType

from gateway.types import UCREDITS_PER_CREDIT, Limit, LimitState

Field = tuple[bytes, bytes]

#: No answer names more limits than this; those that are left out are the least restrictive ones.
LIMITS_MAX = 16
#: RFC 9651 §3.3.1: an Integer has at most 15 digits.
INTEGER_MAX = 999_999_999_999_999
WARNING_FIELD = b"x-ratelimit-warning"

#: `qu`, where what is counted is not the draft's default, requests. It registers only the one for concurrency, but
#: tokens that go by without a unit would be taken for requests.
_QUOTA_UNITS: Mapping[str, bytes] = MappingProxyType(
    {
        "concurrent": b"concurrent-requests",
        "tokens": b"tokens",
        "input_tokens": b"input-tokens",
        "output_tokens": b"output-tokens",
        "ucredits": b"credits",
        "sessions": b"sessions",
    }
)
#: The names of limit, rest and reset by family and unit, in the order they are sent in.
_SPELLINGS: Mapping[str, Mapping[str, tuple[bytes, bytes, bytes]]] = MappingProxyType(
    {
        "openai": {
            "requests": (
                b"x-ratelimit-limit-requests",
                b"x-ratelimit-remaining-requests",
                b"x-ratelimit-reset-requests",
            ),
            "tokens": (b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-tokens"),
        },
        "anthropic": {
            "requests": (
                b"anthropic-ratelimit-requests-limit",
                b"anthropic-ratelimit-requests-remaining",
                b"anthropic-ratelimit-requests-reset",
            ),
            "tokens": (
                b"anthropic-ratelimit-tokens-limit",
                b"anthropic-ratelimit-tokens-remaining",
                b"anthropic-ratelimit-tokens-reset",
            ),
            "input_tokens": (
                b"anthropic-ratelimit-input-tokens-limit",
                b"anthropic-ratelimit-input-tokens-remaining",
                b"anthropic-ratelimit-input-tokens-reset",
            ),
            "output_tokens": (
                b"anthropic-ratelimit-output-tokens-limit",
                b"anthropic-ratelimit-output-tokens-remaining",
                b"anthropic-ratelimit-output-tokens-reset",
            ),
        },
    }
)
#: What names of one family begin with. An upstream that speaks one of them is not talked over.
_FAMILIES = (b"ratelimit", b"x-ratelimit-", b"anthropic-ratelimit-")
_PERIODS_S = {"hour": 3_600, "day": 86_400, "week": 604_800, "month": 31 * 86_400}
#: Anthropic documents that it rounds tokens to thousands. Of smaller limits that would hide more than 5 %.
_ROUNDED_FROM = 10_000
_TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
#: The last second of a four-digit year, as RFC 3339 has them.
_LAST_SECOND = 253_402_300_799


@dataclass(frozen=True, slots=True)
class _Face:
    """What of a limit never changes, ready to be sent."""

    name: bytes
    #: Its item of RateLimit-Policy.
    policy: bytes
    unit: str
    #: The most that one request can ever be given, in the limit's own unit; never 0.
    capacity: int
    #: The same as clients see it, and how much of the limit's own unit is one of theirs.
    quota: int
    scale: int


def fields(states: Sequence[LimitState], family: str, now_s: float) -> list[Field]:
    """RateLimit-Policy, RateLimit, and the fields of `family`; none where there is no limit to speak of.

    states: as judged, in any order. family: the dialect of the route. now_s: Unix time, for those who send instants.
    """
    policy, faces = _policy(tuple([state.limit for state in states]))
    named = [(state, face) for state, face in zip(states, faces, strict=True) if face is not None]
    if not named:
        return []
    if len(named) > 1:
        named.sort(key=_restriction)
        if len(named) > LIMITS_MAX:
            del named[LIMITS_MAX:]
            policy = _joined([face for _, face in named])
    said = [(b"ratelimit-policy", policy), (b"ratelimit", b", ".join([_item(state, face) for state, face in named]))]
    spellings = _SPELLINGS.get(family)
    if spellings is None:
        return said
    first = {face.unit: (state, face) for state, face in reversed(named)}
    for unit, (limit_name, remaining_name, reset_name) in spellings.items():
        if unit not in first:
            continue
        state, face = first[unit]
        remaining, reset_ms = state.remaining // face.scale, state.reset_ms
        if family == "anthropic" and unit != "requests":
            remaining = _in_thousands(state, face, remaining)
        said += ((limit_name, b"%d" % face.quota), (remaining_name, b"%d" % remaining))
        if reset_ms is not None:
            said.append((reset_name, duration(reset_ms) if family == "openai" else instant(now_s + reset_ms / 1000)))
    return said


def warning(states: Sequence[LimitState]) -> list[Field]:
    """One field with every limit of which this request has used the part from which on it warns, and how much is used.

    `rpm;used=0.83, "2nd";used=1.00`: an RFC 9651 list; the share is rounded down. Nothing where none has come so far.
    """
    said: list[bytes] = []
    for state in states:
        limit = state.limit
        if limit.warn_at is None or limit.shadow or len(said) == LIMITS_MAX:
            continue
        taken, capacity = state.used + state.cost, max(limit.capacity, 1)
        if taken >= _warns_from(limit.warn_at, capacity):
            # A Decimal has twelve digits before its point; nobody needs more than three of them.
            whole, hundredths = divmod(min(taken * 100 // capacity, 999_99), 100)
            said.append(b"%b;used=%d.%02d" % (_bare(limit.name), whole, hundredths))
    return [(WARNING_FIELD, b", ".join(said))] if said else []


def beside(ours: Sequence[Field], theirs: Iterable[Field]) -> list[Field]:
    """`ours` without the families that the upstream's own answer has a field of: what it says there passes alone."""
    taken = {_family(lower) for name, _ in theirs if b"ratelimit" in (lower := name.lower())}
    return [field for field in ours if _family(field[0]) not in taken] if taken else list(ours)


def duration(milliseconds: int) -> bytes:
    """A length of time as OpenAI writes it: `0s`, `20ms`, `1.5s`, `6m0s`, `1h0m0s`."""
    if 0 < milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, milliseconds = divmod(milliseconds, 60_000)
    seconds, rest = divmod(milliseconds, 1000)
    said = b"%ds" % seconds if not rest else (b"%d.%03d" % (seconds, rest)).rstrip(b"0") + b"s"
    if not minutes:
        return said
    if minutes < 60:
        return b"%dm%b" % (minutes, said)
    return b"%dh%dm%b" % (*divmod(minutes, 60), said)


def instant(at_s: float) -> bytes:
    """The first whole second that is not before `at_s`, as RFC 3339 has it, in UTC."""
    return _stamp(min(ceil(at_s), _LAST_SECOND))


@lru_cache(maxsize=256)
def _stamp(at_s: int) -> bytes:
    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(at_s)).encode()


def _restriction(named: tuple[LimitState, _Face]) -> tuple[int, float]:
    state, face = named
    return -state.retry_ms, state.remaining / face.capacity


def _item(state: LimitState, face: _Face) -> bytes:
    """An item of RateLimit. `t` is when more is there: where the limit refused, enough of it (draft §4.1.2), so that
    Retry-After never comes before it (§6); else all of it, for that is what is known."""
    remaining = min(state.remaining // face.scale, INTEGER_MAX)
    if state.reset_ms is None:
        return b"%b;r=%d" % (face.name, remaining)
    return b"%b;r=%d;t=%d" % (face.name, remaining, -(-(state.retry_ms or state.reset_ms) // 1000))


def _in_thousands(state: LimitState, face: _Face, remaining: int) -> int:
    """`remaining` to the nearest thousand, as Anthropic has it; exact where that would contradict the refusal."""
    if state.retry_ms or face.quota < _ROUNDED_FROM:
        return remaining
    return min((remaining + 500) // 1000 * 1000, face.quota)


@lru_cache(maxsize=4096)
def _policy(limits: tuple[Limit, ...]) -> tuple[bytes, tuple[_Face | None, ...]]:
    """RateLimit-Policy as long as nothing has to be left out, and each limit's face; None for those never shown."""
    faces = tuple(None if limit.shadow else _face(limit) for limit in limits)
    return _joined([face for face in faces if face is not None]), faces


def _face(limit: Limit) -> _Face:
    scale = UCREDITS_PER_CREDIT if limit.unit == "ucredits" else 1
    name, quota, seconds = _string(limit.name), limit.capacity // scale, _window_s(limit)
    policy = b"%b;q=%d" % (name, min(quota, INTEGER_MAX))
    if limit.unit in _QUOTA_UNITS:
        policy += b';qu="%b"' % _QUOTA_UNITS[limit.unit]
    if seconds is not None:
        policy += b";w=%d" % min(seconds, INTEGER_MAX)
    return _Face(name, policy, limit.unit, max(limit.capacity, 1), quota, scale)


def _joined(faces: Sequence[_Face]) -> bytes:
    return b", ".join([face.policy for face in sorted(faces, key=lambda face: face.name)])


def _window_s(limit: Limit) -> int | None:
    """In which time the quota is there once, in whole seconds and never 0 (draft §3.1.3); None where time plays no
    part. A month has 31 days, that being the least generous reading."""
    if limit.kind == "concurrent":
        return None
    if limit.calendar is not None:
        return _PERIODS_S[limit.calendar.period]
    window_ms = limit.window_ms
    if limit.burst:
        window_ms = -(-limit.burst * window_ms // max(limit.limit, 1))
    return max(-(-window_ms // 1000), 1)


@lru_cache(maxsize=1024)
def _warns_from(warn_at: float, capacity: int) -> int:
    """The least amount that is no smaller a part of `capacity` than `warn_at`, the number as people wrote it."""
    return ceil(Fraction(repr(warn_at)) * capacity)


def _family(name: bytes) -> bytes:
    """What `name` (lower case) must not be mixed with. A warning is of no family: nobody else's fields say the same."""
    return name if name == WARNING_FIELD else next((start for start in _FAMILIES if name.startswith(start)), name)


def _string(text: str) -> bytes:
    """`text` as an RFC 9651 String; what cannot stand in one becomes a question mark."""
    printable = "".join(letter if " " <= letter <= "~" else "?" for letter in text)
    return b'"%b"' % printable.replace("\\", "\\\\").replace('"', '\\"').encode("ascii")


@lru_cache(maxsize=1024)
def _bare(name: str) -> bytes:
    """A limit's name as an RFC 9651 Token, or as a String where it is none, as with a digit in front."""
    return name.encode() if _TOKEN.fullmatch(name) else _string(name)

"""Values with a unit or a form: durations, sizes, numbers, switches, names. URLs and networks are in addresses.py.

Each `*Reader` turns what YAML holds into a typed value or raises ValueError with a sentence for a person. Numbers and
switches may also be written as text, because that is what `"${NAME:-100}"` becomes. Nothing here knows a key's name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from gateway.config.problems import describe, quoted, suggest

DURATION_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
SIZE_UNITS_BYTES = {
    "B": 1,
    "KB": 1_000,
    "MB": 1_000_000,
    "GB": 1_000_000_000,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
DURATION_FORMS = "250ms, 2s, 1m, 24h or 30d"
SIZE_FORMS = "512B, 64KiB, 2MiB or 10MB"

#: People's other words for the units, to guess what was meant.
_DURATION_WORDS = {
    **dict.fromkeys(("msec", "msecs", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "m"),
    **dict.fromkeys(("hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "d"),
}
_SIZE_WORDS = {"byte": "B", "bytes": "B", "k": "KiB", "m": "MiB", "g": "GiB", "t": "TiB"}
_QUANTITY = re.compile(r"([0-9]{1,15})\s*([A-Za-z]*)", re.ASCII)
_DIGITS = re.compile(r"[-+]?[0-9]{1,18}", re.ASCII)
_RATE = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,6}))?", re.ASCII)
#: What an editor lets through in place of any scalar.
FROM_ENV_PATTERN = r"\$\{"
_RATE_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?$|" + FROM_ENV_PATTERN
EnvText: TypeAlias = Annotated[str, Field(pattern=FROM_ENV_PATTERN)]


def parse_duration(text: str) -> int:
    """Milliseconds of `250ms`, `2s`, `1m`, `24h`, `30d`. Raises ValueError."""
    return _parse_quantity(text, "a duration", DURATION_UNITS_MS, _DURATION_WORDS, DURATION_FORMS)


def parse_size(text: str) -> int:
    """Bytes of `512B`, `64KiB`, `2MiB`, `10MB`. Raises ValueError."""
    return _parse_quantity(text, "a size", SIZE_UNITS_BYTES, _SIZE_WORDS, SIZE_FORMS)


def format_duration(duration_ms: int) -> str:
    """The shortest exact form: 60000 -> `1m`, 1500 -> `1500ms`. The inverse of `parse_duration`."""
    return _format_quantity(duration_ms, DURATION_UNITS_MS, zero="0s")


def format_size(size_bytes: int) -> str:
    """The shortest exact form: 2097152 -> `2MiB`, 10000000 -> `10MB`. The inverse of `parse_size`."""
    return _format_quantity(size_bytes, SIZE_UNITS_BYTES, zero="0B")


def _parse_quantity(text: str, noun: str, units: dict[str, int], words: dict[str, str], forms: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{quoted(text)} is not {noun}: write a whole number and a unit, as {forms}")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{number} has no unit: write {noun} as {forms}")
    if f"{number}{unit}" != text or unit not in units:
        folded = {known.lower(): known for known in units}
        meant = unit if unit in units else words.get(unit.lower(), folded.get(unit.lower()))
        hint = f", did you mean '{number}{meant}'?" if meant else f": write a whole number and a unit, as {forms}"
        raise ValueError(f"{quoted(text)} is not {noun}{hint}")
    return int(number) * units[unit]


def _format_quantity(amount: int, units: dict[str, int], zero: str) -> str:
    if amount == 0:
        return zero
    unit, size = max(((u, s) for u, s in units.items() if amount % s == 0), key=lambda pair: pair[1])
    return f"{amount // size}{unit}"


@dataclass(frozen=True, slots=True)
class DurationReader:
    """Text with a unit -> milliseconds within both bounds, inclusive."""

    low_ms: int
    high_ms: int

    def __call__(self, value: object) -> int:
        if not isinstance(value, str):
            raise ValueError(_without_unit(value, "a duration", DURATION_FORMS))
        return _within(parse_duration(value), self.low_ms, self.high_ms, format_duration)


@dataclass(frozen=True, slots=True)
class SizeReader:
    """Text with a unit -> bytes within both bounds, inclusive."""

    low_bytes: int
    high_bytes: int

    def __call__(self, value: object) -> int:
        if not isinstance(value, str):
            raise ValueError(_without_unit(value, "a size", SIZE_FORMS))
        return _within(parse_size(value), self.low_bytes, self.high_bytes, format_size)


@dataclass(frozen=True, slots=True)
class WholeReader:
    """A whole number, or its decimal digits as text, within both bounds, inclusive."""

    low: int
    high: int

    def __call__(self, value: object) -> int:
        if isinstance(value, str) and _DIGITS.fullmatch(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"expected a whole number, got {describe(value)}")
        return _within(value, self.low, self.high, str)


def _without_unit(value: object, noun: str, forms: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value} has no unit: write {noun} as {forms}"
    return f"expected {noun} as {forms}, got {describe(value)}"


def _within(amount: int, low: int, high: int, show: Callable[[int], str]) -> int:
    if amount < low:
        raise ValueError(f"must be at least {show(low)}, got {show(amount)}")
    if amount > high:
        raise ValueError(f"must be at most {show(high)}, got {show(amount)}")
    return amount


def duration(low: str, high: str) -> BeforeValidator:
    """Marks an int of milliseconds that YAML writes with a unit, between `low` and `high`."""
    form = Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m|h|d)$|" + FROM_ENV_PATTERN)]
    return BeforeValidator(DurationReader(parse_duration(low), parse_duration(high)), json_schema_input_type=form)


def size(low: str, high: str) -> BeforeValidator:
    """Marks an int of bytes that YAML writes with a unit, between `low` and `high`."""
    form = Annotated[str, Field(pattern=r"^[0-9]+(B|KB|MB|GB|KiB|MiB|GiB|TiB)$|" + FROM_ENV_PATTERN)]
    return BeforeValidator(SizeReader(parse_size(low), parse_size(high)), json_schema_input_type=form)


def whole(low: int, high: int) -> BeforeValidator:
    """Marks an int between `low` and `high`."""
    form = Annotated[int, Field(ge=low, le=high)] | Annotated[str, Field(pattern="^[0-9]+$|" + FROM_ENV_PATTERN)]
    return BeforeValidator(WholeReader(low, high), json_schema_input_type=form)


def _read_rate(value: object) -> int:
    """Credits with up to six decimals -> micro-credits."""
    if isinstance(value, float):
        text = f"{Decimal(repr(value)):f}"  # never 1e-06
    else:
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"expected credits with at most six decimals, such as 0.25, got {describe(value)}")
    credits, decimals = match.groups()
    return int(credits) * 1_000_000 + int((decimals or "").ljust(6, "0"))


def format_rate(rate_ucredits: int) -> str:
    """Micro-credits per million tokens as credits: `0.25`"""
    credits, decimals = divmod(rate_ucredits, 1_000_000)
    return f"{credits}.{decimals:06}".rstrip("0").rstrip(".")


def matching(pattern: str, form: str) -> AfterValidator:
    """Marks text that fits `pattern` whole; `form` says what that is."""
    compiled = re.compile(pattern, re.ASCII)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{quoted(value)} is not {form}")
        return value

    return AfterValidator(check)


def _read_flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    raise ValueError(f"expected true or false, got {describe(value)}")


def _read_header(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", value):
        raise ValueError(f"{quoted(value)} is not a header name")
    return value.lower()


def _read_method(value: str) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    if value.upper() not in known:
        raise ValueError(
            f"unknown method {quoted(value)}{suggest(value, known) or ' (known: ' + ', '.join(known) + ')'}"
        )
    return value.upper()


def _read_text(value: str) -> str:
    if not value or not value.isprintable() or len(value) > 4096:
        raise ValueError("must not be empty" if not value else "must be one line of at most 4096 printable characters")
    return value


def empty_is_none(value: object) -> object:
    """`"${NAME:-}"` with NAME unset leaves an optional key out."""
    return None if value == "" else value


Rate: TypeAlias = Annotated[
    int, BeforeValidator(_read_rate, json_schema_input_type=int | float | Annotated[str, Field(pattern=_RATE_PATTERN)])
]
Flag: TypeAlias = Annotated[bool, BeforeValidator(_read_flag, json_schema_input_type=bool | EnvText)]
Text: TypeAlias = Annotated[str, AfterValidator(_read_text)]
Name: TypeAlias = Annotated[
    str, matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "a name: letters, digits, '_', '.' and '-', at most 64")
]
HeaderName: TypeAlias = Annotated[str, AfterValidator(_read_header)]
Method: TypeAlias = Annotated[str, AfterValidator(_read_method)]

"""The words of a limit: what it is per, where it applies, when a calendar period begins. Each read or refused.

What the words do is the policy room's to know; here stands only which of them there are.
"""

import re
from difflib import get_close_matches
from typing import Annotated, TypeAlias
from zoneinfo import ZoneInfo, available_timezones

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from gateway.config.problems import describe, quoted, suggest, unknown
from gateway.config.values import FROM_ENV_PATTERN, EnvText

#: What a policy's limit may be per, besides `claim:NAME` and `header:NAME`.
PER_WORDS = ("org", "user", "key", "model", "session", "route", "client_ip")
#: What a limit that belongs to no org may be per.
SHARED_PER_WORDS = ("upstream", "route", "model", "client_ip")
#: Dimensions whose values the configuration itself enumerates; all others are hashed into `cardinality` slots.
ENUMERATED = frozenset(("org", "route", "upstream"))
PER_MAX = 8

#: Fields that carry a credential: counting by one would sort an org's requests by its secrets.
CREDENTIAL_FIELDS = frozenset(
    (
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "x-auth-token",
        "x-amz-security-token",
    )
)

_CLAIM_NAME = re.compile(r"[A-Za-z0-9_.:/@-]{1,128}", re.ASCII)
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", re.ASCII)
_CLOCK = r"(?P<hours>[01][0-9]|2[0-3]):(?P<minutes>[0-5][0-9])"
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_ANCHORS = {
    "hour": re.compile(r":(?P<minutes>[0-5][0-9])", re.ASCII),
    "day": re.compile(_CLOCK, re.ASCII),
    "week": re.compile(rf"(?P<weekday>{'|'.join(_DAYS)})(?: {_CLOCK})?", re.ASCII),
    "month": re.compile(rf"(?P<day>0?[1-9]|1[0-9]|2[0-8])(?: {_CLOCK})?", re.ASCII),
}
_ANCHOR_FORMS = {
    "hour": '":15", minutes past the hour',
    "day": '"06:00"',
    "week": '"mon" or "mon 06:00"',
    "month": '"15" or "15 06:00", with a day from 1 to 28 that every month has',
}
#: Not what differs from machine to machine, nor the same zones under other rules.
_ZONE_NAME = re.compile(r"(?!localtime|posixrules|posix/|right/)[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+){0,2}", re.ASCII)


def is_hashed(dimension: str) -> bool:
    """Its values are not the configuration's to enumerate, so they share `cardinality` slots."""
    return dimension not in ENUMERATED


def is_claim(dimension: str) -> bool:
    """It is the value of a claim."""
    kind, _, name = dimension.partition(":")
    return kind == "claim" and _CLAIM_NAME.fullmatch(name) is not None


def parse_anchor(period: str, text: str) -> int:
    """Minutes from the natural beginning of `period` to the anchor. Raises ValueError for one that does not fit it."""
    match = _ANCHORS[period].fullmatch(text)
    if match is None:
        article = "an" if period == "hour" else "a"
        raise ValueError(f"{quoted(text)} is no beginning of {article} {period}: write it as {_ANCHOR_FORMS[period]}")
    parts = match.groupdict()
    days = _DAYS.index(parts["weekday"]) if "weekday" in parts else int(parts.get("day") or 1) - 1
    return (days * 24 + int(parts.get("hours") or 0)) * 60 + int(parts.get("minutes") or 0)


def format_anchor(period: str, anchor_minutes: int) -> str:
    """As one writes it, the shortest way: the inverse of `parse_anchor`."""
    days, minutes = divmod(anchor_minutes, 24 * 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}"
    match period:
        case "hour":
            return f":{minutes % 60:02}"
        case "day":
            return clock
        case "week":
            day = _DAYS[days]
        case _:
            day = f"{days + 1}"
    return f"{day} {clock}" if minutes else day


def read_anchor(value: object, info: ValidationInfo) -> object:
    """Minutes after the natural beginning of the `period` beside it."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f'expected a beginning such as "06:00" or "15 06:00", got {describe(value)}')
    period = info.data.get("period")
    # Without a period there is nothing to fit; that it is missing, or no word, is said elsewhere.
    return 0 if period is None else parse_anchor(period, value)


def _read_grant_anchor(value: object, info: ValidationInfo) -> object:
    return None if value == "created" else read_anchor(value, info)


def _read_zone(value: str) -> str:
    if _ZONE_NAME.fullmatch(value) and _is_zone(value):
        return value
    raise ValueError(f"{quoted(value)} is not a time zone of the IANA list{_similar_zone(value)}")


def _is_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    # Names of no file, of a directory, of a file that holds no zone.
    except (KeyError, OSError, ValueError):
        return False
    return True


def _similar_zone(wrong: str) -> str:
    meant = wrong.strip().replace(" ", "_").casefold()
    # People know the city and not what is written in front of it.
    known = sorted(available_timezones(), reverse=True)
    names = {name.rpartition("/")[2].casefold(): name for name in known} | {name.casefold(): name for name in known}
    close = get_close_matches(meant, names, n=1, cutoff=0.6)
    return f", did you mean '{names[close[0]]}'?" if close else ": write it as Europe/Berlin"


def _read_per(value: str) -> str:
    if value in PER_WORDS or is_claim(value):
        return value
    if value == "upstream":
        raise ValueError("a policy's limit is one org's own: what an upstream can bear stands under shared_limits")
    if value in ("claim", "header"):
        raise ValueError(f"say which: write {value}:NAME")
    kind, _, name = value.partition(":")
    if kind == "header" and _FIELD_NAME.fullmatch(name):
        if name.lower() in CREDENTIAL_FIELDS:
            raise ValueError(f"{quoted(name)} carries a credential: to count each of them on its own, write 'key'")
        return f"header:{name.lower()}"
    if kind in ("claim", "header"):
        raise ValueError(f"{quoted(name)} is not the name of a {kind}")
    known = [*PER_WORDS, "claim:NAME", "header:NAME"]
    if name and suggest(kind, ("claim", "header")):
        raise ValueError(f"unknown dimension {quoted(value)}{suggest(f'{kind}:NAME', known)}")
    raise ValueError(unknown("dimension", value, known))


def _read_shared_per(value: str) -> str:
    if value in SHARED_PER_WORDS:
        return value
    if value in PER_WORDS or value.startswith(("claim:", "header:")):
        raise ValueError(f"a shared limit belongs to no org, so it cannot be per {quoted(value)}: write it in a policy")
    raise ValueError(unknown("dimension", value, SHARED_PER_WORDS))


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _read_glob(value: str) -> str:
    if not value or not value.isprintable() or len(value) > 128:
        raise ValueError("must be one line of 1 to 128 printable characters, '*' standing for any others")
    return value


def _read_share(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,6}", value, re.ASCII):
        value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"expected a part of the limit such as 0.8, got {describe(value)}")
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1, the whole limit, got {value}")
    return float(value)


def _per_form(words: tuple[str, ...], *forms: str) -> BeforeValidator:
    """Reads one dimension as a list of it; `words` and `forms` are what an editor lets through."""
    word = Annotated[str, Field(pattern=f"^({'|'.join([*words, *forms])})$|{FROM_ENV_PATTERN}")]
    return BeforeValidator(_one_or_more, json_schema_input_type=word | list[word])


#: Read one word as a list of it.
one_or_more_or_none = BeforeValidator(_one_or_more, json_schema_input_type=str | list[str] | None)
per_words = _per_form(PER_WORDS, "claim:.+", "header:.+")
shared_per_words = _per_form(SHARED_PER_WORDS)

PerText: TypeAlias = Annotated[str, AfterValidator(_read_per)]
SharedPerText: TypeAlias = Annotated[str, AfterValidator(_read_shared_per)]
Glob: TypeAlias = Annotated[str, AfterValidator(_read_glob)]
Zone: TypeAlias = Annotated[str, AfterValidator(_read_zone)]
Share: TypeAlias = Annotated[
    float,
    BeforeValidator(_read_share, json_schema_input_type=Annotated[float, Field(gt=0, le=1)] | EnvText),
]
Anchor: TypeAlias = Annotated[int, BeforeValidator(read_anchor, json_schema_input_type=str | int)]
#: The same, or None for `created`: the periods of an org begin when it was created.
GrantAnchor: TypeAlias = Annotated[int | None, BeforeValidator(_read_grant_anchor, json_schema_input_type=str | int)]

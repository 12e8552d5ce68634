"""What an upstream's own log says requests cost: one line a request, as JSON or as CSV.

    {"request_id": "0198c0de-...", "credits": 1.25, "org": "acme"}          request_id,credits,org
                                                                            0198c0de-...,1.25,acme

`request_id` is what the upstream got as X-Request-Id; `credits`, in all, has at most six decimals (or `ucredits`: whole
micro-credits); `org`, what it got as X-Org-Id, may be left out. Other members are not read. A line that cannot mean
anything is a problem; nothing is guessed and nothing rounded.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from gateway.charge import UCREDITS_MAX
from gateway.errors import GatewayError
from gateway.types import UCREDITS_PER_CREDIT

STDIN = "-"
#: Kept in memory until all were read: one that is wrong shows what the others may be.
LINES_MAX = 1_000_000
_REQUEST = re.compile(r"[\x21-\x7e]{1,200}")
_ORG = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?")

Members = dict[str, Any]


class UnreadableLog(GatewayError):
    """A log cannot be read."""


@dataclass(frozen=True, slots=True)
class Said:
    """One line. place: `usage.jsonl:12`."""

    place: str
    request_id: str
    org_id: str | None
    ucredits: int


def read_log(path: str) -> tuple[list[Said], list[str]]:
    """Every request that `path` names (`-`: standard input, JSON), and what is wrong with it, line by line. Lines that
    say the same again are left out. Raises UnreadableLog."""
    name = "stdin" if path == STDIN else Path(path).name
    said: dict[tuple[str | None, str], Said] = {}
    problems: list[str] = []
    try:
        with sys.stdin.buffer if path == STDIN else open(path, "rb") as file:
            # Bytes that are no UTF-8 become what is in no request's name.
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            for number, found in _csv(text) if path.endswith(".csv") else _json(text):
                place = f"{name}:{number}"
                line = found if isinstance(found, str) else _said(place, found)
                if isinstance(line, str):
                    problems.append(f"{place}: {line}")
                    continue
                before = said.setdefault((line.org_id, line.request_id), line)
                if before.ucredits != line.ucredits:
                    problems.append(f"{place}: request {line.request_id} has another cost at {before.place}")
                if len(said) > LINES_MAX:
                    raise UnreadableLog(f"{path} names more than {LINES_MAX} requests: split it")
    except (OSError, csv.Error) as exc:
        raise UnreadableLog(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc
    return list(said.values()), problems


def _json(file: Iterable[str]) -> Iterator[tuple[int, Members | str]]:
    for number, text in enumerate(file, 1):
        if not (text := text.strip()):
            continue
        try:
            members = json.loads(text, parse_float=Decimal)
        except json.JSONDecodeError as exc:
            yield number, f"is not JSON: {exc.msg} at column {exc.colno}"
        except (ValueError, RecursionError):
            yield number, "is JSON that nobody can read"
        else:
            yield number, members if isinstance(members, dict) else "is not a JSON object"


def _csv(file: Iterable[str]) -> Iterator[tuple[int, Members | str]]:
    rows = csv.DictReader(file, strict=True)
    if "request_id" not in (rows.fieldnames or ()):
        yield 1, "is no head: the first line names the columns, and one of them is `request_id`"
        return
    for row in rows:
        yield rows.line_num, "has more columns than the head" if None in row else {k: v for k, v in row.items() if v}


def _said(place: str, members: Members) -> Said | str:
    """The line, or what is wrong with it."""
    request_id, org_id = members.get("request_id"), members.get("org")
    if not isinstance(request_id, str) or _REQUEST.fullmatch(request_id) is None:
        return "`request_id` must be 1 to 200 visible ASCII characters"
    if org_id is not None and (not isinstance(org_id, str) or _ORG.fullmatch(org_id) is None):
        return "`org` is not an org id"
    given = [name for name in ("credits", "ucredits") if name in members]
    if len(given) != 1:
        return "one of `credits` and `ucredits` says what it cost"
    ucredits = _ucredits(members[given[0]], UCREDITS_PER_CREDIT if given[0] == "credits" else 1)
    if ucredits is None:
        decimals = "at most six decimals" if given[0] == "credits" else "none"
        return f"`{given[0]}` must be a number from 0 to {UCREDITS_MAX // UCREDITS_PER_CREDIT} credits, with {decimals}"
    return Said(place, request_id, org_id, ucredits)


def _ucredits(value: object, unit: int) -> int | None:
    """`value` of `unit` micro-credits each, exactly; None for what is no such amount."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    if isinstance(value, str) and _NUMBER.fullmatch(value) is None:
        return None
    amount = Decimal(value)
    # Compared first: whole numbers of a million digits are not to be made.
    if not 0 <= amount <= UCREDITS_MAX // unit:
        return None
    exact = amount.quantize(Decimal(1) / unit)
    return int(exact * unit) if exact == amount else None

"""What is wrong with the configuration, in words a person can act on.

Owns the shape of a problem, did-you-mean, and the translation of pydantic's errors into plain sentences. It does not
read files (source.py) and does not know what a gateway is (models.py, checks.py).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic_core import ErrorDetails, PydanticCustomError

#: Where a value stands in a YAML document: keys and list positions from the root.
Path: TypeAlias = tuple[str | int, ...]

#: Values of these keys never appear in a message: they are secrets, or URLs that may carry a password.
SECRET_KEYS = frozenset({"secret", "signing_key", "redis", "postgres", "jwks", "targets"})

_SHOWN_CHARS_MAX = 40


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One mistake. `line` is 1-based; a problem of the whole file stands on line 1."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def suggest(wrong: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` when one of `known` is close to `wrong`, else an empty string."""
    by_folded = {name.casefold(): name for name in known}
    close = get_close_matches(wrong.casefold(), list(by_folded), n=1, cutoff=0.6)
    return f", did you mean '{by_folded[close[0]]}'?" if close else ""


def unknown(noun: str, wrong: str, known: Sequence[str]) -> str:
    """`unknown upstream 'x'` with a suggestion, or with the known names when nothing is close."""
    hint = suggest(wrong, known)
    if not hint:
        hint = f" (known: {', '.join(sorted(known))})" if known else " (none is configured)"
    return f"unknown {noun} {quoted(wrong)}{hint}"


def quoted(text: str) -> str:
    """`text` in quotes on one line, cut when long."""
    short = text if len(text) <= _SHOWN_CHARS_MAX else text[: _SHOWN_CHARS_MAX - 1] + "…"
    return "'" + "".join(c if c.isprintable() else "?" for c in short) + "'"


def describe(value: object, secret: bool = False) -> str:
    """What a YAML value is, in words: `the number 5`, `text 'abc'`, `a list`, `nothing`."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number" if secret else f"the number {quoted(str(value))[1:-1]}"
        case str():
            return "text" if secret else f"text {quoted(value)}"
        case list():
            return "a list"
        case _:
            return "a mapping"


def dotted(path: Path) -> str:
    """`routes[2].upstream`"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def located(path: Path, text: str) -> str:
    """`text` with the place it speaks of in front of it."""
    where = dotted(path)
    return f"{where}: {text}" if where else text


def cross_field(text: str, field: str = "") -> PydanticCustomError:
    """The error of a rule over several keys of one mapping; `field` is the key to point at."""
    return PydanticCustomError("cross_field", "{text}", {"text": text, "field": field})


def nearest(loc: Path, lines: Mapping[Path, int]) -> Path:
    """The longest path of the document along `loc`; parts that pydantic added (union tags) or misses are left out."""
    path: Path = ()
    for part in loc:
        if (*path, part) in lines:
            path = (*path, part)
    return path


def plain_words(error: ErrorDetails, path: Path, root: type[BaseModel]) -> str:
    """One sentence for a pydantic error at `path`, a place in a document that `root` describes."""
    kind, given, loc = error["type"], error["input"], error["loc"]
    secret = any(part in SECRET_KEYS for part in path)
    got = f"got {describe(given, secret)}"
    context = error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return unknown("key", str(loc[-1]), list(keys_at(root, path[:-1])))
        case "missing":
            return f"'{loc[-1]}' is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"expected a mapping (key: value), {got}"
        case "tuple_type" | "list_type":
            return f"expected a list, {got}"
        case "string_type" if isinstance(given, int | float):
            return f"expected text, {got}: put it in quotes"
        case "string_type":
            return f"expected text, {got}"
        case "literal_error":
            return _not_allowed(given, re.findall(r"'([^']*)'", str(context.get("expected", ""))), secret)
        case "too_short":
            return "must not be empty"
        case "too_long":
            items = len(given) if isinstance(given, list | dict) else "more"
            return f"holds {items} items, at most {context.get('max_length')} are allowed"
        case "union_tag_invalid":
            return unknown(f"{path[0]} source", str(context.get("tag")), list(keys_at(root, path)))
        case "union_tag_not_found":
            return f"expected one of {', '.join(keys_at(root, path))}, with its settings indented below it"
        case "cross_field":
            return str(context.get("text", ""))
        case "value_error":
            return str(context.get("error", ""))
        case _:
            return error["msg"][:1].lower() + error["msg"][1:]


def _not_allowed(given: object, allowed: list[str], secret: bool) -> str:
    choices = [f"'{choice}'" for choice in allowed]
    expected = " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    if not isinstance(given, str) or secret:
        return f"expected {expected}, got {describe(given, secret)}"
    return f"expected {expected}, got {quoted(given)}{suggest(given, allowed)}"


def keys_at(root: type[BaseModel], path: Path) -> Iterator[str]:
    """The keys that the mapping at `path` of a `root` document may have."""
    here: list[object] = [root]
    for part in path:
        here = [inner for annotation in here for inner in _members(annotation, part)]
    for annotation in here:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, info in annotation.model_fields.items():
                yield info.alias or name
        elif get_origin(annotation) is Annotated:
            yield from (mark.tag for mark in get_args(annotation) if isinstance(mark, Tag))


def _members(annotation: object, part: str | int) -> Iterator[object]:
    """What stands at key or position `part` of a value with this annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, info in annotation.model_fields.items():
            if (info.alias or name) == part:
                yield from _arms(info.annotation)
        return
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is tuple and isinstance(part, int):
        yield from _arms(args[0])
    elif origin is dict:
        yield from _arms(args[1])
    elif origin is Annotated and any(isinstance(mark, Tag) and mark.tag == part for mark in args[1:]):
        yield args[0]


def _arms(annotation: object) -> Iterator[object]:
    """The members of a union, or the annotation itself; metadata is dropped except on tagged members."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated and any(isinstance(mark, Tag) for mark in args[1:]):
        yield annotation
    elif origin is Annotated:
        yield from _arms(args[0])
    elif origin in (Union, UnionType):
        for arm in args:
            yield from _arms(arm)
    else:
        yield annotation

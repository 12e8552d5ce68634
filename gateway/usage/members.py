"""The members of a JSON object by where they stand, so that one can be changed and every other byte stays.

For texts that a JSON parser has already taken for an object: what is no JSON is not found out here.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

_STRING = rb'"(?:[^"\\]|\\.)*+"'
#: What opens, closes or separates, and strings, so that nothing inside one is taken for it.
_MARK = re.compile(_STRING + rb"|[{}\[\],]", re.DOTALL)
_NAME = re.compile(rb"[{,]\s*+(" + _STRING + rb")\s*+:\s*+", re.DOTALL)
_string = msgspec.json.Decoder(str)


class Member(NamedTuple):
    """One member of the outermost object; `value` stands at `start` up to `end`."""

    name: str
    start: int
    end: int
    value: bytes


class Edit(NamedTuple):
    """`text` in place of what stands at `start` up to `end`."""

    start: int
    end: int
    text: bytes


def members(document: bytes) -> Iterator[Member]:
    """The members of the outermost object, in their order; a name may come more than once."""
    depth = 0
    name, start = "", -1
    for mark in _MARK.finditer(document):
        sign = mark[0][0]
        if sign == 0x22:  # a string
            continue
        if depth == 1 and sign in b",}" and start >= 0:
            value = document[start : mark.start()].rstrip()
            yield Member(name, start, start + len(value), value)
            start = -1
        if sign in b"{[":
            depth += 1
        elif sign in b"}]":
            depth -= 1
        if depth == 1 and sign in b"{," and (found := _NAME.match(document, mark.start())):
            name, start = _string.decode(found[1]), found.end()


def edited(document: bytes, edits: Iterable[Edit]) -> bytes:
    """`document` with all of `edits`, which do not overlap."""
    pieces, position = [], 0
    for edit in sorted(edits):
        pieces += [document[position : edit.start], edit.text]
        position = edit.end
    return b"".join([*pieces, document[position:]])

"""Changing one member of a JSON object: every other byte stays as it was."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage import READERS
from gateway.usage.members import Edit, edited, members

capped = READERS["openai_chat"].capped

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('{}[],:"\\ '), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(texts, values, max_size=5), st.sampled_from([None, 2]), st.booleans())
def test_every_member_is_found_where_it_stands(document: dict[str, Any], indent: int | None, plain: bool) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=plain).encode()

    found = list(members(text))
    assert {member.name: json.loads(member.value) for member in found} == document
    assert all(text[member.start : member.end] == member.value for member in found)


def test_edits_change_nothing_but_their_own_places() -> None:
    assert edited(b"0123456789", [Edit(8, 9, b"-"), Edit(2, 5, b""), Edit(0, 0, b"<")]) == b"<01567-9"


@pytest.mark.parametrize(
    ("body", "expected", "most"),
    [
        (b"{}", b'{"max_completion_tokens":10}', 10),
        (b' { "model" : "x" }', b' {"max_completion_tokens":10, "model" : "x" }', 10),
        (b'{"max_tokens" : 100 ,"a":1}', b'{"max_tokens" : 10 ,"a":1}', 10),
        (b'{"max_tokens":1e3,"max_completion_tokens":3}', b'{"max_tokens":10,"max_completion_tokens":3}', 10),
        (b'{"max_tokens":null,"a":{"max_tokens":99}}', b'{"max_tokens":10,"a":{"max_tokens":99}}', 10),
        (b'{"max_tokens":0}', b'{"max_tokens":10}', 10),
        (b'{"max_tokens":50,"max_tokens":40}', b'{"max_tokens":10,"max_tokens":10}', 10),  # some servers take the first
        (b'{"max\\u005ftokens":50}', b'{"max\\u005ftokens":10}', 10),
        (b'{"n":4,"max_output_tokens":50}', b'{"n":4,"max_output_tokens":2}', 2),
        (b'{"n":100,"max_tokens":50}', b'{"n":100,"max_tokens":1}', 1),
        (
            b'{"messages":[{"content":"\\"max_tokens\\":99}"}],"max_tokens":11}',
            b'{"messages":[{"content":"\\"max_tokens\\":99}"}],"max_tokens":10}',
            10,
        ),
    ],
)
def test_a_body_is_held_to_a_maximum_and_nothing_else_of_it_changes(body: bytes, expected: bytes, most: int) -> None:
    assert capped(body, 10) == (expected, most)


@pytest.mark.parametrize(
    "body", [b'{"max_tokens":10}', b'{"max_tokens":3,"max_completion_tokens":null}', b'{"max_tokens":5,"n":2}']
)
def test_a_body_that_allows_no_more_stays_as_it_is(body: bytes) -> None:
    assert capped(body, 10) is None

"""The journal's lines: whole ones come back as they were, others are told from them."""

from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.journal.lines import Held, Line, decode, encode
from gateway.types import Entry

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
amounts = st.integers(-(2**53), 2**53)
metas = st.dictionaries(texts, st.one_of(texts, amounts, st.none()), max_size=3)
lines = st.one_of(
    st.builds(Held, texts, texts, amounts, amounts),
    st.builds(Entry, texts, texts, st.sampled_from(["settle", "orphan"]), amounts, metas),
)


@given(st.lists(lines, max_size=5))
def test_lines_come_back_as_they_were(written: list[Line]) -> None:
    assert list(decode(b"".join(map(encode, written)))) == written


@given(st.lists(lines, min_size=1, max_size=3), st.data())
def test_a_process_that_dies_while_it_writes_loses_the_line_it_was_at(written: list[Line], data: st.DataObject) -> None:
    whole = b"".join(map(encode, written))
    cut = data.draw(st.integers(0, len(whole)))
    found = list(decode(whole[:cut]))
    read = [line for line in found if line is not None]
    assert read == written[: len(read)]
    assert len(found) - len(read) <= 1
    # Only the break at its end may be missing of a line that is read.
    assert len(b"".join(map(encode, read))) - 1 <= cut < len(b"".join(map(encode, written[: len(read) + 1]))) + 1


def lines_of(text: bytes) -> bytes:
    return b"%08x %b\n" % (crc32(text), text)


@pytest.mark.parametrize(
    "raw",
    [
        b"\0" * 100 + b"\n",
        b"00000000\n",
        b"00000000 \n",
        b"nothing of ours\n",
        encode(Held("acme", "r1", 5, 1)).replace(b"r1", b"r2"),
        lines_of(b'["held","acme","r1","5",1]'),
        lines_of(b'["opened","acme","r1",5,1]'),
    ],
)
def test_what_is_no_line_is_told_from_those_beside_it(raw: bytes) -> None:
    before, after = Held("acme", "a", 1, 0), Entry("acme", "b", "settle", -1)
    assert list(decode(encode(before) + raw + encode(after))) == [before, None, after]

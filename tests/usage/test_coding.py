"""Coded answers are read in passing, within bounds."""

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.usage.coding import CHUNK_DECODED_BYTES_MAX, DECODED_BYTES_MAX, decoder
from gateway.usage.common import Unreadable


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


CODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "GZIP ": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
}


def decoded(coding: str, *chunks: bytes) -> bytes:
    undo = decoder(coding)
    assert undo is not None
    return b"".join(undo.decode(chunk) for chunk in chunks)


@pytest.mark.parametrize("coding", CODERS)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_a_coded_answer_is_undone_across_any_cut(coding: str, data: bytes, cut: int) -> None:
    coded = CODERS[coding](data)

    assert decoded(coding, coded[:cut], coded[cut:]) == data
    assert decoded(coding, *(coded[i : i + 1] for i in range(len(coded)))) == data


def test_deflate_without_its_wrapping_is_undone_too() -> None:
    assert decoded("deflate", raw_deflate(b"hello hello")) == b"hello hello"


def test_gzip_members_follow_each_other_and_padding_ends_them() -> None:
    coded = gzip.compress(b"a") + gzip.compress(b"b")

    assert decoded("gzip", coded[:21], coded[21:], b"\0\0") == b"ab"
    assert decoded("gzip", coded + b"\0\0", gzip.compress(b"c")) == b"ab"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip", "nonsense"])
def test_a_coding_we_cannot_undo_has_no_decoder(coding: str) -> None:
    assert decoder(coding) is None


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_broken_data_is_unreadable(coding: str) -> None:
    with pytest.raises(Unreadable):
        decoded(coding, b"\x1f\x8b not so")


def test_a_bomb_in_one_chunk_is_given_up_within_the_bound() -> None:
    bomb = gzip.compress(b"\0" * (CHUNK_DECODED_BYTES_MAX * 8))
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable):
            decoded("gzip", bomb)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < CHUNK_DECODED_BYTES_MAX * 3


def test_a_bomb_in_many_chunks_is_given_up_too() -> None:
    part_bytes = 1 << 20
    bomb = gzip.compress(b"\0" * part_bytes) * (DECODED_BYTES_MAX // part_bytes + 1)

    with pytest.raises(Unreadable):
        decoded("gzip", *(bomb[i : i + 1000] for i in range(0, len(bomb), 1000)))

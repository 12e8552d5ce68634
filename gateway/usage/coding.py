"""Content codings undone for metering only: the client still gets the bytes as they came.

Owns the bounds: a few coded bytes may stand for gigabytes, and the meter runs between two chunks of a live stream.
"""

import zlib
from typing import Protocol

from gateway.usage.common import Unreadable

#: Decoded bytes one chunk may expand to, and all chunks together: beyond, the answer is not metered.
CHUNK_DECODED_BYTES_MAX = 4 << 20
DECODED_BYTES_MAX = 64 << 20

_GZIP = zlib.MAX_WBITS | 16
_ZLIB = zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS


class Decoder(Protocol):
    """Undoes one content coding, chunk by chunk."""

    def decode(self, chunk: bytes) -> bytes:
        """The plain bytes that `chunk` adds. Raises Unreadable for broken data and beyond the bounds."""
        ...


def decoder(content_encoding: str) -> Decoder | None:
    """A decoder for the field value of Content-Encoding; None when we have none for it (br, zstd, several at once)."""
    coding = content_encoding.strip().lower()
    if coding in ("", "identity"):
        return _Identity()
    if coding in ("gzip", "x-gzip"):  # RFC 9110 §8.4.1.3: one and the same
        return _Inflate(_GZIP)
    return _Inflate(_ZLIB) if coding == "deflate" else None


class _Identity:
    __slots__ = ()

    def decode(self, chunk: bytes) -> bytes:
        return chunk


class _Inflate:
    """gzip and deflate. State: zlib's own, the bytes decoded so far, and whether the coded data has come to its end."""

    __slots__ = ("_decoded_bytes", "_ended", "_started", "_stream", "_wbits")

    def __init__(self, wbits: int) -> None:
        self._wbits = wbits
        self._stream = zlib.decompressobj(wbits)
        self._started = False
        self._ended = False
        self._decoded_bytes = 0

    def decode(self, chunk: bytes) -> bytes:
        if not chunk:
            return b""
        if not self._started:
            self._started = True
            # "deflate" means zlib's wrapping (RFC 9110 §8.4.1.2), yet some servers leave it out. The method nibble of
            # a zlib header is 8; a raw stream that starts like that begins with a stored block, which none does.
            if self._wbits == _ZLIB and chunk[0] & 0x0F != 8:
                self._wbits = _RAW_DEFLATE
                self._stream = zlib.decompressobj(_RAW_DEFLATE)
        try:
            plain = self._inflate(chunk)
        except zlib.error as exc:
            raise Unreadable("the answer is not in the coding it names") from exc
        self._decoded_bytes += len(plain)
        if self._decoded_bytes > DECODED_BYTES_MAX:
            raise Unreadable("the answer expands beyond the bound of metering")
        return plain

    def _inflate(self, chunk: bytes) -> bytes:
        plain = []
        room = CHUNK_DECODED_BYTES_MAX
        while chunk and not self._ended:
            if self._stream.eof:
                # RFC 1952 §2.2: a gzip file is a series of members. What follows the end of anything else is noise.
                self._ended = self._wbits != _GZIP or chunk[0] != 0x1F
                self._stream = zlib.decompressobj(self._wbits)
                continue
            plain.append(self._stream.decompress(chunk, room))
            room -= len(plain[-1])
            if self._stream.unconsumed_tail or room <= 0:
                raise Unreadable("one chunk of the answer expands beyond the bound of metering")
            chunk = self._stream.unused_data
        return b"".join(plain)

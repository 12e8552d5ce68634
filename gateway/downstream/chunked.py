"""A chunked request body (RFC 9112 §7.1), read strictly and bounded. Pure: bytes in, body out.

    size line ──► data ──► CR LF ──┐
        ▲ └── 0 ──► trailers ──► complete
        └──────────────────────────┘

Chunk extensions are nobody's business here: they are bounded and dropped (RFC 9112 §7.1.1 has recipients ignore
what they do not know). White space outside quotes, a sign, `0x` and bare LF are refused, because others read them in
more than one way.
"""

import re

from gateway.downstream.request import TRAILERS_BYTES_MAX, Field, Unreadable, is_hopeless, read_trailers

#: A size with its extensions.
LINE_BYTES_MAX = 256
#: All extensions of a body together: as much as Node allows, since they may cost more than the data they come with.
EXTENSIONS_BYTES_MAX = 16_384

_CRLF = b"\r\n"
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;%b(?:=(?:%b|%b))?)*+" % (_TOKEN, _TOKEN, _QUOTED))


class ChunkedBody:
    """Fed with what arrives; `complete` once its last byte has."""

    __slots__ = ("_begun", "_extensions_bytes", "_last", "_left", "complete", "rest", "trailers")

    def __init__(self) -> None:
        #: A line, or the trailers, of which the end has not arrived.
        self._begun = b""
        #: Bytes of the current chunk that have not arrived, its CR LF included; 0 before a size line.
        self._left = 0
        self._last = False
        self._extensions_bytes = 0
        self.complete = False
        self.trailers: list[Field] = []
        #: What arrived behind the body.
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises Unreadable."""
        if self._begun:
            data = self._begun + data
            self._begun = b""
        pieces: list[bytes] = []
        at = 0
        while at < len(data):
            if self._left:
                at = self._take_data(data, at, pieces)
                continue
            end = self._line_end(data, at)
            if end < 0:
                self._begun = data[at:]
                break
            if self._last:
                self._end(data[at:end])
                self.rest = data[end:]
                break
            self._take_size(data[at : end - 2])
            at = end
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take_data(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """The position behind what could be taken of a chunk's data and its CR LF."""
        left = self._left
        if left > 2:
            piece = data[at : at + left - 2]
            pieces.append(piece)
            at += len(piece)
            left -= len(piece)
        tail = data[at : at + left] if left <= 2 else b""
        if tail != _CRLF[2 - left :][: len(tail)]:
            raise Unreadable(400, "A chunk of the body is longer than its size says.")
        self._left = left - len(tail)
        return at + len(tail)

    def _line_end(self, data: bytes, at: int) -> int:
        """The position behind the size line, or behind all trailers; -1 when it has not arrived."""
        if self._last and not data.startswith(_CRLF, at):
            end, length, bound = data.find(_CRLF + _CRLF, at), 4, TRAILERS_BYTES_MAX
        else:
            end, length, bound = data.find(_CRLF, at), 2, LINE_BYTES_MAX
        if (len(data) if end < 0 else end + length) - at > bound:
            raise Unreadable(431 if self._last else 400, "Chunk extensions or trailers are too long.")
        if end < 0 and is_hopeless(data[at:], 0):
            raise Unreadable(400, "A chunk is framed by control characters, or line ends other than CR LF.")
        return end if end < 0 else end + length

    def _take_size(self, line: bytes) -> None:
        read = _LINE.fullmatch(line)
        if read is None:
            raise Unreadable(400, "The size of a chunk cannot be read.")
        self._extensions_bytes += len(line) - read.end(1)
        if self._extensions_bytes > EXTENSIONS_BYTES_MAX:
            raise Unreadable(400, f"The chunk extensions exceed {EXTENSIONS_BYTES_MAX} bytes.")
        size = int(read[1], 16)
        self._last = size == 0
        self._left = size + 2 if size else 0

    def _end(self, raw: bytes) -> None:
        if raw != _CRLF:
            self.trailers = read_trailers(raw)
        self.complete = True

"""Frames as far as a relay must know them: where one begins and ends, and which of them make one message (RFC 6455 §5).

Pure. Payloads are never unmasked, decompressed or judged, and neither are the rules that a frame may break: that is
for the two ends, who agreed on them. What no valid stream has is counted so that nothing escapes being counted.
"""

import struct
from dataclasses import dataclass

from websockets.frames import Close, Frame, Opcode

#: Opcodes from here on are control frames (§5.5): they may stand between the fragments of a message.
CONTROL = 0x8
CLOSE = 0x8
#: What a close frame can say beside its code (§5.5: payloads of control frames have at most 125 bytes).
REASON_BYTES_MAX = 123
MASK_BYTES = 4

_CODE = struct.Struct("!H")


@dataclass(frozen=True, slots=True)
class Header:
    """The head of one frame, without its masking key."""

    fin: bool
    opcode: int
    masked: bool
    payload_bytes: int
    #: Its own length.
    header_bytes: int

    @property
    def rest_bytes(self) -> int:
        """What follows until the next frame: the masking key, if there is one, and the payload."""
        return self.payload_bytes + MASK_BYTES if self.masked else self.payload_bytes

    @property
    def control(self) -> bool:
        return self.opcode >= CONTROL


def parse(data: bytes, at: int = 0) -> Header | None:
    """The header that begins at `data[at]`; None when it is not all there yet (at most 10 bytes)."""
    if len(data) < at + 2:
        return None
    first, second = data[at], data[at + 1]
    payload_bytes, header_bytes = second & 0x7F, 2
    if payload_bytes >= 126:
        header_bytes = 4 if payload_bytes == 126 else 10
        if len(data) < at + header_bytes:
            return None
        payload_bytes = int.from_bytes(data[at + 2 : at + header_bytes])
    return Header(first >= 0x80, first & 0x0F, second >= 0x80, payload_bytes, header_bytes)


class Messages:
    """The messages of one direction, from the headers of its frames. State: how much of the open message has passed."""

    __slots__ = ("_bytes", "_open", "count")

    def __init__(self) -> None:
        self._open = False
        self._bytes = 0
        #: Messages that have begun.
        self.count = 0

    def begins(self, header: Header) -> bool:
        """Whether this frame would begin a message.

        A continuation of nothing does, and so does a second first frame: an upstream that takes them for messages
        must not get them for nothing.
        """
        return not header.control and not (header.opcode == 0 and self._open)

    def bytes_with(self, header: Header) -> int:
        """Payload of the message that this frame belongs to, up to its end and as on the wire; a control frame is by
        itself."""
        if header.control or self.begins(header):
            return header.payload_bytes
        return self._bytes + header.payload_bytes

    def add(self, header: Header) -> None:
        """The frame passes."""
        if header.control:
            return
        self._bytes = self.bytes_with(header)
        self.count += self.begins(header)
        self._open = not header.fin


def close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """A close frame as a client (masked) or a server sends it. The reason is cut to what fits, at a whole character."""
    fitting = reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")
    return Frame(Opcode.CLOSE, Close(code, fitting).serialize()).serialize(mask=masked)


def close_code(header: Header, rest: bytes) -> int | None:
    """What a close frame gives as its reason to end; None when it gives none. rest: what followed its header."""
    if header.payload_bytes < _CODE.size:
        return None
    at = MASK_BYTES if header.masked else 0
    (code,) = _CODE.unpack_from(rest, at)
    if header.masked:
        code ^= _CODE.unpack_from(rest)[0]
    return int(code)

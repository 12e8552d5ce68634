"""Server-sent events out of a byte stream: the data of each event, wherever the network cut the bytes.

Follows the HTML standard's "Interpreting an event stream" for what metering needs: lines end with CR, LF or CRLF, one
leading byte order mark is skipped, comments and fields other than `data` are ignored, several `data` lines join with
LF. Everything stays bytes, so a cut inside a UTF-8 sequence cannot hurt. An event larger than EVENT_BYTES_MAX is
dropped and counted.
"""

#: Largest event kept, counted over its data lines; also the bound of what is held back between two chunks.
EVENT_BYTES_MAX = 1 << 20

_BOM = b"\xef\xbb\xbf"


class EventSplitter:
    """Cuts one stream into events. State: the unfinished line, the finished lines of the unfinished event."""

    __slots__ = ("_after_cr", "_data", "_event_bytes", "_first_line", "_line", "_overflown", "dropped")

    def __init__(self) -> None:
        #: Events dropped for their size so far.
        self.dropped = 0
        self._line = bytearray()  # the unfinished line; grown in place, so that a slow stream stays linear
        self._data: list[bytes] = []  # `data` lines of the unfinished event
        self._event_bytes = 0
        self._overflown = False  # the unfinished event is over the bound and is skipped up to its blank line
        self._after_cr = False  # the last byte was CR: an LF that follows belongs to it
        self._first_line = True

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that `chunk` completes, in order."""
        if self._after_cr:
            self._after_cr = False
            if chunk[:1] == b"\n":
                chunk = chunk[1:]
        if not chunk:
            return []
        lines = chunk.splitlines()  # on bytes: CR, LF and CRLF only, exactly the three that the standard names
        last = chunk[-1]
        tail = b""
        if last == 0x0D:
            self._after_cr = True
        elif last != 0x0A:
            tail = lines.pop()
        if lines and self._line:
            self._line += lines[0]
            lines[0] = bytes(self._line)
            self._line.clear()
        events = self._take(lines) if lines else []
        if tail:
            self._hold(tail)
        return events

    def pending(self) -> bytes | None:
        """The data of the unfinished event, as if the stream ended cleanly here; None when there is none.

        The standard discards it. Servers that forget the last blank line exist, and their usage is in that event.
        """
        if self._overflown:
            return None
        data = list(self._data)
        line = bytes(self._line)
        value = _data_of(line.removeprefix(_BOM) if self._first_line else line)
        if value is not None:
            data.append(value)
        return b"\n".join(data) if data else None

    def _take(self, lines: list[bytes]) -> list[bytes]:
        if self._first_line:
            self._first_line = False
            lines[0] = lines[0].removeprefix(_BOM)
        events = []
        data = self._data
        for line in lines:
            if not line:
                if data and not self._overflown:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                data.clear()
                self._event_bytes = 0
                self._overflown = False
                continue
            value = _data_of(line)
            if value is None or self._overflown:
                continue
            self._event_bytes += len(line)  # data lines only: comments that keep a stream alive are not held
            if self._event_bytes > EVENT_BYTES_MAX:
                self._overflow()
            else:
                data.append(value)
        return events

    def _hold(self, piece: bytes) -> None:
        if self._overflown or self._event_bytes + len(self._line) + len(piece) > EVENT_BYTES_MAX:
            self._overflow()
            # One byte stands for the line, so that its end is not taken for the blank line that ends the event.
            self._line[:] = b":"
        else:
            self._line += piece

    def _overflow(self) -> None:
        if not self._overflown:
            self._overflown = True
            self.dropped += 1
            self._data.clear()


def _data_of(line: bytes) -> bytes | None:
    """The value of a `data` line; None for a comment or another field."""
    if line[:5] == b"data:":
        return line[6:] if line[5:6] == b" " else line[5:]
    return b"" if line == b"data" else None

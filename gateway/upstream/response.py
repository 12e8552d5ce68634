"""The bytes of an answer, read strictly. Owns where heads and content begin and end; does no I/O.

    interim heads ──► head ──► content ──► complete
                       └► switched (101)

llhttp (httptools) reads heads and chunks. Everything that it lets pass and two readers could understand differently is
refused here or in framing.py: empty lines before the status line, RTSP and ICE, other versions, control characters in
the reason, transfer codings other than `chunked`, chunks in HTTP/1.0, absurd lengths, a framing field behind the
chunks. It gets the bytes of heads and chunks only, so that where an answer ends is known to the byte.
"""

import httptools
import httpx

from gateway.upstream.framing import Fields, Framing, check_switch, framed, interim_fields, malformed
from gateway.upstream.request import Outgoing

_HEAD_END = b"\r\n\r\n"
#: Not allowed in a reason phrase (RFC 9112 §4); of these llhttp refuses line breaks only.
_CONTROLS = bytes(range(0x09)) + bytes(range(0x0A, 0x20)) + b"\x7f"


class Incoming:
    """The answer to one request. Its parser serves no other, so nothing of one answer can be read into the next."""

    __slots__ = (
        "_fields",
        "_head_bytes_max",
        "_head_only",
        "_held",
        "_left_bytes",
        "_parser",
        "_phrase",
        "_silent_bytes",
        "_status",
        "_tail",
        "_upgrade",
        "answered",
        "complete",
        "early",
        "framing",
        "headers",
        "interims",
        "keep_alive",
        "parts",
        "reason",
        "status",
        "switched",
        "trailers",
        "version",
    )

    def __init__(self, outgoing: Outgoing, head_bytes_max: int) -> None:
        self._head_only = outgoing.head_only
        self._upgrade = outgoing.upgrade
        self._head_bytes_max = head_bytes_max
        self.status = 0
        self.reason = b""
        self.version = b""
        self.headers: Fields = []
        #: Filled when the body is complete.
        self.trailers: Fields = []
        self.framing: Framing = "none"
        #: Heads before the answer's, oldest first: status, reason, fields. Whoever relays them takes them out.
        self.interims: list[tuple[int, bytes, Fields]] = []
        #: Content that has arrived, cut as it came; a chunk is one element, or several if it came in several reads.
        #: Whoever consumes it puts a new list in its place.
        self.parts: list[bytes] = []
        #: The answer's head is complete.
        self.answered = False
        #: Nothing more belongs to the answer.
        self.complete = False
        #: Another message may follow on the connection.
        self.keep_alive = outgoing.keep_alive
        #: The answer is a 101 that was asked for, and these are the first bytes of what follows.
        self.switched = False
        self.early = b""
        self._fields = self.headers
        self._held = self._tail = self._phrase = b""
        self._silent_bytes = self._left_bytes = self._status = 0
        #: Only as long as heads or chunks may come: it and this refer to each other.
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """`data` is read. Raises httpx.RemoteProtocolError; nothing more can be read then."""
        if not self.answered:
            self._feed_heads(data)
        elif self.complete:
            self.keep_alive = False  # bytes after an answer could be taken for the next
        elif self.framing == "chunked":
            self._feed_chunks(data)
        elif self.framing == "length":
            self._feed_length(data)
        else:
            self.parts.append(data)

    def drop(self) -> None:
        """Nothing more will be fed."""
        self._parser = None

    def end(self) -> bool:
        """The upstream has closed in order: was that the end of the answer?"""
        if self.answered and self.framing == "close":
            self.complete = True
        return self.complete

    # -- heads ---------------------------------------------------------------------------------------------------

    def _feed_heads(self, data: bytes) -> None:
        start = len(self._held)
        if start:
            data = self._held + data
        while True:
            end = data.find(_HEAD_END, start - 3 if start > 3 else 0) + 4
            size = end if end > 3 else len(data)
            if self._silent_bytes + size > self._head_bytes_max:
                raise malformed(f"the head is larger than {self._head_bytes_max} bytes")
            # Whole or not, so that a head that is wrong is refused at once and not at some deadline.
            self._parse(data[start:size])
            if end == 3:
                self._held = data
                return
            self._head(data)
            data = data[end:]
            if self.answered:
                break
            self._silent_bytes += end
            start = 0
            if not data:
                self._held = b""
                return
        self._held = b""
        self._silent_bytes = 0
        if self.switched:
            self.early = data
        elif data and self.framing == "length" and not self.complete:
            self._feed_length(data)
        elif data:
            self.feed(data)

    def _head(self, data: bytes) -> None:
        """llhttp has read the head that `data` begins with."""
        status, reason = self._status, self._phrase
        if data.startswith(b"HTTP/1.1 "):
            self.version = b"HTTP/1.1"
        elif data.startswith(b"HTTP/1.0 "):
            self.version = b"HTTP/1.0"
        else:
            raise malformed(f"it begins with {data[:9]!r}")
        if not reason.isalnum() and len(reason.translate(None, _CONTROLS)) != len(reason):
            raise malformed("a control character in the reason phrase")
        if status > 199:
            self.framing, self._left_bytes, persistent = framed(status, self.version, self.headers, self._head_only)
            self.keep_alive = self.keep_alive and persistent
            self.complete = self.framing == "none" or (self.framing == "length" and not self._left_bytes)
        elif status == 101:
            check_switch(self._upgrade, self.headers)
            self.switched = True
            self.keep_alive = False
        elif status > 99:
            self._interim(status, reason)
            return
        else:
            raise malformed(f"the status {status}")
        self.status, self.reason = status, reason
        self.answered = True
        self._fields = self.trailers
        if self.framing != "chunked":
            self._parser = None

    def _interim(self, status: int, reason: bytes) -> None:
        self.interims.append((status, reason, interim_fields(status, self._fields)))
        self._fields.clear()
        self._status, self._phrase = 0, b""
        # After `Connection: close` in an interim head llhttp would not read on; it means the answer to come.
        self._parser = httptools.HttpResponseParser(self)

    # -- content -------------------------------------------------------------------------------------------------

    def _feed_length(self, data: bytes) -> None:
        left = self._left_bytes
        self._left_bytes = left - len(data)
        if self._left_bytes <= 0:
            self.complete = True
            if self._left_bytes < 0:
                self.keep_alive = False
                data = data[:left]
        self.parts.append(data)

    def _feed_chunks(self, data: bytes) -> None:
        had = len(self.parts)
        tail = data[-5:] if len(data) > 4 else (self._tail + data)[-5:]
        try:
            self._parse(data)
        except httpx.RemoteProtocolError:
            if not self.complete:
                raise
            self.keep_alive = False
        if self.complete:
            # llhttp skips empty lines after an answer. Where this one ended exactly, something that is no line break
            # stands before the two at its end.
            if not tail.endswith(_HEAD_END) or tail[:1] in (b"\r", b"\n"):
                self.keep_alive = False
            self._parser = None
            self._end_of_chunks()
            return
        self._tail = tail
        if len(self.parts) > had:
            self._silent_bytes = 0
        else:
            self._silent_bytes += len(data)
            if self._silent_bytes > self._head_bytes_max:
                raise malformed(f"more than {self._head_bytes_max} bytes without content")

    def _end_of_chunks(self) -> None:
        if not self.trailers:
            return
        if sum(len(name) + len(value) + 4 for name, value in self.trailers) > self._head_bytes_max:
            self.complete = False
            raise malformed(f"the trailer section is larger than {self._head_bytes_max} bytes")
        if any(name.lower() == b"transfer-encoding" for name, _ in self.trailers):
            self.complete = False  # llhttp has refused Content-Length already
            raise malformed("a framing field in the trailer section")

    # -- llhttp --------------------------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # `data` ends with the head, so nothing is left over
        except httptools.HttpParserError as exc:
            raise malformed(str(exc)) from exc

    def on_status(self, status: bytes) -> None:
        self._phrase += status

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        if self.answered or self._parser is None:
            self.keep_alive = False
        else:
            self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.parts.append(data)

    def on_message_complete(self) -> None:
        if self.answered:
            self.complete = True
            # What llhttp reads as another message goes nowhere.
            self._fields = []

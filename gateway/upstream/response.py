"""The bytes of an answer, read strictly. Owns framing and what is refused; does no I/O.

    interim heads ──► head ──► content ──► complete
                       └► switched (101)

llhttp (httptools) reads heads and chunks. Everything that it lets pass and two readers could understand differently is
refused here: empty lines before the status line, RTSP and ICE, other versions, control characters in the reason, a
transfer coding other than `chunked`, chunks in HTTP/1.0, absurd lengths, a framing field behind the chunks. It gets
the bytes of heads and chunks only, so that where an answer ends is known to the byte.
"""

from typing import Literal

import httptools
import httpx

from gateway.upstream.request import LENGTH_DIGITS_MAX, Outgoing

#: How the end of a body is told; "none": an answer that has no body whatever its fields say.
Framing = Literal["length", "chunked", "close", "none"]
Fields = list[tuple[bytes, bytes]]

_HEAD_END = b"\r\n\r\n"
_HEAD_START = b"HTTP/1."
_VERSIONS = (b"HTTP/1.1 ", b"HTTP/1.0 ")
#: Not allowed in a reason phrase (RFC 9112 §4); of these llhttp refuses line breaks only.
_CONTROLS = bytes(range(0x09)) + bytes(range(0x0A, 0x20)) + b"\x7f"


class Incoming:
    """The answer to one request. Its parser serves no other, so nothing of one answer can be read into the next."""

    __slots__ = (
        "_chunked",
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
            if not data.startswith(_HEAD_START) and not _HEAD_START.startswith(data):
                raise _malformed("it does not begin with HTTP/1")
            end = data.find(_HEAD_END, start - 3 if start > 3 else 0) + 4
            size = end if end > 3 else len(data)
            if self._silent_bytes + size > self._head_bytes_max:
                raise _malformed(f"the head is larger than {self._head_bytes_max} bytes")
            # Whole or not, so that a head that is wrong is refused at once and not at some deadline.
            self._parse(data[start:size])
            if end == 3:
                self._held = data
                return
            self._head(data[:9])
            self._silent_bytes += end
            data, start = data[end:], 0
            if self.answered:
                break
            if not data:
                self._held = b""
                return
        self._held = b""
        self._silent_bytes = 0
        if self.switched:
            self.early = data
        elif data:
            self.feed(data)

    def _head(self, start: bytes) -> None:
        """llhttp has read a head that begins with `start`."""
        status, self._status = self._status, 0
        reason, self._phrase = self._phrase, b""
        if start not in _VERSIONS or status < 100:
            raise _malformed(f"status {status} in {start!r}")
        if len(reason.translate(None, _CONTROLS)) != len(reason):
            raise _malformed("a control character in the reason phrase")
        if status == 101:
            self._switch()
        elif status < 200:
            self._interim(status, reason)
            return
        self.status, self.reason, self.version = status, reason, start[:8]
        self.answered = True
        self._fields = self.trailers
        if status != 101:
            self._frame()
        if self.framing != "chunked":
            self._parser = None

    def _interim(self, status: int, reason: bytes) -> None:
        """RFC 9110 §15.2: an interim answer has no content, so a field that promises some is a trap for whoever
        believes it; but `Content-Length: 0` is said by real servers."""
        fields = []
        for name, value in self._fields:
            lowered = name.lower()
            if lowered == b"transfer-encoding" or lowered == b"content-length" and value.strip() != b"0":
                raise _malformed(f"status {status} with content")
            if lowered != b"content-length":
                fields.append((name, value))
        self.interims.append((status, reason, fields))
        self._fields.clear()
        # After `Connection: close` in an interim head llhttp would not read on; it means the answer to come.
        self._parser = httptools.HttpResponseParser(self)

    def _switch(self) -> None:
        """RFC 9110 §7.8: a 101 to protocols that the request offered, by a head that cannot have content."""
        offered = _members(self._upgrade)
        chosen: set[bytes] = set()
        for name, value in self.headers:
            lowered = name.lower()
            if lowered == b"upgrade":
                chosen |= _members(value)
            elif lowered in (b"content-length", b"transfer-encoding"):
                raise _malformed("status 101 with content")
        # llhttp has refused a 101 whose Connection does not nominate Upgrade.
        if not chosen or not chosen <= offered:
            raise _malformed("a switch of protocols that was not asked for")
        self.switched = True
        self.keep_alive = False

    def _frame(self) -> None:
        """Where the answer ends (RFC 9112 §6.3), and whether another may follow (§9.3)."""
        length: bytes | None = None
        chunked = False
        options = b""
        for name, value in self.headers:
            # Lengths tell the fields that matter from most others, without lower-casing.
            size = len(name)
            if size == 14 and name.lower() == b"content-length":
                if length is not None:
                    raise _malformed("more than one Content-Length")
                length = value.strip()
            elif size == 17 and name.lower() == b"transfer-encoding":
                # Without a TE field, which is ours to send and is not sent, no other coding may be used.
                if chunked or value.strip().lower() != b"chunked" or self.version != b"HTTP/1.1":
                    raise _malformed("a transfer coding other than 'chunked', once, in HTTP/1.1")
                chunked = True
            elif size == 10 and name.lower() == b"connection":
                options += b"," + value
        if options or self.version != b"HTTP/1.1":
            members = _members(options)
            if b"close" in members or (self.version != b"HTTP/1.1" and b"keep-alive" not in members):
                self.keep_alive = False
        left = 0
        if length is not None:
            if chunked or not length.isdigit() or len(length) > LENGTH_DIGITS_MAX:
                raise _malformed("Content-Length beside Transfer-Encoding, or no number")
            self._left_bytes = left = int(length)
        if self._head_only or self.status in (204, 304):
            self.complete = True
            if self.status == 204 and (chunked or left):
                self.keep_alive = False  # content that must not be there may follow
        elif chunked:
            self.framing = "chunked"
        elif length is not None:
            self.framing = "length"
            self.complete = left == 0
        else:
            self.framing = "close"
            self.keep_alive = False

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
                raise _malformed(f"more than {self._head_bytes_max} bytes without content")

    def _end_of_chunks(self) -> None:
        if not self.trailers:
            return
        if sum(len(name) + len(value) + 4 for name, value in self.trailers) > self._head_bytes_max:
            self.complete = False
            raise _malformed(f"the trailer section is larger than {self._head_bytes_max} bytes")
        if any(name.lower() == b"transfer-encoding" for name, _ in self.trailers):
            self.complete = False  # llhttp has refused Content-Length already
            raise _malformed("a framing field in the trailer section")

    # -- llhttp --------------------------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # `data` ends with the head, so nothing is left over
        except httptools.HttpParserError as exc:
            raise _malformed(str(exc)) from exc

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


def _members(value: bytes) -> set[bytes]:
    """The elements of a list field, lower-case."""
    return {member.strip() for member in value.lower().split(b",")} - {b""}


def _malformed(why: str) -> httpx.RemoteProtocolError:
    return httpx.RemoteProtocolError(f"The answer is malformed: {why}.")

"""What a payload is: bytes to send, and what must come of them.

KEY in a payload stands for a valid credential of the same length: a request that is smuggled in with it would be
admitted as well, so that nothing but the framing stands between it and the upstream.
"""

from dataclasses import dataclass

KEY = b"gw_" + b"K" * 43
AUTH = b"Authorization: Bearer " + KEY + b"\r\n"
#: A request that must not be one: it stands where a body, or nothing at all, is meant to be.
HIDDEN = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n" + AUTH + b"\r\n"


@dataclass(frozen=True, slots=True)
class Payload:
    name: str
    data: bytes
    #: The statuses of all answers, interim ones aside.
    answers: tuple[int, ...]
    #: What the upstream gets: by default one request for `/x` per answer of 200.
    targets: tuple[bytes, ...] | None = None
    #: Answers that are as good.
    also: tuple[int, ...] | None = None
    #: The connection ends although the last answer did not say so.
    ends_unsaid: bool = False

    @property
    def expected(self) -> tuple[bytes, ...]:
        return (b"/x",) * self.answers.count(200) if self.targets is None else self.targets


def request(
    *fields: bytes, body: bytes = b"", line: bytes = b"POST /x HTTP/1.1", host: bytes = b"Host: a\r\n"
) -> bytes:
    """fields: whole lines without their CR LF."""
    return line + b"\r\n" + host + AUTH + b"".join(field + b"\r\n" for field in fields) + b"\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def length(data: bytes) -> bytes:
    return b"Content-Length: %d" % len(data)


END = b"0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"

"""Answers to break, where they are broken, and what must come of it. Pure: what a fault is, is faults.py's."""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway.types import Outcome
from tests.walk.house import CREDIT
from tests.walk.storm.reading import Reading

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """What the upstream answers, and what of it is the body."""

    wire: bytes
    body: bytes
    status: int = 200
    interim: tuple[int, ...] = ()
    #: False: only the end of the connection ends it.
    framed: bool = True
    path: str = "/x"

    def heads_bytes(self, count: int) -> int:
        """Up to the end of the `count`th head."""
        end = -1
        for _ in range(count):
            end = self.wire.index(HEAD_END, end + 1)
        return end + len(HEAD_END) if count else 0

    @property
    def head_bytes(self) -> int:
        """Up to the end of the final head."""
        return self.heads_bytes(len(self.interim) + 1)


def _chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailers + b"\r\n"


_WORDS = b"exactly this and nothing else"
_LENGTH = b"Content-Length: %d\r\n\r\n%b" % (len(_WORDS), _WORDS)
_EVENTS = (
    b'data: {"choices":[{"index":0,"delta":{"content":"one"}}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"total_tokens":12}}\n\n',
    b"data: [DONE]\n\n",
)
ANSWERS = {
    "length": Answer(b"HTTP/1.1 200 OK\r\nX-A: b\r\n" + _LENGTH, _WORDS),
    "trailers": Answer(
        b"HTTP/1.1 200 Fine\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        + _chunked(_WORDS[:10], _WORDS[10:], trailers=b"X-Sum: 1\r\n"),
        _WORDS,
    ),
    "events": Answer(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        + _chunked(*_EVENTS),
        b"".join(_EVENTS),
        path="/v1/chat/completions",
    ),
    "interim": Answer(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\nHTTP/1.1 200 OK\r\n" + _LENGTH,
        _WORDS,
        interim=(103,),
    ),
    "unframed": Answer(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + _WORDS, _WORDS, framed=False),
    "error": Answer(b"HTTP/1.1 500 Oh\r\n" + _LENGTH, _WORDS, status=500),
}
#: The final count of tokens has passed with this many bytes of the event stream; its line need not have ended.
COUNTED_BYTES = ANSWERS["events"].wire.index(_EVENTS[1]) + len(_EVENTS[1].rstrip())


@dataclass(frozen=True, slots=True)
class Case:
    """One request for the answer named `answer`, whose connection meets `kind` after `at` bytes."""

    answer: str
    kind: str
    at: int
    method: str = "POST"
    #: In place of the answer's own.
    path: str = ""
    body: bytes = b'{"messages":[]}'
    chunked: bool = False
    #: Tells cases apart that are otherwise the same.
    number: int = 0

    @property
    def id(self) -> str:
        return f"{self.method}-{self.answer}-{self.kind}-{self.at}-{len(self.body)}-{self.chunked:d}-{self.number}"

    @property
    def expected(self) -> Answer:
        return ANSWERS[self.answer]

    @property
    def outcome(self) -> Outcome:
        expected = self.expected
        if self.at < expected.head_bytes or expected.status >= 400:
            return Outcome.UPSTREAM_REFUSED
        return Outcome.COMPLETE if self.whole else Outcome.UPSTREAM_BROKE

    @property
    def whole(self) -> bool:
        """The answer comes to an end that its framing allows."""
        if not self.expected.framed and self.kind != "drip":
            return self.kind in ("close", "half_close")
        return self.at >= len(self.expected.wire)

    def request(self, secret: str) -> bytes:
        body, length = self.body, {"Content-Length": str(len(self.body))}
        if self.chunked:
            body, length = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), {"Transfer-Encoding": "chunked"}
        fields = {
            "Host": "gateway",
            "Authorization": f"Bearer {secret}",
            "X-Request-Id": self.id,
            "X-Answer": self.answer,
            "X-Fault": f"{self.kind}@{self.at}",
            "Connection": "close",
            **length,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{self.method} {self.path or self.expected.path} HTTP/1.1\r\n{head}\r\n".encode() + body

    def check(self, reading: Reading) -> None:
        """The client got what the place of the fault calls for."""
        expected = self.expected
        assert reading.trouble == "", self
        assert reading.headers["x-request-id"] == self.id
        hinted = bool(expected.interim) and self.at >= expected.heads_bytes(1)
        assert tuple(reading.interim) == (expected.interim if hinted else ()), self
        if self.at < expected.head_bytes:
            status, code = (504, "upstream_timeout") if self.kind == "stall" else (502, "upstream_broke")
            refused(reading, status, code)
            return
        assert reading.status == expected.status, self
        assert expected.body.startswith(reading.body), self
        assert reading.complete == self.whole, self
        assert reading.body == expected.body[: self.at - expected.head_bytes] or expected.framed, self
        assert reading.body == expected.body or self.at < len(expected.wire), self


def refused(reading: Reading, status: int, code: str) -> None:
    """A whole answer of the gateway's own."""
    assert (reading.status, reading.complete, reading.trouble) == (status, True, "")
    assert f'"{code}"'.encode() in reading.body


def due(cases: Iterable[Case]) -> dict[str, tuple[str, str, int]]:
    """Outcome, basis and micro-credits of each case that costs anything, by its id: the outcome table."""
    table: dict[str, tuple[str, str, int]] = {}
    for case in cases:
        outcome = case.outcome
        if outcome is not Outcome.UPSTREAM_REFUSED:
            counted = case.answer == "events" and case.at >= COUNTED_BYTES
            exact = counted or outcome is Outcome.COMPLETE
            table[case.id] = (outcome.value, "exact" if exact else "under_estimate", CREDIT)
    return table


def every_byte(kind: str, stride: int = 1) -> list[Case]:
    """Every offset within the answers; or every `stride`th, and those around the turning points of each."""
    return [
        Case(name, kind, at)
        for name, answer in ANSWERS.items()
        for at in range(len(answer.wire))
        if at % stride == 0 or min(abs(at - answer.head_bytes), len(answer.wire) - at) <= 1
    ]

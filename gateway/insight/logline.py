"""The access log as it is read back. What each field says stands at `telemetry.Record`."""

import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from io import BufferedReader
from typing import BinaryIO, Literal, cast

import msgspec

from gateway.types import Outcome

#: A line has a path, at most, of the head's bound, and a few hundred bytes more.
LINE_BYTES_MAX = 1 << 20
#: Of the lines that are none, so many are named; all are counted.
NAMED_MAX = 20
STDIN = "-"
_GZIP = b"\x1f\x8b"


class Judged(msgspec.Struct):
    """One limit of a line."""

    name: str
    cost: int
    used: int
    limit: int
    subject: str = ""
    shadow: bool = False
    warned: bool = False
    #: 0: it fitted.
    retry_ms: int = 0
    actual: int | None = None
    #: Not 0: the denial was remembered, and this is when Redis had judged it.
    denied_at_us: int = 0


class Line(msgspec.Struct):
    """One request. None: the line does not say."""

    event: Literal["request"]
    request_id: str
    method: str
    path: str
    client_ip: str
    at: datetime
    decision: str
    status: int = 0
    hold_id: str | None = None
    route: str | None = None
    org: str | None = None
    user: str | None = None
    key: str | None = None
    plan: str | None = None
    policy: str | None = None
    identity: str | None = None
    session: str | None = None
    turn: int | None = None
    session_known: bool | None = None
    headers: dict[str, str] = {}
    claims: dict[str, str] = {}
    overrides: dict[str, int] = {}
    model: str | None = None
    requested_model: str | None = None
    stream: bool | None = None
    body_bytes: int | None = None
    max_output_tokens: int | None = None
    outcome: Outcome | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    charged_ucredits: int | None = None
    basis: str | None = None
    held_ucredits: int | None = None
    available_ucredits: int | None = None
    limit: str | None = None
    limits: list[Judged] = []
    judged_at_us: int | None = None
    settled_at_us: int | None = None
    shared_judged_at_us: int | None = None
    shared_settled_at_us: int | None = None
    response_bytes: int = 0
    messages_in: int | None = None
    messages_out: int | None = None
    close_code: int | None = None
    closed_for: str | None = None
    error: str | None = None
    ms: dict[str, float] = {}

    @property
    def admitted(self) -> bool:
        """It went to the upstream, or was about to."""
        return self.hold_id is not None

    @property
    def asked_model(self) -> str | None:
        """The model that the request named; only of one whose body was read (`stream` is not None)."""
        return self.model if self.requested_model is None else self.requested_model or None

    @property
    def ended_at_us(self) -> int:
        """By the gateway's clock."""
        return int(self.at.timestamp() * 1_000_000)

    @property
    def begun_at_us(self) -> int:
        """By the gateway's clock: when the head had been read."""
        return self.ended_at_us - int(self.ms.get("total", 0) * 1000)


class _Kind(msgspec.Struct):
    """What tells an access line from the gateway's other events, which may share a stream with it."""

    event: str


@dataclass(slots=True)
class Reading:
    """How reading went."""

    #: Lines that are requests.
    requests: int = 0
    #: Events of the gateway that are no requests.
    others: int = 0
    bad: int = 0
    #: `file:line: why`, of the first NAMED_MAX.
    named: list[str] = field(default_factory=list)

    def note_bad(self, place: str, why: str) -> None:
        self.bad += 1
        if len(self.named) < NAMED_MAX:
            self.named.append(f"{place}: {why}")


_line = msgspec.json.Decoder(Line)
_kind = msgspec.json.Decoder(_Kind)


def decode(text: bytes) -> Line:
    """`text`, which `read` has given, as a Line."""
    return _line.decode(text)


def read(paths: Iterable[str], reading: Reading) -> Iterator[tuple[bytes, Line]]:
    """Every request in these files, in their order; `-` is standard input. What is no line is noted, never fatal.

    Raises OSError for a file that cannot be opened.
    """
    for path in paths:
        with nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as file:
            for number, text in enumerate(_lines(file, path, reading), 1):
                line = _decoded(text, f"{path}:{number}", reading) if text.strip() else None
                if line is not None:
                    yield text, line


def _decoded(text: bytes, place: str, reading: Reading) -> Line | None:
    try:
        line = _line.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as exc:
        if _is_other_event(text):
            reading.others += 1
        elif len(text) >= LINE_BYTES_MAX:
            reading.note_bad(place, f"longer than {LINE_BYTES_MAX} bytes")
        else:
            reading.note_bad(place, str(exc) if isinstance(exc, msgspec.ValidationError) else "is no JSON object")
        return None
    reading.requests += 1
    return line


def _is_other_event(text: bytes) -> bool:
    try:
        return _kind.decode(text).event != "request"
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False


def _lines(file: BinaryIO, path: str, reading: Reading) -> Iterator[bytes]:
    """Each line, cut at LINE_BYTES_MAX."""
    number = 0
    try:
        stream = _unpacked(file)
        while text := stream.readline(LINE_BYTES_MAX):
            number += 1
            yield text
            while len(text) == LINE_BYTES_MAX and not text.endswith(b"\n"):
                text = stream.readline(LINE_BYTES_MAX)
    except (OSError, EOFError, zlib.error) as exc:
        reading.note_bad(f"{path}:{number + 1}", f"cannot be read on from here: {exc}")


def _unpacked(file: BinaryIO) -> BinaryIO:
    if isinstance(file, BufferedReader) and file.peek(2)[:2] == _GZIP:
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return file

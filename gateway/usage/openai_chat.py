"""OpenAI chat completions, plain and streamed, and everything that answers in the same shape.

Request side: the bound on what can be generated. Answer side: `usage`, taken from where the format puts it; text is
counted on the way, for answers that end before they report anything. Nothing here changes a byte.
"""

import re
from dataclasses import replace

import msgspec

from gateway.errors import BadRequest
from gateway.types import Peek, Usage
from gateway.usage.coding import Decoder, decoder
from gateway.usage.common import Progress, Reader
from gateway.usage.members import Edit, edited, members
from gateway.usage.sse import EventSplitter

#: A plain answer up to this size is read as a whole; of a larger one the last TAIL_BYTES are looked at.
BODY_BYTES_MAX = 1 << 20
TAIL_BYTES = 1 << 16

#: Bounds on what a client may ask for. No model comes near; the products stay exact in Redis (2^53).
OUTPUT_TOKENS_MAX = (1 << 31) - 1
CHOICES_MAX = 1024
MODEL_CHARS_MAX = 256

#: A reported count above this is not believed.
_REPORTED_TOKENS_MAX = 1 << 40

#: Members that bound the output; an upstream may obey any of them.
_MAXIMA = frozenset(("max_tokens", "max_completion_tokens", "max_output_tokens"))
_MAXIMUM = b"max_completion_tokens"

_DELTA = b'"delta":{"content":"'
# Every member that carries generated text; the string may be cut off by the end of what arrived. Possessive, so that
# no input makes it backtrack.
_TEXT = re.compile(
    rb'"(?:content|reasoning_content|reasoning|refusal|arguments|text)"\s*+:\s*+"((?:[^"\\]|\\.)*+)', re.DOTALL
)


class _Request(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    max_output_tokens: int | float | None = None
    n: int | float | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    total_tokens: int | float | None = None


class _Answer(msgspec.Struct):
    """A plain answer or one event of a stream: what metering reads of it; the rest is skipped unparsed."""

    usage: _Counts | None = None
    model: str | None = None
    choices: list[msgspec.Raw] | None = None


# What decoding raises besides its own errors: bytes that are not UTF-8 in a string we keep, and nesting without end.
_NOT_JSON = (msgspec.MsgspecError, UnicodeError, RecursionError)

_request = msgspec.json.Decoder(_Request)
_answer = msgspec.json.Decoder(_Answer)
_string = msgspec.json.Decoder(str)
_number = msgspec.json.Decoder(float | int | None)


def peek(body: bytes) -> Peek:
    """What `body` asks for. `max_output_tokens` is the largest of the three max fields times `n`.

    All three count, because the upstream may obey any of them; zero names no maximum. Raises BadRequest when the body
    is not a JSON object or one of the fields that matter is not of its type and range; the message names the field.
    """
    try:
        request = _request.decode(body)
    except msgspec.ValidationError as exc:
        raise BadRequest(f"The request body is not valid: {exc}.") from exc
    except _NOT_JSON as exc:
        raise BadRequest("The request body is not valid JSON.") from exc
    if request.model is not None and len(request.model) > MODEL_CHARS_MAX:
        raise BadRequest(f"`model` must have at most {MODEL_CHARS_MAX} characters.")
    largest = max(
        _whole(request.max_tokens, "max_tokens", 0, OUTPUT_TOKENS_MAX) or 0,
        _whole(request.max_completion_tokens, "max_completion_tokens", 0, OUTPUT_TOKENS_MAX) or 0,
        _whole(request.max_output_tokens, "max_output_tokens", 0, OUTPUT_TOKENS_MAX) or 0,
    )
    choices = _whole(request.n, "n", 1, CHOICES_MAX) or 1
    return Peek(len(body), request.model, request.stream is True, largest * choices or None)


def reader(content_type: str, content_encoding: str) -> Reader | None:
    """The reader for an answer with these field values; None when it is neither JSON nor an event stream, or coded
    in a way we cannot undo."""
    media_type = content_type.partition(";")[0].strip().lower()
    coding = decoder(content_encoding)
    if coding is None:
        return None
    if media_type == "text/event-stream":
        return StreamReader(coding)
    if media_type == "application/json" or media_type.endswith("+json"):
        return BodyReader(coding)
    return None


def capped(body: bytes, output_tokens: int) -> tuple[bytes, int] | None:
    """`body` with a maximum for each choice, all of them together at most `output_tokens`; see `Format.capped`.

    Each member that allows more is changed where it stands; every other byte stays. Where none names a maximum, the
    one that OpenAI's API takes for all of its models is put in front.
    """
    named = [member for member in members(body) if member.name in _MAXIMA]
    most = max(1, output_tokens // (_whole(_request.decode(body).n, "n", 1, CHOICES_MAX) or 1))
    wanted = b"%d" % most
    allowed = [_maximum(member.value) for member in named]
    edits = [
        Edit(member.start, member.end, wanted)
        for member, tokens in zip(named, allowed, strict=True)
        if tokens is not None and tokens > most
    ]
    if not any(allowed):
        # `null` and zero stand for no maximum.
        if named:
            edits = [Edit(member.start, member.end, wanted) for member in named]
        else:
            start = body.index(b"{") + 1
            comma = b"" if body[start:].lstrip().startswith(b"}") else b","
            edits = [Edit(start, start, b'"%b":%b%b' % (_MAXIMUM, wanted, comma))]
    return (edited(body, edits), most) if edits else None


class StreamReader:
    """A streamed answer. State: the last usage seen and whether it was the final one, and the text counted so far."""

    __slots__ = ("_coding", "_done", "_dropped", "_events", "_text_bytes", "_usage")

    def __init__(self, coding: Decoder) -> None:
        self._coding = coding
        self._events = EventSplitter()
        self._dropped = 0
        self._usage: Usage | None = None
        self._done = False
        self._text_bytes = 0

    def feed(self, chunk: bytes) -> None:
        events = self._events
        for data in events.feed(self._coding.decode(chunk)):
            # Only an event that reports is parsed; the others cost three searches.
            if b'"usage"' in data and b'"usage":null' not in data:
                self._usage = _usage_of(data) or self._usage
            elif data == b"[DONE]":
                self._done = True
            self._text_bytes += text_bytes(data)
        if events.dropped != self._dropped:
            # The dropped event may have been the one that reported: what was known before it may be out of date.
            self._dropped = events.dropped
            self._usage = None

    def finish(self) -> Usage | None:
        usage = self._usage
        pending = self._events.pending()
        if pending is not None and b'"usage"' in pending:
            usage = _usage_of(pending) or usage
        return replace(usage, exact=True) if usage is not None and self._done else usage

    def delivered_bytes(self) -> int | None:
        if self._dropped:
            return None
        pending = self._events.pending()
        return self._text_bytes + (text_bytes(pending) if pending else 0)

    def progress(self) -> Progress:
        return Progress(self._usage, self._text_bytes, self._done)


class BodyReader:
    """A plain JSON answer. State: its text so far, or the tail of it once it is too much."""

    __slots__ = ("_coding", "_text", "_whole")

    def __init__(self, coding: Decoder) -> None:
        self._coding = coding
        self._text = bytearray()
        self._whole = True  # False: the beginning was let go

    def feed(self, chunk: bytes) -> None:
        self._text += self._coding.decode(chunk)
        if len(self._text) > BODY_BYTES_MAX:
            self._whole = False
            del self._text[:-TAIL_BYTES]

    def finish(self) -> Usage | None:
        text = bytes(self._text)
        if not self._whole:
            return _usage_of_tail(text)
        return _usage_of(text, exact=True)  # when it parses, all of it is here

    def delivered_bytes(self) -> int | None:
        return text_bytes(bytes(self._text)) if self._whole else None

    def progress(self) -> None:
        return None


def text_bytes(document: bytes) -> int:
    """UTF-8 bytes of generated text in `document`, a JSON text that may be cut off at its end.

    The common event carries one plain string and is served by a few searches; escapes, tool calls, reasoning and
    spaced JSON go through the pattern. A member of the same name elsewhere counts too: rather over than under.
    """
    start = document.find(_DELTA) + len(_DELTA)
    if start >= len(_DELTA):
        end = document.find(b'"', start)
        # No escape in it, and no string of another member after it.
        if end > start and document.find(b"\\", start, end) < 0 and document.find(b'":"', end) < 0:
            return end - start
    return sum(map(_decoded_bytes, _TEXT.findall(document)))


def _decoded_bytes(escaped: bytes) -> int:
    if b"\\" not in escaped:
        return len(escaped)
    try:
        return len(_string.decode(b'"%b"' % escaped).encode())
    except _NOT_JSON:
        return len(escaped)  # cut inside an escape


def _usage_of(document: bytes, *, exact: bool | None = None) -> Usage | None:
    """The usage one JSON document reports. exact: None says so when no choice stands beside it, as in OpenAI's final
    event."""
    try:
        answer = _answer.decode(document)
    except _NOT_JSON:
        return None
    counts = answer.usage
    if counts is None or (counts.prompt_tokens is None and counts.completion_tokens is None):
        return None
    reported = (counts.prompt_tokens or 0, counts.completion_tokens or 0, counts.total_tokens or 0)
    if min(reported) < 0 or max(reported) > _REPORTED_TOKENS_MAX:
        return None
    prompt, completion, total = map(int, reported)
    if (prompt, completion, total) != reported:
        return None
    # Some models bill reasoning that `completion_tokens` leaves out; the total has it.
    exact = not answer.choices if exact is None else exact
    return Usage(prompt, max(completion, total - prompt), exact, answer.model)


def _usage_of_tail(tail: bytes) -> Usage | None:
    """The usage in the last bytes of an answer, if it can only be the top-level one.

    From the last `"usage"` member on, the text must complete exactly one opened object: then the brace that closes it
    is the answer's last, hence the top-level object's. That holds for an answer that came to its end, so the caller
    who knows says whether it is exact.
    """
    start = tail.rfind(b'"usage"')
    return None if start < 0 else _usage_of(b"{" + tail[start:], exact=False)


def _maximum(value: bytes) -> int | None:
    """The tokens that a member allows; None for `null`."""
    number = _number.decode(value)
    return None if number is None else int(number)


def _whole(value: int | float | None, field: str, least: int, most: int) -> int | None:
    """`value` as an int. JSON knows one kind of number, so `100.0` is as good as `100`."""
    if value is None:
        return None
    if not least <= value <= most or value != int(value):
        raise BadRequest(f"`{field}` must be a whole number from {least} to {most}.")
    return int(value)

"""The one exchange that every row repeats, byte for byte: a chat completion as SDKs send it, and its answer.

A request that asks for a stream says itself how many events it wants and how far apart (`events`, `gap_ms`). Each event
carries the monotonic time at which the upstream wrote it, which processes of one machine share, so whoever receives it
knows how long it was under way.
"""

import json
import re
from collections.abc import Iterator

PATH = "/v1/chat/completions"

_TEXT = "The gateway stands between a client and a model and forwards what they say to each other as it came. "


def request_body(events: int = 0, gap_ms: int = 0) -> bytes:
    """About 900 bytes of JSON. events: 0 asks for a plain answer."""
    messages = [{"role": "system", "content": _TEXT * 2}, {"role": "user", "content": _TEXT * 5}]
    body: dict[str, object] = {"model": "bench-small", "max_tokens": 64, "messages": messages}
    if events:
        body |= {"stream": True, "stream_options": {"include_usage": True}, "events": events, "gap_ms": gap_ms}
    return json.dumps(body, separators=(",", ":")).encode()


def asked_for(body: bytes) -> tuple[int, int]:
    """`events` and `gap_ms` of a request's body; (0, 0): a plain answer."""
    if b'"stream":true' not in body:
        return 0, 0
    request = json.loads(body)
    return request["events"], request["gap_ms"]


def request_fields(key: str) -> dict[str, str]:
    """The header fields beside Host and Content-Length."""
    return {
        "authorization": f"Bearer {key}",
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "gzip, deflate",
        "user-agent": "bench/1",
        "x-stainless-lang": "python",
    }


def answer() -> bytes:
    """About 1 KB on the wire, with usage."""
    body = json.dumps(
        {
            "id": "chatcmpl-bench",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "bench-small",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": _TEXT * 7}, "finish_reason": "stop"},
            ],
            "usage": {"prompt_tokens": 180, "completion_tokens": 64, "total_tokens": 244},
        },
        separators=(",", ":"),
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


#: Asks nginx, too, to pass each event on at once.
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT_END = b"\n\n"


def event(written_ns: int) -> bytes:
    """One token of a streamed answer, as an HTTP chunk whose id says when it was written. Always of one size."""
    return b"%b%019d%b" % (_EVENT_HEAD, written_ns, _EVENT_TAIL)


def written_ns(data: bytes) -> Iterator[int]:
    """When the events in `data` were written; one that was cut in two by a read is passed over."""
    return (int(found[1]) for found in _WRITTEN.finditer(data))


def last_events() -> bytes:
    """The usage, the end of the stream and of the message."""
    usage = {"prompt_tokens": 180, "completion_tokens": 64, "total_tokens": 244}
    done = b"data: [DONE]\n\n"
    last = _chunk({"id": "chatcmpl-bench", "choices": [], "usage": usage})
    return last + b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)


def _chunk(more: dict[str, object]) -> bytes:
    head = {"object": "chat.completion.chunk", "created": 1_700_000_000, "model": "bench-small"}
    data = b"data: %b\n\n" % json.dumps(head | more, separators=(",", ":")).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


_NO_TIME = "0" * 19
_CHOICE = {"index": 0, "delta": {"content": " gateway"}, "finish_reason": None}
_EVENT_HEAD, _, _EVENT_TAIL = _chunk({"id": f"chatcmpl-{_NO_TIME}", "choices": [_CHOICE], "usage": None}).partition(
    _NO_TIME.encode()
)
_WRITTEN = re.compile(rb'"id":"chatcmpl-([0-9]{19})"')

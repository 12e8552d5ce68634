"""The one exchange that every row repeats, byte for byte: a chat completion as SDKs send it, and its answer."""

import json

PATH = "/v1/chat/completions"

_TEXT = "The gateway stands between a client and a model and forwards what they say to each other as it came. "


def request_body(*, stream: bool) -> bytes:
    """About 900 bytes of JSON."""
    messages = [{"role": "system", "content": _TEXT * 2}, {"role": "user", "content": _TEXT * 5}]
    body: dict[str, object] = {"model": "bench-small", "max_tokens": 64, "messages": messages}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body, separators=(",", ":")).encode()


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


def event() -> bytes:
    """One token of a streamed answer, as an HTTP chunk."""
    return _chunk({"choices": [{"index": 0, "delta": {"content": " gateway"}, "finish_reason": None}], "usage": None})


def last_events() -> bytes:
    """The usage, the end of the stream and of the message."""
    usage = {"prompt_tokens": 180, "completion_tokens": 64, "total_tokens": 244}
    done = b"data: [DONE]\n\n"
    return _chunk({"choices": [], "usage": usage}) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done)


def _chunk(more: dict[str, object]) -> bytes:
    head = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "bench-small"}
    data = b"data: %b\n\n" % json.dumps(head | more, separators=(",", ":")).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)

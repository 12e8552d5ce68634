"""What the demo AI router answers: requests read, replies composed, replies written in each API's shape. No I/O.

Deliberately shares nothing with the gateway's own readers and dialects: tests use it to check them. A reply depends
on the request alone, and so does its token count (four tokens for three words), so every test can compute it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

CHOICES_MAX = 8
REPLY_WORDS_MAX = 100_000
_QUOTED_WORDS_MAX = 40

Json = dict[str, Any]


class InvalidRequest(Exception):
    """The body is not a request of this API."""


class Part(msgspec.Struct):
    type: str
    text: str = ""


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content if part.type == "text")
        return self.content or ""


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


Messages = Annotated[list[Message], msgspec.Meta(min_length=1)]
Maximum = Annotated[int, msgspec.Meta(ge=1)]


class ChatCompletionRequest(msgspec.Struct):
    """OpenAI's POST /v1/chat/completions; members not named here are accepted and ignored."""

    model: str
    messages: Messages
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Maximum | None = None
    max_completion_tokens: Maximum | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None = 1


class MessagesRequest(msgspec.Struct):
    """Anthropic's POST /v1/messages."""

    model: str
    messages: Messages
    max_tokens: Maximum
    system: str | list[Part] | None = None
    stream: bool | None = False


_Request = TypeVar("_Request", ChatCompletionRequest, MessagesRequest)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One server-sent event, and how many words of the reply it carries."""

    data: bytes
    words: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer before it takes the shape of an API."""

    digest: str
    model: str
    words: tuple[str, ...]
    input_tokens: int
    #: Of one choice.
    output_tokens: int
    truncated: bool
    choices: int = 1

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def pieces(self) -> Iterator[str]:
        """The text in pieces of one word that put together give it back."""
        for index, word in enumerate(self.words):
            yield word if index == 0 else f" {word}"


def tokens_of(words: int) -> int:
    """Tokens of so many words: four for three, rounded up."""
    return -(-words * 4 // 3)


def read_chat_completion(body: bytes) -> ChatCompletionRequest:
    """Raises InvalidRequest with a message for the client."""
    return _read(body, ChatCompletionRequest)


def read_messages(body: bytes) -> MessagesRequest:
    """Raises InvalidRequest with a message for the client."""
    return _read(body, MessagesRequest)


def compose(request: ChatCompletionRequest | MessagesRequest, reply_words: int | None) -> Reply:
    """The reply to `request`: it quotes the last user message and counts its words, cut at the client's maximum.

    reply_words: the wanted length of the reply instead of its natural one.
    """
    if isinstance(request, MessagesRequest):
        texts = [Message("system", request.system).text] + [message.text for message in request.messages]
        maximum, choices = request.max_tokens, 1
    else:
        texts = [message.text for message in request.messages]
        maximum = request.max_completion_tokens or request.max_tokens or 0
        choices = request.n or 1
    question = next((message.text for message in reversed(request.messages) if message.role == "user"), "").split()
    quoted = " ".join(question[:_QUOTED_WORDS_MAX])
    words = f'You said: "{quoted}" That is {len(question)} words.'.split()
    if reply_words is not None:
        words = [words[index % len(words)] for index in range(min(reply_words, REPLY_WORDS_MAX))]
    output_tokens = tokens_of(len(words))
    truncated = 0 < maximum < output_tokens
    if truncated:
        words = words[: max(1, maximum * 3 // 4)]
        output_tokens = min(maximum, tokens_of(len(words)))
    prompt = "\0".join([request.model, *texts])
    return Reply(
        digest=hashlib.sha256(prompt.encode()).hexdigest()[:24],
        model=request.model,
        words=tuple(words),
        input_tokens=tokens_of(sum(len(text.split()) for text in texts)),
        output_tokens=output_tokens,
        truncated=truncated,
        choices=choices,
    )


def chat_completion(reply: Reply, created_s: int) -> Json:
    """OpenAI's `chat.completion` object."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _finish_reason(reply),
        }
        for index in range(reply.choices)
    ]
    return _completion_head(reply, "chat.completion", created_s) | {"choices": choices, "usage": _openai_usage(reply)}


def chat_completion_chunks(reply: Reply, created_s: int, include_usage: bool) -> Iterator[Chunk]:
    """OpenAI's stream: role, one word per chunk, the finish reason, the usage if asked for, `[DONE]`."""
    head = _completion_head(reply, "chat.completion.chunk", created_s)
    tail: Json = {"usage": None} if include_usage else {}

    def chunk(delta: Json, words: int = 0, finish_reason: str | None = None) -> Iterator[Chunk]:
        for index in range(reply.choices):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            yield Chunk(_data(head | {"choices": [choice]} | tail), words)

    yield from chunk({"role": "assistant", "content": "", "refusal": None})
    for piece in reply.pieces():
        yield from chunk({"content": piece}, words=1)
    yield from chunk({}, finish_reason=_finish_reason(reply))
    if include_usage:
        yield Chunk(_data(head | {"choices": [], "usage": _openai_usage(reply)}))
    yield Chunk(b"data: [DONE]\n\n")


def message(reply: Reply) -> Json:
    """Anthropic's `message` object."""
    return _message_head(reply) | {
        "content": [{"type": "text", "text": reply.text}],
        "stop_reason": _stop_reason(reply),
        "usage": {"input_tokens": reply.input_tokens, "output_tokens": reply.output_tokens},
    }


def message_events(reply: Reply) -> Iterator[Chunk]:
    """Anthropic's stream, one word per `content_block_delta`."""
    start = _message_head(reply) | {"usage": {"input_tokens": reply.input_tokens, "output_tokens": 1}}
    yield Chunk(_event("message_start", {"message": start}))
    yield Chunk(_event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}))
    yield Chunk(_event("ping", {}))
    for piece in reply.pieces():
        yield Chunk(_event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}}), 1)
    yield Chunk(_event("content_block_stop", {"index": 0}))
    delta = {"stop_reason": _stop_reason(reply), "stop_sequence": None}
    yield Chunk(_event("message_delta", {"delta": delta, "usage": {"output_tokens": reply.output_tokens}}))
    yield Chunk(_event("message_stop", {}))


def models() -> Json:
    """OpenAI's model list."""
    names = ("demo-small", "demo-large")
    return {"object": "list", "data": [{"id": n, "object": "model", "created": 0, "owned_by": "demo"} for n in names]}


def openai_error(status: int, text: str) -> Json:
    """OpenAI's error body."""
    kind, code = {
        401: ("invalid_request_error", "invalid_api_key"),
        429: ("rate_limit_error", "rate_limit_exceeded"),
    }.get(status, ("invalid_request_error", None) if status < 500 else ("server_error", None))
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def anthropic_error(status: int, text: str) -> Json:
    """Anthropic's error body."""
    kind = {
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": text}}


def _read(body: bytes, kind: type[_Request]) -> _Request:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"Invalid request: {exc}") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {exc}") from exc


def _completion_head(reply: Reply, kind: str, created_s: int) -> Json:
    return {
        "id": f"chatcmpl-{reply.digest}",
        "object": kind,
        "created": created_s,
        "model": reply.model,
        "system_fingerprint": "fp_demo",
    }


def _openai_usage(reply: Reply) -> Json:
    completion = reply.output_tokens * reply.choices
    return {
        "prompt_tokens": reply.input_tokens,
        "completion_tokens": completion,
        "total_tokens": reply.input_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _message_head(reply: Reply) -> Json:
    return {
        "id": f"msg_{reply.digest}",
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _finish_reason(reply: Reply) -> str:
    return "length" if reply.truncated else "stop"


def _stop_reason(reply: Reply) -> str:
    return "max_tokens" if reply.truncated else "end_turn"


def _data(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _event(kind: str, value: Json) -> bytes:
    return b"event: " + kind.encode() + b"\n" + _data({"type": kind} | value)

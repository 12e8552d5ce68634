"""Refusals as OpenAI's API words them, for its SDKs, the AI SDK and everything that imitates them.

The SDKs hand `error` to the application as `.body` and keep members they do not know, so our details and the request
id stand inside it. They read the request id from `x-request-id` and pick the exception by status alone.
"""

from gateway.dialects.common import Manner, Rendered, answer, encode, with_details
from gateway.types import Refusal

MANNER = Manner(b"application/json", family="openai")

#: `error.type` by status, where OpenAI has a word of its own. 502 and 504 blame the upstream, 500 and 503 ourselves.
_TYPES = {
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
    502: "api_error",
    504: "api_error",
}


def render(refusal: Refusal, request_id: str, now_s: float | None = None) -> Rendered:
    """The whole answer; see `common.Dialect.render`."""
    error = _error(refusal, request_id)
    return answer(MANNER, refusal, request_id, encode({"error": error}), now_s)


def stream_error(refusal: Refusal) -> bytes:
    """One SSE event: the SDKs raise APIError at it and stop reading, so no `[DONE]` follows."""
    return b"data: " + encode({"error": _error(refusal, None)}) + b"\n\n"


def _error(refusal: Refusal, request_id: str | None) -> dict[str, object]:
    fallback = "server_error" if refusal.status >= 500 else "invalid_request_error"
    members: dict[str, object] = {
        "message": refusal.message,
        "type": _TYPES.get(refusal.status, fallback),
        "param": refusal.details.get("param"),
        "code": refusal.code,
    }
    if request_id is not None:
        members["request_id"] = request_id
    return with_details(members, refusal)

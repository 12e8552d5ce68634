"""Refusals as Anthropic's API words them, for its SDKs and what imitates them.

The SDKs pick the exception by status, hand the whole document to the application as `.body`, take `.type` from
`error.type` and `.error_code` from `error.details.error_code`, and read the request's id from `request-id`. The AI SDK
insists on the `type` at the top. Our details stand beside the message, as they do for OpenAI's.
"""

from gateway.dialects.common import Manner, Rendered, answer, encode, with_details
from gateway.types import Refusal

#: Both names, for those who look for the same one on every route.
MANNER = Manner(b"application/json", family="anthropic", id_fields=(b"x-request-id", b"request-id"))

#: `error.type` by status, as Anthropic lists them. It has no 503; clients take `overloaded_error` for what it is, a
#: trouble of the moment. Whatever else is the client's is an invalid request, whatever else is ours an api_error.
_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def render(refusal: Refusal, request_id: str, now_s: float | None = None) -> Rendered:
    """The whole answer; see `common.Dialect.render`."""
    document = {"type": "error", "error": _error(refusal), "request_id": request_id}
    return answer(MANNER, refusal, request_id, encode(document), now_s)


def stream_error(refusal: Refusal) -> bytes:
    """One SSE event of the kind at which the SDKs raise and stop reading."""
    return b"event: error\ndata: " + encode({"type": "error", "error": _error(refusal)}) + b"\n\n"


def _error(refusal: Refusal) -> dict[str, object]:
    fallback = "api_error" if refusal.status >= 500 else "invalid_request_error"
    members: dict[str, object] = {
        "type": _TYPES.get(refusal.status, fallback),
        "message": refusal.message,
        "code": refusal.code,
        "details": {"error_code": refusal.code},
    }
    return with_details(members, refusal)

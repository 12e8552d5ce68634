"""Refusals as RFC 9457 problem details: the dialect of routes that name none.

`code` and the refusal's details are extension members. A limit gets the problem type that
draft-ietf-httpapi-ratelimit-headers-11 registers; everything else is `about:blank`: the status says it all.
"""

from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import quote
from uuid import UUID

from gateway.dialects.common import Manner, Rendered, answer, encode, with_details
from gateway.types import Refusal

MANNER = Manner(b"application/problem+json", family="problem")
QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"

_PHRASES: Mapping[int, str] = {status.value: status.phrase for status in HTTPStatus}


def render(refusal: Refusal, request_id: str, now_s: float | None = None) -> Rendered:
    """The whole answer; see `common.Dialect.render`."""
    violated = _violated_policies(refusal)
    problem: dict[str, object] = {
        "type": QUOTA_EXCEEDED if violated else "about:blank",
        # RFC 9457 §4.2.1: the title of about:blank is the phrase of the status.
        "title": "Quota exceeded" if violated else _PHRASES.get(refusal.status, "Refused"),
        "status": refusal.status,
        "detail": refusal.message,
        "instance": _urn(request_id),
        "code": refusal.code,
    }
    if violated:
        problem["violated-policies"] = violated
    document = with_details(problem, refusal)
    document.pop("violated_policies", None)  # said above, under the name the draft gives it
    return answer(MANNER, refusal, request_id, encode(document), now_s)


def stream_error(refusal: Refusal) -> bytes:
    """Nothing: a stream of unknown format has no place for a problem, so it just ends."""
    return b""


def _violated_policies(refusal: Refusal) -> list[object]:
    """The names of all limits that refused, as admission lists them under `violated_policies`."""
    names = refusal.details.get("violated_policies")
    return list(names) if refusal.status == 429 and isinstance(names, list | tuple) else []


def _urn(request_id: str) -> str:
    """The occurrence as a URI: `urn:uuid:` (RFC 9562 §4) for the ids we mint, another name for a trusted proxy's."""
    try:
        return f"urn:uuid:{UUID(request_id)}"
    except ValueError:
        return f"urn:request:{quote(request_id, safe='', errors='replace')}"

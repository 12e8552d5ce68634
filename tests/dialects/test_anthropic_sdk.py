"""What the real `anthropic` package makes of each refusal, over a socket: exception, contents, attempts, waits."""

import time
from datetime import UTC, datetime

import anthropic
import pytest

from gateway.dialects import DIALECTS, Rendered
from gateway.dialects.ratelimit import fields
from tests.dialects.cases import REFUSALS, REQUEST_ID
from tests.dialects.judged import NOW_S, RPM, TPM, judged
from tests.dialects.listening import listening

RETRIES = 2
DIALECT = DIALECTS["anthropic"]

#: Exception, `error.type` and attempts by case.
EXPECTED: dict[str, tuple[type[anthropic.APIStatusError], str, int]] = {
    "ambiguous_path": (anthropic.BadRequestError, "invalid_request_error", 1),
    "bad_request": (anthropic.BadRequestError, "invalid_request_error", 1),
    "bad_websocket_handshake": (anthropic.BadRequestError, "invalid_request_error", 1),
    "body_too_large": (anthropic.ContentTooLargeError, "request_too_large", 1),
    "credits_in_flight": (anthropic.RateLimitError, "rate_limit_error", 1 + RETRIES),
    "credits_unavailable": (anthropic.ServiceUnavailableError, "overloaded_error", 1 + RETRIES),
    "gateway_error": (anthropic.InternalServerError, "api_error", 1 + RETRIES),
    "idempotency_key_reused": (anthropic.UnprocessableEntityError, "invalid_request_error", 1),
    "insufficient_credits": (anthropic.PaymentRequiredError, "billing_error", 1),
    "invalid_api_key": (anthropic.AuthenticationError, "authentication_error", 1),
    "method_not_allowed": (anthropic.APIStatusError, "invalid_request_error", 1),
    "rate_limit_exceeded": (anthropic.RateLimitError, "rate_limit_error", 1 + RETRIES),
    "rate_limit_exceeded_for_long": (anthropic.RateLimitError, "rate_limit_error", 1),
    "request_exceeds_balance": (anthropic.PaymentRequiredError, "billing_error", 1),
    "request_exceeds_limit": (anthropic.BadRequestError, "invalid_request_error", 1),
    "request_finished": (anthropic.ConflictError, "conflict_error", 1),
    "request_in_progress": (anthropic.ConflictError, "conflict_error", 1 + RETRIES),
    "request_timeout": (anthropic.RequestTimeoutError, "invalid_request_error", 1 + RETRIES),
    "shutting_down": (anthropic.ServiceUnavailableError, "overloaded_error", 1 + RETRIES),
    "store_unavailable": (anthropic.ServiceUnavailableError, "overloaded_error", 1 + RETRIES),
    "too_many_failures": (anthropic.RateLimitError, "rate_limit_error", 1 + RETRIES),
    "unknown_model_price": (anthropic.PermissionDeniedError, "permission_error", 1),
    "unknown_plan": (anthropic.PermissionDeniedError, "permission_error", 1),
    "unknown_route": (anthropic.NotFoundError, "not_found_error", 1),
    "upstream_broke": (anthropic.InternalServerError, "api_error", 1 + RETRIES),
    "upstream_busy": (anthropic.ServiceUnavailableError, "overloaded_error", 1 + RETRIES),
    "upstream_timeout": (anthropic.GatewayTimeoutError, "timeout_error", 1 + RETRIES),
    "upstream_unreachable": (anthropic.InternalServerError, "api_error", 1 + RETRIES),
    "websocket_not_allowed": (anthropic.PermissionDeniedError, "permission_error", 1),
    "websocket_version": (anthropic.APIStatusError, "invalid_request_error", 1),
}
MESSAGE = (
    b'{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[],"stop_reason":"end_turn",'
    b'"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}'
)


@pytest.fixture
def naps_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the SDK wanted to sleep between its attempts."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="k", base_url=url, max_retries=RETRIES)


def refused(case: str) -> tuple[anthropic.APIStatusError, int]:
    """What the SDK raises, and how often it asked."""
    with listening(DIALECT.render(REFUSALS[case], REQUEST_ID, NOW_S)) as server, client(server.url) as sdk:
        with pytest.raises(anthropic.APIStatusError) as caught:
            sdk.messages.create(model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}])
        return caught.value, server.requests


def test_every_refusal_is_expected_of_the_sdk() -> None:
    assert set(EXPECTED) == set(REFUSALS)


@pytest.mark.parametrize("case", REFUSALS)
def test_the_sdk_understands(case: str, naps_s: list[float]) -> None:
    refusal = REFUSALS[case]
    kind, type_, attempts = EXPECTED[case]

    error, requests = refused(case)

    assert (type(error), error.type, requests) == (kind, type_, attempts)
    assert (error.status_code, error.error_code, error.request_id) == (refusal.status, refusal.code, REQUEST_ID)
    assert error.api_message == refusal.message
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error" and error.body["request_id"] == REQUEST_ID
    assert {name: error.body["error"][name] for name in refusal.details} == dict(refusal.details)


def test_the_sdk_waits_exactly_as_long_as_told(naps_s: list[float]) -> None:
    refused("rate_limit_exceeded")

    assert naps_s == [1.234] * RETRIES


def test_the_sdk_hands_on_what_is_left_of_the_limits(naps_s: list[float]) -> None:
    error, _ = refused("rate_limit_exceeded")

    said = error.response.headers
    assert said["anthropic-ratelimit-requests-remaining"] == "0"
    reset = datetime.fromisoformat(said["anthropic-ratelimit-requests-reset"])
    assert reset == datetime(2025, 11, 24, 16, 1, tzinfo=UTC)


def test_an_answer_tells_the_sdk_what_is_left_of_the_limits() -> None:
    states = judged(0)[2:4]
    head = (
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(MESSAGE)),
        *fields(states, "anthropic", NOW_S),
    )

    with listening(Rendered(200, head, MESSAGE)) as server, client(server.url) as sdk:
        answer = sdk.messages.with_raw_response.create(model="m", max_tokens=9, messages=[])

    said = {name: value for name, value in answer.headers.items() if name.startswith("anthropic-")}
    assert said == {
        "anthropic-ratelimit-tokens-limit": str(TPM.limit),
        "anthropic-ratelimit-tokens-remaining": "2000",
        "anthropic-ratelimit-tokens-reset": "2025-11-24T16:01:00Z",
    }
    assert RPM.name not in answer.headers["ratelimit"]


def test_the_sdk_raises_at_a_stream_error() -> None:
    begins = (
        b'event: message_start\ndata: {"type":"message_start","message":' + MESSAGE + b"}\n\nevent: ping\ndata: {}\n\n"
    )
    body = begins + DIALECT.stream_error(REFUSALS["insufficient_credits"])
    head = ((b"content-type", b"text/event-stream"), (b"content-length", b"%d" % len(body)))

    with (
        listening(Rendered(200, head, body)) as server,
        client(server.url) as sdk,
        sdk.messages.create(model="m", max_tokens=9, messages=[], stream=True) as stream,
    ):
        assert next(stream).type == "message_start"
        with pytest.raises(anthropic.APIStatusError) as caught:
            next(stream)

    assert (caught.value.type, caught.value.error_code) == ("billing_error", "insufficient_credits")
    assert caught.value.api_message == REFUSALS["insufficient_credits"].message

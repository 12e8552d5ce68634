"""What the real `openai` package makes of each refusal, over a socket: exception, contents, attempts, waits."""

import time

import openai
import pytest

from gateway.dialects import DIALECTS, Rendered
from gateway.dialects.ratelimit import fields
from tests.dialects.cases import REFUSALS, REQUEST_ID
from tests.dialects.judged import NOW_S, judged
from tests.dialects.listening import listening

RETRIES = 2
DIALECT = DIALECTS["openai"]
COMPLETION = b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[]}'

#: Exception and attempts by case.
EXPECTED: dict[str, tuple[type[openai.APIStatusError], int]] = {
    "ambiguous_path": (openai.BadRequestError, 1),
    "bad_request": (openai.BadRequestError, 1),
    "bad_websocket_handshake": (openai.BadRequestError, 1),
    "body_too_large": (openai.APIStatusError, 1),
    "credits_in_flight": (openai.RateLimitError, 1 + RETRIES),
    "credits_unavailable": (openai.InternalServerError, 1 + RETRIES),
    "gateway_error": (openai.InternalServerError, 1 + RETRIES),
    "idempotency_key_reused": (openai.UnprocessableEntityError, 1),
    "insufficient_credits": (openai.APIStatusError, 1),
    "invalid_api_key": (openai.AuthenticationError, 1),
    "method_not_allowed": (openai.APIStatusError, 1),
    "rate_limit_exceeded": (openai.RateLimitError, 1 + RETRIES),
    "rate_limit_exceeded_for_long": (openai.RateLimitError, 1),
    "request_exceeds_balance": (openai.APIStatusError, 1),
    "request_exceeds_limit": (openai.BadRequestError, 1),
    "request_finished": (openai.ConflictError, 1),
    "request_in_progress": (openai.ConflictError, 1 + RETRIES),
    "request_timeout": (openai.APIStatusError, 1 + RETRIES),
    "shutting_down": (openai.InternalServerError, 1 + RETRIES),
    "store_unavailable": (openai.InternalServerError, 1 + RETRIES),
    "too_many_failures": (openai.RateLimitError, 1 + RETRIES),
    "unknown_model_price": (openai.PermissionDeniedError, 1),
    "unknown_plan": (openai.PermissionDeniedError, 1),
    "unknown_route": (openai.NotFoundError, 1),
    "upstream_broke": (openai.InternalServerError, 1 + RETRIES),
    "upstream_busy": (openai.InternalServerError, 1 + RETRIES),
    "upstream_timeout": (openai.InternalServerError, 1 + RETRIES),
    "upstream_unreachable": (openai.InternalServerError, 1 + RETRIES),
    "websocket_not_allowed": (openai.PermissionDeniedError, 1),
    "websocket_version": (openai.APIStatusError, 1),
}


@pytest.fixture
def naps_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the SDK wanted to sleep between its attempts."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    return naps


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(api_key="k", base_url=f"{url}/v1", max_retries=RETRIES)


def refused(case: str) -> tuple[openai.APIStatusError, int]:
    """What the SDK raises, and how often it asked."""
    with listening(DIALECT.render(REFUSALS[case], REQUEST_ID, NOW_S)) as server, client(server.url) as sdk:
        with pytest.raises(openai.APIStatusError) as caught:
            sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        return caught.value, server.requests


def test_every_refusal_is_expected_of_the_sdk() -> None:
    assert set(EXPECTED) == set(REFUSALS)


@pytest.mark.parametrize("case", REFUSALS)
def test_the_sdk_understands(case: str, naps_s: list[float]) -> None:
    refusal = REFUSALS[case]

    error, requests = refused(case)

    assert (type(error), requests) == EXPECTED[case]
    assert (error.status_code, error.code, error.request_id) == (refusal.status, refusal.code, REQUEST_ID)
    assert error.message.endswith(refusal.message)
    assert isinstance(error.body, dict)
    assert error.body["request_id"] == REQUEST_ID and error.body["message"] == refusal.message
    assert {name: error.body[name] for name in refusal.details} == dict(refusal.details)


def test_the_sdk_waits_exactly_as_long_as_told(naps_s: list[float]) -> None:
    refused("rate_limit_exceeded")

    assert naps_s == [1.234] * RETRIES


def test_an_answer_tells_the_sdk_what_is_left_of_the_limits() -> None:
    head = (
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(COMPLETION)),
        *fields(judged(0), "openai", NOW_S),
    )

    with listening(Rendered(200, head, COMPLETION)) as server, client(server.url) as sdk:
        answer = sdk.chat.completions.with_raw_response.create(model="m", messages=[])

    assert answer.parse().id == "c"
    assert {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")} == {
        "x-ratelimit-limit-requests": "20",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "2s",
        "x-ratelimit-limit-tokens": "100000",
        "x-ratelimit-remaining-tokens": "1600",
        "x-ratelimit-reset-tokens": "58.999s",
    }


def test_the_sdk_raises_at_a_stream_error() -> None:
    chunk = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'
    body = chunk + DIALECT.stream_error(REFUSALS["insufficient_credits"])
    head = ((b"content-type", b"text/event-stream"), (b"content-length", b"%d" % len(body)))

    with (
        listening(Rendered(200, head, body)) as server,
        client(server.url) as sdk,
        sdk.chat.completions.create(model="m", messages=[], stream=True) as stream,
    ):
        assert next(stream).id == "c"
        with pytest.raises(openai.APIError) as caught:
            next(stream)

    assert caught.value.code == "insufficient_credits" and caught.value.type == "insufficient_quota"

"""What the real `openai` package makes of each refusal: the exception, what it carries, and whether it tries again."""

import time

import httpx
import openai
import pytest

from gateway.dialects import DIALECTS
from gateway.types import Refusal
from tests.dialects.cases import REFUSALS, REQUEST_ID

RETRIES = 2

#: Exception and attempts by case.
EXPECTED: dict[str, tuple[type[openai.APIStatusError], int]] = {
    "ambiguous_path": (openai.BadRequestError, 1),
    "bad_request": (openai.BadRequestError, 1),
    "bad_websocket_handshake": (openai.BadRequestError, 1),
    "body_too_large": (openai.APIStatusError, 1),
    "credits_in_flight": (openai.RateLimitError, 1 + RETRIES),
    "credits_unavailable": (openai.InternalServerError, 1 + RETRIES),
    "gateway_error": (openai.InternalServerError, 1 + RETRIES),
    "insufficient_credits": (openai.APIStatusError, 1),
    "invalid_api_key": (openai.AuthenticationError, 1),
    "method_not_allowed": (openai.APIStatusError, 1),
    "rate_limit_exceeded": (openai.RateLimitError, 1 + RETRIES),
    "rate_limit_exceeded_for_long": (openai.RateLimitError, 1),
    "request_exceeds_limit": (openai.BadRequestError, 1),
    "request_timeout": (openai.APIStatusError, 1 + RETRIES),
    "shutting_down": (openai.InternalServerError, 1 + RETRIES),
    "store_unavailable": (openai.InternalServerError, 1 + RETRIES),
    "unknown_plan": (openai.PermissionDeniedError, 1),
    "unknown_route": (openai.NotFoundError, 1),
    "upstream_broke": (openai.InternalServerError, 1 + RETRIES),
    "upstream_busy": (openai.InternalServerError, 1 + RETRIES),
    "upstream_timeout": (openai.InternalServerError, 1 + RETRIES),
    "upstream_unreachable": (openai.InternalServerError, 1 + RETRIES),
    "websocket_not_allowed": (openai.PermissionDeniedError, 1),
    "websocket_version": (openai.APIStatusError, 1),
}


class Server:
    """Refuses every request the same way; counts the requests and the naps between them."""

    def __init__(self, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refusal = refusal
        self.requests = 0
        self.naps_s: list[float] = []
        monkeypatch.setattr(time, "sleep", self.naps_s.append)

    def answer(self, _: httpx.Request) -> httpx.Response:
        self.requests += 1
        rendered = DIALECTS["openai"].render(self._refusal, REQUEST_ID)
        return httpx.Response(rendered.status, headers=list(rendered.headers), content=rendered.body)

    def call(self) -> openai.APIStatusError:
        with (
            httpx.Client(transport=httpx.MockTransport(self.answer)) as http,
            # The SDK also takes httpx clients, though its stubs name httpx2's.
            openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http, max_retries=RETRIES) as client,  # type: ignore[arg-type]
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        return caught.value


def test_every_refusal_is_expected_of_the_sdk() -> None:
    assert set(EXPECTED) == set(REFUSALS)


@pytest.mark.parametrize("case", REFUSALS)
def test_the_sdk_understands(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = REFUSALS[case]
    server = Server(refusal, monkeypatch)

    error = server.call()

    kind, attempts = EXPECTED[case]
    assert type(error) is kind and server.requests == attempts
    assert (error.status_code, error.code, error.request_id) == (refusal.status, refusal.code, REQUEST_ID)
    assert error.message.endswith(refusal.message)
    assert isinstance(error.body, dict)
    assert error.body["request_id"] == REQUEST_ID and error.body["message"] == refusal.message
    assert {name: error.body[name] for name in refusal.details} == dict(refusal.details)


def test_the_sdk_waits_exactly_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(REFUSALS["rate_limit_exceeded"], monkeypatch)

    server.call()

    assert server.naps_s == [1.234] * RETRIES


def test_the_sdk_raises_at_a_stream_error() -> None:
    event = DIALECTS["openai"].stream_error(REFUSALS["insufficient_credits"])
    chunk = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[]}\n\n'

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=chunk + event)

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http) as client,  # type: ignore[arg-type]
        client.chat.completions.create(model="m", messages=[], stream=True) as stream,
    ):
        assert next(stream).id == "c"
        with pytest.raises(openai.APIError) as caught:
            next(stream)

    assert caught.value.code == "insufficient_credits" and caught.value.type == "insufficient_quota"

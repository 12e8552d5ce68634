"""Each dialect says each refusal as its golden file has it; `cases.py` tells how to change one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import errors
from gateway.dialects import DIALECTS
from gateway.types import Refusal
from tests.dialects.cases import GOLDEN, REFUSALS, REQUEST_ID, path, wire
from tests.dialects.judged import NOW_S


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_worded_as_agreed(dialect: str, case: str) -> None:
    rendered = DIALECTS[dialect].render(REFUSALS[case], REQUEST_ID, NOW_S)

    assert wire(rendered) == path(dialect, case).read_bytes()


def test_no_golden_file_is_left_over() -> None:
    expected = {path(dialect, case) for dialect in DIALECTS for case in REFUSALS}

    assert set(GOLDEN.rglob("*.http")) == expected


def test_every_error_a_client_can_meet_has_a_golden_file() -> None:
    def below(kind: type[errors.GatewayError]) -> set[type[errors.GatewayError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    unanswered = {"config_error", "client_left"}
    codes = {kind.code for kind in below(errors.GatewayError) if kind.__module__ == errors.__name__}
    assert codes - unanswered <= {refusal.code for refusal in REFUSALS.values()}


def headers(dialect: str, refusal: Refusal) -> dict[bytes, bytes]:
    return dict(DIALECTS[dialect].render(refusal, REQUEST_ID).headers)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("wait_ms", "seconds", "exact_ms"),
    [(0, b"1", b"1"), (-5, b"1", b"1"), (1, b"1", b"1"), (1000, b"1", b"1000"), (1001, b"2", b"1001")],
)
def test_retry_after_is_rounded_up_and_never_zero(dialect: str, wait_ms: int, seconds: bytes, exact_ms: bytes) -> None:
    fields = headers(dialect, Refusal(429, "c", "m", wait_ms))

    assert (fields[b"retry-after"], fields[b"retry-after-ms"]) == (seconds, exact_ms)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_client_is_not_sent_to_sleep_for_more_than_a_minute(dialect: str) -> None:
    assert b"x-should-retry" not in headers(dialect, Refusal(429, "c", "m", 60_000))
    assert headers(dialect, Refusal(429, "c", "m", 60_000, True))[b"x-should-retry"] == b"true"
    assert headers(dialect, Refusal(429, "c", "m", 60_001, True))[b"x-should-retry"] == b"false"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_id_cannot_add_a_header(dialect: str) -> None:
    rendered = DIALECTS[dialect].render(Refusal(404, "c", "m"), "a\r\nset-cookie: b\u20ac\0")

    assert (b"x-request-id", b"aset-cookie: b?") in rendered.headers
    assert all(b"\r" not in value and b"\n" not in value for _, value in rendered.headers)


def test_details_never_replace_what_the_dialect_says() -> None:
    details = {"message": "x", "type": "x", "code": "x", "status": 200, "detail": "x", "title": "x", "request_id": "x"}
    refusal = Refusal(404, "unknown_route", "No.", details=details)

    error = json.loads(DIALECTS["openai"].render(refusal, REQUEST_ID).body)["error"]
    assert (error["message"], error["code"], error["request_id"]) == ("No.", "unknown_route", REQUEST_ID)
    problem = json.loads(DIALECTS["problem"].render(refusal, REQUEST_ID).body)
    assert (problem["status"], problem["title"], problem["detail"]) == (404, "Not Found", "No.")


def test_a_request_id_that_is_no_uuid_still_makes_a_uri() -> None:
    problem = json.loads(DIALECTS["problem"].render(Refusal(404, "c", "m"), "a b/é").body)

    assert problem["instance"] == "urn:request:a%20b%2F%C3%A9"


texts = st.text('a\u00e9\u20ac\U0001f600\ud800"\\\r\n\0', max_size=8)  # a lone surrogate and controls too
details = st.dictionaries(texts, texts | st.none() | st.integers() | st.lists(texts, max_size=2), max_size=3)


@given(st.sampled_from(sorted(DIALECTS)), texts, texts, details)
def test_any_refusal_renders(dialect: str, message: str, request_id: str, details: dict[str, object]) -> None:
    rendered = DIALECTS[dialect].render(Refusal(405, "c", message, details=details), request_id)

    json.loads(rendered.body)
    assert dict(rendered.headers)[b"content-length"] == b"%d" % len(rendered.body)


def test_the_stream_error_of_openai_is_one_event() -> None:
    event = DIALECTS["openai"].stream_error(Refusal(402, "insufficient_credits", "Gone.\n\nReally.", None, False))

    assert event.count(b"\n") == 2 and event.endswith(b"\n\n")
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {
            "message": "Gone.\n\nReally.",
            "type": "insufficient_quota",
            "param": None,
            "code": "insufficient_credits",
        }
    }


def test_a_problem_has_no_place_in_a_stream() -> None:
    assert DIALECTS["problem"].stream_error(REFUSALS["insufficient_credits"]) == b""

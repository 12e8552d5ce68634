"""Recorded answers are read alike however they arrive; what is not certain is unknown."""

import gzip
import json
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.types import Usage
from gateway.usage import READERS, Reader
from gateway.usage.openai_chat import BODY_BYTES_MAX, TAIL_BYTES, peek, text_bytes
from gateway.usage.sse import EVENT_BYTES_MAX

RECORDINGS = Path(__file__).parent / "recordings"
MODEL = "gpt-4o-mini"


def final(prompt: int, completion: int, model: str | None = MODEL) -> Usage:
    return Usage(prompt, completion, exact=True, model=model)


#: Recording: what it reported in the end, and the generated text in it.
EXPECTED: dict[str, tuple[Usage | None, str]] = {
    "include_usage.sse": (final(19, 11), 'Grüße aus 東京\nund "Kyōto"'),
    "without_usage.sse": (None, "Hello world"),
    "running_usage.sse": (final(7, 3), "one two three"),
    "usage_beside_the_last_choice.sse": (final(14, 3), "Bonjour."),
    "filter_results_and_crlf.sse": (final(5, 1), "Hi"),
    "reasoning.sse": (final(12, 28), "Let me think twice.42"),
    "tool_calls.sse": (final(31, 9), '{"usage": null}'),
    "escaped_and_spaced.sse": (final(8, 6), '日本he said "usage": {}'),
    "comments_and_split_data.sse": (final(3, 2), "Grüße"),
    "error_in_the_stream.sse": (None, "par"),
    "no_blank_line_at_the_end.sse": (final(2, 1), "x"),
    "plain.json": (final(9, 4), "Hello there."),
    "plain_indented.json": (final(9, 4), 'Usage first, "usage" within.'),
    "plain_without_usage.json": (None, "Free?"),
    "embeddings.json": (final(6, 0, "text-embedding-3-small"), ""),
    "error_with_status_200.json": (None, ""),
}


def bytes_of(recording: str) -> bytes:
    return (RECORDINGS / recording).read_bytes()


def reader_of(recording: str, content_encoding: str = "") -> Reader:
    return new("text/event-stream" if recording.endswith(".sse") else "application/json", content_encoding)


def new(content_type: str, content_encoding: str = "") -> Reader:
    reader = READERS["openai_chat"].reader(content_type, content_encoding)
    assert reader is not None
    return reader


def read(reader: Reader, *chunks: bytes) -> tuple[Usage | None, int | None]:
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish(), reader.delivered_bytes()


def expected(recording: str) -> tuple[Usage | None, int]:
    usage, text = EXPECTED[recording]
    return usage, len(text.encode())


def test_every_recording_is_expected_to_mean_something() -> None:
    assert {path.name for path in RECORDINGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("recording", EXPECTED)
def test_a_recording_means_the_same_cut_anywhere(recording: str) -> None:
    answer = bytes_of(recording)

    assert read(reader_of(recording), answer) == expected(recording)
    assert read(reader_of(recording), *(answer[i : i + 1] for i in range(len(answer)))) == expected(recording)
    for cut in range(len(answer)):
        assert read(reader_of(recording), answer[:cut], answer[cut:]) == expected(recording)


@pytest.mark.parametrize("recording", EXPECTED)
def test_a_gzipped_recording_means_the_same(recording: str) -> None:
    coded = gzip.compress(bytes_of(recording))

    assert read(reader_of(recording, "gzip"), coded) == expected(recording)
    assert read(reader_of(recording, "gzip"), *(coded[i : i + 7] for i in range(0, len(coded), 7))) == expected(
        recording
    )


@pytest.mark.parametrize("recording", [name for name in EXPECTED if name.endswith(".sse")])
def test_asking_in_mid_stream_changes_nothing(recording: str) -> None:
    reader = reader_of(recording)
    delivered = 0
    for byte in bytes_of(recording):
        reader.feed(bytes([byte]))
        reader.finish()
        so_far = reader.delivered_bytes()
        assert so_far is not None and so_far >= delivered - 6  # an escape that was cut counts by its raw length
        delivered = max(delivered, so_far)

    assert (reader.finish(), reader.delivered_bytes()) == expected(recording)


NOT_FOR_THE_SDK = {
    "no_blank_line_at_the_end.sse",  # it follows the standard and drops the last event, we do not
    "comments_and_split_data.sse",  # after an `id` field it takes every comment's blank line for an event, and fails
}


@pytest.mark.parametrize(
    "recording",
    [name for name, (usage, _) in EXPECTED.items() if usage and ".sse" in name and name not in NOT_FOR_THE_SDK],
)
def test_the_sdk_reads_the_same_usage(recording: str) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=bytes_of(recording))

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as http,
        # The SDK also takes httpx clients, though its stubs name httpx2's.
        openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http) as client,  # type: ignore[arg-type]
        client.chat.completions.create(model="m", messages=[], stream=True) as stream,
    ):
        reported = [chunk.usage for chunk in stream if chunk.usage][-1]

    usage = EXPECTED[recording][0]
    assert usage is not None
    assert (reported.prompt_tokens, reported.total_tokens) == (usage.input_tokens, usage.total_tokens)


# Streams that are not what they should be


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


REPORT = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}
RUNNING = {"choices": [{"delta": {"content": "abcdefghi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def test_a_running_report_is_not_final_until_done() -> None:
    reader = new("text/event-stream")
    reader.feed(event(RUNNING))
    assert reader.finish() == Usage(3, 1, exact=False)

    reader.feed(b"data: [DONE]\n\n")
    assert reader.finish() == Usage(3, 1, exact=True)


def test_a_dropped_event_makes_the_usage_before_it_unknown() -> None:
    reader = new("text/event-stream")
    assert read(reader, event(REPORT), b"data: " + b"x" * EVENT_BYTES_MAX + b"\n\n") == (None, None)

    reader.feed(event(REPORT))
    assert reader.finish() == Usage(3, 4)


@pytest.mark.parametrize(
    "usage",
    [
        {},
        [],
        "7",
        {"prompt_tokens": "3"},
        {"prompt_tokens": -3, "completion_tokens": 4},
        {"prompt_tokens": 3, "completion_tokens": 1.5},
        {"prompt_tokens": 3, "completion_tokens": 1e300},
        {"prompt_tokens": True},
        {"input_tokens": 3},
    ],
)
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_a_report_that_makes_no_sense_is_no_report(usage: object, content_type: str) -> None:
    document = {"choices": [], "usage": usage}
    body = event(document) if content_type == "text/event-stream" else json.dumps(document).encode()

    assert read(new(content_type), body)[0] is None


def test_whole_numbers_may_be_written_with_a_point() -> None:
    assert read(new("application/json"), b'{"usage":{"prompt_tokens":3.0,"completion_tokens":4e0}}')[0] == Usage(3, 4)


@pytest.mark.parametrize("body", [b'{"usage":' + b"[" * 100_000, b'{"x":' + b"[" * 100_000, b"\xff\xfe", b"", b"[]"])
def test_hostile_answers_are_unknown(body: bytes) -> None:
    assert read(new("application/json"), body)[0] is None
    assert read(new("text/event-stream"), b'data: "usage"' + body + b"\n\n")[0] is None


# Large plain answers


def large(after: bytes = b"", before: bytes = b"") -> bytes:
    return b'{"model":"m",' + before + b'"data":"' + b"d" * BODY_BYTES_MAX + b'",' + after


TAIL_USAGE = b'"usage":{"prompt_tokens":6,"total_tokens":6}'


@pytest.mark.parametrize("size_bytes", [4096, 1 << 22])
@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (large(TAIL_USAGE + b"}"), 6),
        (large(TAIL_USAGE + b' , "model" : "m" }\n'), 6),
        (large(b'"x":{' + TAIL_USAGE + b"}}"), None),
        (large(b'"x":[{' + TAIL_USAGE + b"}]}"), None),
        (large(b'"x":"\\"usage\\":{}"}'), None),
        (large(b'"x":1}', before=TAIL_USAGE + b","), None),
        (large(TAIL_USAGE), None),
    ],
)
def test_of_a_large_answer_only_a_certain_usage_counts(body: bytes, usage: int | None, size_bytes: int) -> None:
    reader = new("application/json")

    found, delivered = read(reader, *(body[i : i + size_bytes] for i in range(0, len(body), size_bytes)))

    assert (found and found.input_tokens, delivered) == (usage, None)
    assert found is None or not found.exact


def test_a_large_answer_is_not_kept() -> None:
    reader = new("application/json")
    for _ in range(3 * BODY_BYTES_MAX // 50_000):
        reader.feed(b"d" * 50_000)
        assert len(reader._text) <= BODY_BYTES_MAX  # type: ignore[attr-defined]  # the bound itself is what is tested

    assert TAIL_BYTES < BODY_BYTES_MAX


# Which answers are read


@pytest.mark.parametrize("content_type", ["Text/Event-Stream; charset=utf-8", "application/json", "application/x+json"])
def test_media_types_we_read(content_type: str) -> None:
    assert new(content_type).finish() is None


@pytest.mark.parametrize(
    ("content_type", "content_encoding"),
    [("text/plain", ""), ("", ""), ("application/json", "br"), ("text/event-stream", "zstd")],
)
def test_answers_we_cannot_read_have_no_reader(content_type: str, content_encoding: str) -> None:
    assert READERS["openai_chat"].reader(content_type, content_encoding) is None


# Counting text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.booleans(), st.booleans())
def test_text_is_counted_in_its_own_bytes_however_it_is_escaped(text: str, ascii_only: bool, spaced: bool) -> None:
    delta = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    document = json.dumps(delta, ensure_ascii=ascii_only, separators=None if spaced else (",", ":"))

    assert text_bytes(document.encode()) == len(text.encode())


def test_text_beside_other_text_is_counted_too() -> None:
    document = b'{"choices":[{"delta":{"content":"abc","reasoning":"de"}},{"delta":{"content":"f"}}]}'

    assert text_bytes(document) == 6


# The request


@pytest.mark.parametrize(
    ("body", "largest"),
    [
        ({}, None),
        ({"max_tokens": None, "n": None}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 1, "max_completion_tokens": 10_000}, 10_000),
        ({"max_tokens": 50, "max_output_tokens": 7}, 50),
        ({"max_completion_tokens": 10, "n": 3}, 30),
        ({"n": 3}, None),
        ({"max_tokens": 100.0}, 100),
    ],
)
def test_the_largest_maximum_times_n_is_what_may_be_generated(body: dict[str, object], largest: int | None) -> None:
    assert peek(json.dumps(body).encode()).max_output_tokens == largest


def test_peek_says_what_is_asked_for() -> None:
    body = b'{"model":"m","stream":true,"messages":[{"role":"user","content":[{"type":"text"}]}],"max_tokens":5}'
    seen = peek(body)

    assert (seen.body_bytes, seen.model, seen.stream, seen.max_output_tokens) == (len(body), "m", True, 5)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n"])
@pytest.mark.parametrize("value", [-1, 1.5, 10**30, 1e300, "5", True, [], {}])
def test_a_bad_number_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    with pytest.raises(BadRequest, match=field):
        peek(json.dumps({field: value}).encode())


@pytest.mark.parametrize(("field", "value"), [("n", 0), ("model", 5), ("model", "m" * 300), ("stream", "yes")])
def test_another_bad_field_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(BadRequest, match=field):
        peek(json.dumps({field: value}).encode())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"n":1} x', b'{"x":' + b"[" * 100_000, b'{"model":"\xff"}', b'{"model":"\\ud800"}'],
)
def test_a_body_that_is_no_json_object_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        peek(body)


@given(st.binary(max_size=60) | st.text('{}[]":,\\umaxn_tokens019.e-', max_size=60).map(str.encode))
def test_no_body_breaks_the_peek(body: bytes) -> None:
    try:
        assert peek(body).body_bytes == len(body)
    except BadRequest:
        pass

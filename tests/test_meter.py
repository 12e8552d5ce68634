"""The meter watches; it changes nothing, breaks nothing, and says only what it knows."""

import pytest

from gateway.meter import Meter, SoFar, unanswered
from gateway.types import Peek, Usage
from gateway.usage import READERS, Progress, Reader

PEEK = Peek(body_bytes=41, model="asked")


def reader(content_type: str = "text/event-stream", content_encoding: str = "") -> Reader | None:
    return READERS["openai_chat"].reader(content_type, content_encoding)


def seen(meter: Meter, *chunks: bytes) -> Meter:
    for chunk in chunks:
        meter.see(chunk)
    return meter


TEXT = b'data: {"model":"m","choices":[{"delta":{"content":"abcdefghi"}}]}\n\n'
RUNNING = (
    b'data: {"model":"m","choices":[{"delta":{"content":"ab"}}],"usage":{"prompt_tokens":8,"completion_tokens":1}}\n\n'
)
REPORT = b'data: {"model":"m","choices":[],"usage":{"prompt_tokens":8,"completion_tokens":3}}\n\n'


class Broken:
    """A reader with a bug."""

    def feed(self, chunk: bytes) -> None:
        raise ZeroDivisionError

    def finish(self) -> Usage | None:
        raise ZeroDivisionError

    def delivered_bytes(self) -> int | None:
        raise ZeroDivisionError

    def progress(self) -> Progress | None:
        raise ZeroDivisionError


class BrokenLate(Broken):
    def feed(self, chunk: bytes) -> None:
        pass


def test_a_complete_answer_with_a_report_is_exact() -> None:
    assert seen(Meter(reader(), PEEK, 200), TEXT, REPORT).usage(complete=True) == Usage(8, 3, model="m")


def test_a_complete_answer_makes_its_last_running_report_exact() -> None:
    assert seen(Meter(reader(), PEEK, 200), RUNNING).usage(complete=True) == Usage(8, 1, model="m")


def test_a_complete_answer_without_a_report_is_unknown() -> None:
    assert seen(Meter(reader(), PEEK, 200), TEXT).usage(complete=True) is None


def test_a_broken_answer_is_estimated_from_what_was_delivered() -> None:
    meter = seen(Meter(reader(), PEEK, 200), TEXT, TEXT[:30])

    # 41 bytes asked and 9 delivered, at four to a token, rounded up.
    assert meter.usage(complete=False) == Usage(11, 3, exact=False, model="asked")


def test_text_delivered_after_a_running_report_is_not_given_away() -> None:
    meter = seen(Meter(reader(), PEEK, 200), RUNNING, TEXT, TEXT)

    assert meter.usage(complete=False) == Usage(8, 5, exact=False, model="m")


def test_a_client_that_leaves_after_the_final_report_is_known_exactly() -> None:
    assert seen(Meter(reader(), PEEK, 200), TEXT, REPORT).usage(complete=False) == Usage(8, 3, model="m")


def test_a_broken_plain_answer_is_estimated_too() -> None:
    meter = seen(Meter(reader("application/json"), PEEK, 200), b'{"choices":[{"message":{"content":"abcde')

    assert meter.usage(complete=False) == Usage(11, 2, exact=False, model="asked")


def test_a_broken_answer_of_which_part_went_unread_is_unknown() -> None:
    meter = seen(Meter(reader(), PEEK, 200), RUNNING, b"data: " + b"x" * (1 << 20) + b"\n\n", RUNNING)

    assert meter.usage(complete=False) is None
    assert meter.usage(complete=True) == Usage(8, 1, model="m")


def test_an_answer_not_begun_has_used_its_input() -> None:
    assert unanswered(PEEK) == Usage(11, 0, exact=False, model="asked")
    assert Meter(reader(), PEEK, 200).usage(complete=False) == unanswered(PEEK)


def test_asking_in_between_changes_nothing() -> None:
    meter = Meter(reader(), PEEK, 200)
    for byte in TEXT + REPORT:
        meter.see(bytes([byte]))
        meter.usage(complete=False)

    assert meter.usage(complete=True) == Usage(8, 3, model="m")


@pytest.mark.parametrize("status", [400, 429, 500, 529])
def test_an_error_costs_no_tokens_whatever_it_claims(status: int) -> None:
    meter = seen(Meter(reader(), PEEK, status), REPORT)

    assert (meter.usage(complete=True), meter.bytes_seen, meter.failed) == (None, len(REPORT), False)


def test_without_a_reader_bytes_are_counted_and_nothing_is_claimed() -> None:
    meter = seen(Meter(None, PEEK, 200), b"abc", b"", b"de")

    assert (meter.bytes_seen, meter.chunks_seen, meter.failed) == (5, 3, False)
    assert meter.usage(complete=True) is None and meter.usage(complete=False) is None


@pytest.mark.parametrize("broken", [Broken(), BrokenLate(), reader("application/json", "gzip")])
@pytest.mark.parametrize("complete", [True, False])
def test_a_reader_that_breaks_leaves_the_answer_alone(broken: Reader, complete: bool) -> None:
    meter = seen(Meter(broken, PEEK, 200), b"not gzip", b"more")

    assert meter.usage(complete) is None
    assert (meter.failed, meter.bytes_seen, meter.chunks_seen) == (True, 12, 2)
    assert meter.usage(complete) is None


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ((), SoFar(11, 0, False)),
        ((TEXT[:40],), SoFar(11, 0, False)),  # not before the event is whole
        ((TEXT, TEXT), SoFar(11, 5, False)),
        ((RUNNING,), SoFar(8, 1, False)),
        ((RUNNING, TEXT), SoFar(8, 3, False)),  # 11 bytes of text are more than it had reported
        ((TEXT, TEXT, REPORT), SoFar(8, 3, False)),  # the final report counts all of them
        ((REPORT, b"data: [DONE]\n\n"), SoFar(8, 3, True)),
    ],
)
def test_what_a_stream_has_used_so_far_is_reported_or_estimated(chunks: tuple[bytes, ...], expected: SoFar) -> None:
    assert seen(Meter(reader(), PEEK, 200), *chunks).so_far() == expected


def test_of_a_plain_answer_nothing_is_told_before_it_is_whole() -> None:
    assert seen(Meter(reader("application/json"), PEEK, 200), b'{"choices":[').so_far() is None
    assert Meter(None, PEEK, 200).so_far() is None
    assert Meter(reader(), PEEK, 500).so_far() is None


def test_a_reader_that_breaks_while_it_is_asked_leaves_the_answer_alone() -> None:
    meter = seen(Meter(BrokenLate(), PEEK, 200), b"abc")

    assert meter.so_far() is None and meter.failed

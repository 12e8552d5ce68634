"""The room that watches an answer pass and says what it used.

Owns: the counts of what passed, and the containment of its reader: metering never changes, delays or breaks an answer.
Does not own: the formats (`usage`), nor what the usage costs (`charge`).
"""

from dataclasses import replace
from typing import NamedTuple

from gateway.types import Peek, Usage
from gateway.usage import Reader, tokens_of


class SoFar(NamedTuple):
    """The tokens of an answer under way, as of its last whole event."""

    input_tokens: int
    output_tokens: int
    #: The event that ends the answer has passed.
    over: bool


class Meter:
    """One answer's meter. State: bytes and chunks seen, and the reader until it fails."""

    __slots__ = ("_peek", "_reader", "bytes_seen", "chunks_seen", "failed")

    def __init__(self, reader: Reader | None, peek: Peek, status: int) -> None:
        """reader: of the answer's format, None when it has none; peek: of the request; status: of the answer.

        An answer of 400 or above is counted but not read: errors cost no tokens, whatever they claim.
        """
        self.bytes_seen = 0
        self.chunks_seen = 0
        #: The reader gave up or broke: the usage is unknown, and the answer went on.
        self.failed = False
        self._reader = reader if status < 400 else None
        self._peek = peek

    def see(self, chunk: bytes) -> None:
        """`chunk` is counted and shown to the reader. Never raises."""
        self.bytes_seen += len(chunk)
        self.chunks_seen += 1
        if self._reader is not None:
            try:
                self._reader.feed(chunk)
            except Exception:  # Whatever is wrong with a reader must not reach the client's stream.
                self._fail()

    def usage(self, complete: bool) -> Usage | None:
        """What the answer used up to here, None when unknown. Never raises; may be asked repeatedly.

        complete: the answer came to its proper end, so the last report is the final one. Without a report a complete
        answer is unknown, and an incomplete one is estimated from what was delivered, marked as not exact.
        """
        if self._reader is None:
            return None
        try:
            return _complete(self._reader) if complete else _so_far(self._reader, self._peek)
        except Exception:  # As in `see`: settling the request must not fail over its usage.
            self._fail()
            return None

    def so_far(self) -> SoFar | None:
        """What a stream has used up to here, reported or estimated; None when it cannot be told, or only once the
        answer is whole. Cheap: it is asked after every read. Never raises."""
        if self._reader is None:
            return None
        try:
            progress = self._reader.progress()
        except Exception:  # As in `see`.
            self._fail()
            return None
        if progress is None:
            return None
        reported, text_bytes, over = progress
        if reported is None:
            return SoFar(tokens_of(self._peek.body_bytes), tokens_of(text_bytes), over)
        # Text may have been delivered since a running report; a final one has counted all of it.
        output_tokens = reported.output_tokens
        if not reported.exact:
            output_tokens = max(output_tokens, tokens_of(text_bytes))
        return SoFar(reported.input_tokens, output_tokens, over)

    def _fail(self) -> None:
        self.failed = True
        self._reader = None


def unanswered(peek: Peek) -> Usage:
    """The usage of a request whose answer had not begun: its input, estimated from the size of its body."""
    return Usage(tokens_of(peek.body_bytes), 0, exact=False, model=peek.model)


def _complete(reader: Reader) -> Usage | None:
    reported = reader.finish()
    return reported if reported is None or reported.exact else replace(reported, exact=True)


def _so_far(reader: Reader, peek: Peek) -> Usage | None:
    reported = reader.finish()
    if reported is not None and reported.exact:
        return reported
    delivered_bytes = reader.delivered_bytes()
    if delivered_bytes is None:
        return None  # part of it went unread, so even a running report may be out of date
    delivered = replace(unanswered(peek), output_tokens=tokens_of(delivered_bytes))
    if reported is None:
        return delivered
    # A running report is better than our guess of the input; text may have been delivered since.
    return replace(reported, output_tokens=max(reported.output_tokens, delivered.output_tokens))

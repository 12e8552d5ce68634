"""What every usage format offers: a look at the request's body, and a reader of the answer's bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from gateway.types import Peek, Usage

#: Bytes of UTF-8 text that are taken for one token where nobody counted: the usual rule of thumb for English.
BYTES_PER_TOKEN = 4


class Unreadable(Exception):
    """The answer's bytes cannot be decoded; its usage stays unknown."""


class Progress(NamedTuple):
    """What an answer under way has come to, as of its last whole event."""

    #: The last report, final or not.
    usage: Usage | None
    #: UTF-8 bytes of generated text.
    text_bytes: int
    #: The event that ends the answer has passed.
    over: bool


class Reader(Protocol):
    """Reads one answer's bytes as they pass. It sees copies of nothing and changes nothing."""

    def feed(self, chunk: bytes) -> None:
        """`chunk`, the next bytes of the answer as they stood on the wire, is taken into account.

        Raises Unreadable when the bytes cannot be what the answer's header fields said; never fed again after that.
        """
        ...

    def finish(self) -> Usage | None:
        """What the answer reported up to here; None when it has reported nothing, or nothing that can be trusted.

        `exact` says that the format marks this count as the final one. It may be asked at any time and repeatedly.
        """
        ...

    def delivered_bytes(self) -> int | None:
        """UTF-8 bytes of generated text seen up to here; None when that cannot be told."""
        ...

    def progress(self) -> Progress | None:
        """How far the answer has come, for the price of looking it up: it is asked after every read of a stream. None
        for an answer that is read only once it is whole."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One usage format: its request side and its answer side."""

    #: What the request's body says. Raises errors.BadRequest that names the field.
    peek: Callable[[bytes], Peek]
    #: A reader for an answer of this content type and content encoding ("" when absent); None when there is none.
    reader: Callable[[str, str], Reader | None]
    #: The body with at most so many output tokens allowed, all choices together, and what it then names as the maximum
    #: of one; None when it allows no more than that. Only for bodies that `peek` takes.
    capped: Callable[[bytes, int], tuple[bytes, int] | None]


def tokens_of(text_bytes: int) -> int:
    """The tokens of so many bytes of text, rounded up."""
    return -(-text_bytes // BYTES_PER_TOKEN)

"""What a connection and whoever uses it know of each other, so that neither imports the other's insides."""

from typing import Protocol

import httpx

#: Unread bytes at which the upstream is told to wait (TCP's window closes).
BUFFERED_BYTES_MAX = 65_536


class Unanswered(httpx.RemoteProtocolError):
    """The connection ended before a byte of the answer: whether the upstream acted on the request is unknown."""


class StaleConnection(Unanswered):
    """The upstream closed a kept connection without a byte of answer: most likely it never read the request."""


class User(Protocol):
    """What a connection tells the exchange or tunnel that it belongs to."""

    def feed(self, data: bytes) -> None:
        """Bytes from the upstream, at least one."""

    def ended(self, error: Exception | None) -> bool:
        """The upstream sends no more: in order (None) or because the connection broke.

        True after an orderly end: there may still be something to write, so the connection stays.
        """

    def expired(self, writing: bool) -> None:
        """The deadline of the current wait has passed."""

    def fail(self, error: BaseException) -> None:
        """It is over; the connection is closed or about to be."""


class Wire(Protocol):
    """What an exchange or tunnel asks of its connection."""

    reused: bool

    def write(self, data: bytes | memoryview) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    def watch_reading(self, timeout_s: float) -> None: ...
    def unwatch_reading(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def hand_over(self, user: User) -> None: ...
    def finish(self, reusable: bool) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...

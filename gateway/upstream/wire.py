"""What an exchange and its connection know of each other, so that neither imports the other's insides."""

from typing import Protocol

import httpx


class Unanswered(httpx.RemoteProtocolError):
    """The connection ended before a byte of the answer: the upstream may have acted on the request, or never read it."""


class StaleConnection(Unanswered):
    """The upstream closed a kept connection without a byte of answer: most likely it never read the request."""


class Wire(Protocol):
    """What an exchange asks of its connection."""

    reused: bool

    def write(self, data: bytes | memoryview) -> None: ...
    async def drain(self, timeout_s: float) -> None: ...
    def watch_reading(self, timeout_s: float) -> None: ...
    def unwatch_reading(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def finish(self, reusable: bool) -> None: ...
    def abort(self) -> None: ...

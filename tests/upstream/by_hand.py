"""A transport whose every attempt a test ends by hand, and a loop on which time passes when a test says so."""

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx

from gateway.upstream.wire import StaleConnection, Unanswered


class Attempt:
    """One request as it reached the transport, waiting for its end."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        self.origin = f"{request.url.scheme}://{request.url.netloc.decode()}"
        self.ending: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()

    def connect(self) -> None:
        """From now on the upstream may have seen something of it."""
        self.request.extensions["reached"] = True

    async def pull(self) -> None:
        """The body is read, as sending it would."""
        assert isinstance(self.request.stream, httpx.AsyncByteStream)
        async for _ in self.request.stream:
            pass

    def answer(self, status: int = 200) -> None:
        self.connect()
        self._end(httpx.Response(status, stream=_Empty()))

    def refuse(self) -> None:
        self._end(httpx.ConnectError("refused"))

    def black_hole(self) -> None:
        self._end(httpx.ConnectTimeout("no answer to the SYN"))

    def wait_in_vain(self) -> None:
        self._end(httpx.PoolTimeout("no connection became free"))

    def run_out(self) -> None:
        """The kept connection turns out to be closed."""
        self.connect()
        self._end(StaleConnection("closed"))

    def drop(self) -> None:
        """The new connection is closed without an answer."""
        self.connect()
        self._end(Unanswered("closed"))

    def garble(self) -> None:
        self.connect()
        self._end(httpx.RemoteProtocolError("nonsense"))

    def dawdle(self) -> None:
        self.connect()
        self._end(httpx.ReadTimeout("no answer"))

    def _end(self, ending: httpx.Response | httpx.TransportError) -> None:
        if self.ending.done():
            return
        if isinstance(ending, httpx.Response):
            self.ending.set_result(ending)
        else:
            self.ending.set_exception(ending)
            self.ending.exception()  # seen, even if nobody waits any more


class ByHand(httpx.AsyncBaseTransport):
    """`under_way` holds the attempts that have not ended, oldest first; `seen` every one there was."""

    def __init__(self, on_attempt: Callable[[Attempt], None] = lambda attempt: None) -> None:
        """on_attempt: called with each attempt as it begins."""
        self.under_way: list[Attempt] = []
        self.seen: list[Attempt] = []
        self.on_attempt = on_attempt

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["reached"] = False
        attempt = Attempt(request)
        self.under_way.append(attempt)
        self.seen.append(attempt)
        self.on_attempt(attempt)
        try:
            return await attempt.ending
        finally:
            self.under_way.remove(attempt)


class _Empty(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for chunk in nothing:
            yield chunk


class Clockwork(asyncio.SelectorEventLoop):
    """Time stands still between calls of `advance`."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s

    def turn(self, times: int = 20) -> None:
        """Everything that is ready has run; 20 turns are more than any chain of wake-ups here is long."""
        for _ in range(times):
            self.call_soon(self.stop)
            self.run_forever()

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.turn()

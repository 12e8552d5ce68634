"""A raw client and a raw upstream that play one dialogue, line by line, and write down every byte that each got.

One task plays both parts, so a line is only spoken once the line before it was heard: what a gateway holds back for
longer than it must makes the dialogue stall. Nothing here knows what stands between the two.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, cast

from tests.walk.wire.ear import Ear
from tests.walk.wire.messages import HEAD_END, cut

#: Sent when a dialogue is over, to learn whether the connection still serves; belongs to no transcript.
PROBE = (
    b"POST {at}/probe HTTP/1.1\r\nHost: probe\r\nAuthorization: Bearer {key}\r\n"
    b"Content-Type: application/json\r\nContent-Length: 16\r\n\r\n"
)
#: It allows so little output that no route changes it.
PROBE_BODY = b'{"max_tokens":1}'
PROBED = b"HTTP/1.1 299 Probed\r\nContent-Length: 0\r\n\r\n"


class Stage:
    """One dialogue being played over one client connection."""

    def __init__(self, upstream: "Upstream", client: asyncio.Transport, ear: Ear, words: Mapping[bytes, bytes]) -> None:
        self.upstream = upstream
        #: The client is connected to the upstream itself.
        self.direct = upstream.port == client.get_extra_info("peername")[1]
        self.client = client
        self.client_ear = ear
        self.asked = bytearray()
        #: Where each of the client's packets begins.
        self.packets: list[int] = []
        #: How many bytes of what was asked have had their answer.
        self.answered = 0
        self._words = words

    def fill(self, text: bytes) -> bytes:
        for word, value in self._words.items():
            text = text.replace(word, value)
        return text

    def ask(self, text: bytes) -> None:
        self.send(self.fill(text))

    def send(self, data: bytes) -> None:
        self.packets.append(len(self.asked))
        self.asked += data
        self.client.write(data)

    async def probe(self, expected: str) -> str:
        """What became of the client's connection: `open`, `closed` or `reset`. A dialogue that is expected to end with
        the connection is not disturbed by a question."""
        ear = self.client_ear
        if expected == "open":
            self.upstream.probed = bytearray()
            self.client.write(self.fill(PROBE) + PROBE_BODY)
            await ear.until(lambda: bool(ear.ended) or len(ear.heard) > ear.message_at, "the probe")
            if ear.heard.startswith(b"HTTP/1.1 299 ", begin := ear.message_at):
                await ear.until(ear.has_message, "the answer to the probe")
                del ear.heard[begin:]
                return "open"
        await ear.until(lambda: bool(ear.ended), "the end of the connection")
        return ear.ended


class Line(Protocol):
    async def play(self, stage: Stage) -> None: ...


@dataclass(frozen=True, slots=True)
class Asks:
    """The client sends. `{at}` is the path prefix of the route, `{key}` the client's key."""

    text: bytes

    async def play(self, stage: Stage) -> None:
        stage.ask(self.text)


@dataclass(frozen=True, slots=True)
class Drips:
    """The client sends byte by byte."""

    text: bytes

    async def play(self, stage: Stage) -> None:
        for byte in stage.fill(self.text):
            stage.send(bytes((byte,)))
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Arrives:
    """The upstream has got `marker`, or, without one, another whole request."""

    marker: bytes | None = None

    async def play(self, stage: Stage) -> None:
        ear, marker = stage.upstream.ear, self.marker
        await ear.until(ear.has_message if marker is None else lambda: ear.has(stage.fill(marker)), self)


@dataclass(frozen=True, slots=True)
class Answers:
    """The upstream sends, in one piece."""

    text: bytes

    async def play(self, stage: Stage) -> None:
        stage.upstream.say(self.text)


@dataclass(frozen=True, slots=True)
class Gets:
    """The client has got `marker`, or, without one, another whole answer, interim ones passed over."""

    marker: bytes | None = None

    async def play(self, stage: Stage) -> None:
        ear, marker = stage.client_ear, self.marker
        if marker is not None:
            await ear.until(lambda: ear.has(marker), self)
            return
        request = bytes(stage.asked[stage.answered :])
        found = cut(request, 0)
        # An answer to a request that is not complete is the last one.
        stage.answered += len(request) if found is None else found[1]
        await ear.until(lambda: ear.has_message(head_only=request.startswith(b"HEAD ")), self)


@dataclass(frozen=True, slots=True)
class Closes:
    """The upstream closes its connection, in order."""

    async def play(self, stage: Stage) -> None:
        stage.upstream.close()


@dataclass(frozen=True, slots=True)
class Directly:
    """These lines are left out behind a gateway, which has to find its own."""

    lines: tuple[Line, ...]

    async def play(self, stage: Stage) -> None:
        if stage.direct:
            for line in self.lines:
                await line.play(stage)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What each side got, byte for byte."""

    #: All that the client sent.
    asked: bytes
    #: Where each packet of it begins.
    packets: tuple[int, ...]
    to_upstream: bytes
    to_client: bytes
    #: What became of the client's connection: `open`, `closed` or `reset`.
    connection: str


class _Visit(asyncio.Protocol):
    """One connection to the upstream."""

    def __init__(self, upstream: "Upstream") -> None:
        self._upstream = upstream
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._upstream.visits.add(self)

    def data_received(self, data: bytes) -> None:
        self._upstream.hear(self, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._upstream.visits.discard(self)
        self._upstream.lost(self)


class Upstream:
    """Listens for good; what it hears belongs to the dialogue that is being played."""

    def __init__(self) -> None:
        self.ear = Ear()
        self.visits: set[_Visit] = set()
        #: The connection that the last bytes came on.
        self.active: _Visit | None = None
        #: What came after the dialogue; None while it lasts.
        self.probed: bytearray | None = None
        self.port = 0

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    def begin(self) -> None:
        """A new dialogue; connections may stand from an earlier one."""
        self.ear, self.active, self.probed = Ear(), None, None

    def hear(self, visit: _Visit, data: bytes) -> None:
        self.active = visit
        if self.probed is None:
            self.ear.hear(data)
            return
        self.probed += data
        if self.probed.endswith(HEAD_END + PROBE_BODY):
            # Whatever did not belong to the question belongs to the transcript, where it will be seen.
            self.ear.hear(bytes(self.probed[: self.probed.rfind(b"POST ")]))
            self.probed.clear()
            self.say(PROBED)

    def lost(self, visit: _Visit) -> None:
        if self.active is visit:
            self.active = None
            self.ear.hear(b"")

    def say(self, text: bytes) -> None:
        assert self.active is not None and self.active.transport is not None, "nobody is connected to the upstream"
        self.active.transport.write(text)

    def close(self) -> None:
        assert self.active is not None and self.active.transport is not None
        self.active.transport.close()


class _Client(asyncio.Protocol):
    def __init__(self) -> None:
        self.ear = Ear()

    def data_received(self, data: bytes) -> None:
        self.ear.hear(data)

    def eof_received(self) -> None:
        self.ear.end("closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self.ear.end("reset" if exc else "closed")


@asynccontextmanager
async def upstream() -> AsyncIterator[Upstream]:
    loop = asyncio.get_running_loop()
    scripted = Upstream()
    listening = await loop.create_server(lambda: _Visit(scripted), "127.0.0.1", 0)
    scripted.port = listening.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        listening.close()
        for visit in tuple(scripted.visits):
            assert visit.transport is not None
            visit.transport.abort()


async def play(
    dialogue: Sequence[Line], upstream: Upstream, port: int, words: Mapping[bytes, bytes], expected: str
) -> Transcript:
    """The dialogue between a client of 127.0.0.1:`port` and `upstream`.

    words: what stands for the placeholders in what the client says. expected: what is to become of the connection.
    """
    upstream.begin()
    transport, client = await asyncio.get_running_loop().create_connection(_Client, "127.0.0.1", port)
    stage = Stage(upstream, transport, client.ear, words)
    try:
        for line in dialogue:
            await line.play(stage)
        connection = await stage.probe(expected)
        return Transcript(
            bytes(stage.asked), tuple(stage.packets), bytes(upstream.ear.heard), bytes(client.ear.heard), connection
        )
    finally:
        transport.abort()

"""One request to the demo AI router and its answer: read, paced, written, broken off, and noted in the journal."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from gateway.embedded.demo_replies import REPLY_WORDS_MAX, Chunk, Json

Scope = dict[str, Any]
Event = dict[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

DELAY_MS_MAX = 300_000
BODY_BYTES_MAX = 32 * 1024 * 1024
_CHUNKS_MAX = 1_000_000
_JSON_HEADERS = ((b"content-type", b"application/json"),)
_STREAM_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))

#: Per request: `x-demo-<name>` with the least and the most it may be.
_PACE_BOUNDS = {
    "first_byte_delay_ms": (0, DELAY_MS_MAX),
    "chunk_delay_ms": (0, DELAY_MS_MAX),
    "status": (400, 599),
    "break_after_chunks": (0, _CHUNKS_MAX),
    "reply_words": (0, REPLY_WORDS_MAX),
}


class DemoClientLeft(Exception):
    """The client closed its connection before the answer was complete."""


class DemoBreak(Exception):
    """The request asked for its connection to be dropped here."""


class Refused(Exception):
    """The request is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Pace:
    """How an answer is given: the router's flags, overridden by a request's headers."""

    first_byte_delay_ms: int = 0
    chunk_delay_ms: int = 0
    status: int | None = None
    break_after_chunks: int | None = None
    reply_words: int | None = None


class Journal:
    """Appends one JSON line per event to a file; a line is written whole, in one call."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, facts: Json) -> None:
        clocks = {"wall_ms": time.time_ns() // 1_000_000, "monotonic_ns": time.monotonic_ns()}
        self._file.write(msgspec.json.encode({"event": event} | facts | clocks) + b"\n")

    def close(self) -> None:
        self._file.close()


class Exchange:
    """One request and its answer, as far as it got."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.request_id = self.header(b"x-request-id") or f"req_{uuid.uuid4().hex}"
        self.status = 0
        #: Events of the stream handed to the connection, and the words of the reply in them.
        self.chunks = 0
        self.words = 0
        self._receive = receive
        self._send = send
        self._watch: asyncio.Task[None] | None = None

    def header(self, name: bytes) -> str | None:
        return next((value.decode("latin-1") for key, value in self.headers if key == name), None)

    def pace(self, defaults: Pace) -> Pace:
        """What the request's headers ask for. One that is no number or out of bounds is refused with 400."""
        wanted: dict[str, int] = {}
        for name, (least, most) in _PACE_BOUNDS.items():
            header = f"x-demo-{name.replace('_', '-')}"
            text = self.header(header.encode())
            if text is None:
                continue
            if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
                raise Refused(400, f"{header} must be a whole number from {least} to {most}")
            wanted[name] = int(text)
        return replace(defaults, **wanted) if wanted else defaults

    async def body(self) -> AsyncIterator[bytes]:
        """The request body as it arrives. Raises DemoClientLeft."""
        more = True
        while more:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise DemoClientLeft
            more = event.get("more_body", False)
            yield event.get("body", b"")

    async def whole_body(self) -> bytes:
        """The request body, at most BODY_BYTES_MAX of it; more is refused with 413."""
        body = bytearray()
        async for part in self.body():
            body += part
            if len(body) > BODY_BYTES_MAX:
                raise Refused(413, f"The body is larger than {BODY_BYTES_MAX} bytes")
        return bytes(body)

    async def pause(self, delay_ms: int) -> None:
        """`delay_ms` have passed. Raises DemoClientLeft as soon as the client leaves. The body must have been read."""
        if self._watch is None:
            self._watch = asyncio.ensure_future(self._until_client_leaves())
        if delay_ms:
            await asyncio.wait({self._watch}, timeout=delay_ms / 1000)
        else:
            await asyncio.sleep(0)
        if self._watch.done():
            raise DemoClientLeft

    async def json(self, status: int, value: Json | list[Json], pace: Pace) -> None:
        """The answer is `value`; when the pace says so, it breaks off after some bytes."""
        body = msgspec.json.encode(value)
        await self._start(status, (*_JSON_HEADERS, (b"content-length", str(len(body)).encode())))
        if pace.break_after_chunks is not None:
            cut = body[: min(pace.break_after_chunks, len(body) - 1)]
            await self._send({"type": "http.response.body", "body": cut, "more_body": True})
            raise DemoBreak
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, chunks: Iterable[Chunk], pace: Pace) -> None:
        """The answer is an event stream, one event per write, at the given pace."""
        await self._start(200, _STREAM_HEADERS)
        for chunk in chunks:
            if self.chunks == pace.break_after_chunks:
                raise DemoBreak
            if self.chunks > 0:
                await self.pause(pace.chunk_delay_ms)
            await self._send({"type": "http.response.body", "body": chunk.data, "more_body": True})
            self.chunks += 1
            self.words += chunk.words
        await self._send({"type": "http.response.body", "body": b""})

    async def close(self) -> None:
        """Nobody watches for the client any more."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    def facts(self) -> Json:
        return {"request_id": self.request_id, "method": self.method, "path": self.path}

    def result(self) -> Json:
        return self.facts() | {"status": self.status, "chunks": self.chunks, "words": self.words}

    async def _start(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        name = b"request-id" if self.path == "/v1/messages" else b"x-request-id"
        identity = {(name, self.request_id.encode("latin-1")), (b"x-request-id", self.request_id.encode("latin-1"))}
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *sorted(identity)]})

    async def _until_client_leaves(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

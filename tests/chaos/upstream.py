"""The AI router of a run. It never fails, and notes what it delivered to whom: the truth that charges are held to."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

WORD = "lorem "
WORDS_PER_EVENT = 20
#: Of the words it says, as the usage it reports: the size of their text by the usual rule, so that what is counted of a
#: stream that was cut can be compared.
BYTES_PER_TOKEN = 4


def tokens_of(words: int) -> int:
    return -(-len(WORD) * words // BYTES_PER_TOKEN)


@dataclass
class Delivery:
    """One request as the upstream saw it."""

    request_id: str
    org_id: str
    #: Which process of which gateway brought it, as its Via says.
    gateway: str
    key: str
    #: What the customer calls this one sending of a request.
    attempt: str
    stream: bool
    words: int
    at_s: float
    #: Words that were written to the gateway, when (monotonic time) each part was, and when the answer was whole.
    delivered_words: int = 0
    parts: list[tuple[float, int]] = field(default_factory=list)
    finished_at_s: float | None = None

    def wrote(self, words: int) -> None:
        self.delivered_words += words
        self.parts.append((time.monotonic(), self.delivered_words))

    def words_by(self, at_s: float) -> int:
        """How many had been written at that time."""
        return max((words for written_s, words in self.parts if written_s <= at_s), default=0)


@dataclass
class Router:
    url: str = ""
    deliveries: list[Delivery] = field(default_factory=list)
    #: Between two events of a stream, and before a plain answer.
    pause_s: float = 0.02

    async def visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                fields = dict(line.split(": ", 1) for line in head.lower().split("\r\n")[1:] if ": " in line)
                asked = json.loads(await reader.readexactly(int(fields["content-length"])))
                delivery = Delivery(
                    request_id=fields["x-request-id"],
                    org_id=fields["x-org-id"],
                    gateway=fields["via"].split(", ")[-1].removeprefix("1.1 "),
                    key=fields.get("idempotency-key", ""),
                    attempt=fields["x-attempt"],
                    stream=bool(asked.get("stream")),
                    words=int(asked["words"]),
                    at_s=time.monotonic(),
                )
                self.deliveries.append(delivery)
                await (self._stream if delivery.stream else self._answer)(delivery, writer)
        writer.transport.abort()

    async def _answer(self, delivery: Delivery, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.pause_s)
        body = json.dumps(
            {
                "model": "m",
                "choices": [{"message": {"role": "assistant", "content": WORD * delivery.words}}],
                "usage": _usage(delivery.words),
            }
        ).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        delivery.wrote(delivery.words)
        await writer.drain()
        delivery.finished_at_s = time.monotonic()

    async def _stream(self, delivery: Delivery, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        while delivery.delivered_words < delivery.words:
            words = min(WORDS_PER_EVENT, delivery.words - delivery.delivered_words)
            await asyncio.sleep(self.pause_s)
            _write(writer, {"model": "m", "choices": [{"delta": {"content": WORD * words}}]})
            delivery.wrote(words)
            await writer.drain()
        _write(writer, {"model": "m", "choices": [], "usage": _usage(delivery.words)})
        end = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
        await writer.drain()
        delivery.finished_at_s = time.monotonic()


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": 5, "completion_tokens": tokens_of(words), "total_tokens": 5 + tokens_of(words)}


def _write(writer: asyncio.StreamWriter, event: object) -> None:
    data = b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode()
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


@asynccontextmanager
async def router() -> AsyncIterator[Router]:
    found = Router()
    tasks: set[asyncio.Task[None]] = set()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await found.visit(reader, writer)
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(visit, "127.0.0.1", 0, backlog=1024)
    found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield found
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""What a client makes of the bytes of an answer: above all whether they came to a well-formed end."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import httptools

READ_BYTES = 65_536


@dataclass
class Reading:
    """One answer as far as it got. `complete` only at the end that its own framing announced."""

    interim: list[int] = field(default_factory=list)
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    complete: bool = False
    #: What followed a complete answer, or could not be read at all.
    trouble: str = ""


class Reader:
    """Reads the answers of one connection, in order, each into a `Reading` of its own."""

    def __init__(self) -> None:
        self.current = Reading()
        self.done: list[Reading] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.current.trouble = str(exc) or type(exc).__name__

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.current.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self.current.interim.append(status)
        else:
            self.current.status = status

    def on_body(self, data: bytes) -> None:
        self.current.body += data

    def on_message_complete(self) -> None:
        if not self.current.status:
            self.current.headers.clear()  # those of an interim answer
            return
        self.current.complete = True
        self.done.append(self.current)
        self.current = Reading()


async def ask(address: str, request: bytes) -> Reading:
    """The one answer to `request`, which asks for the connection to be closed, read to the connection's end."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answers = Reader()
    try:
        writer.write(request)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(READ_BYTES):
                answers.feed(data)
    finally:
        writer.transport.abort()
    if len(answers.done) == 1:
        return answers.done[0]
    if answers.done:
        answers.current.trouble = f"{len(answers.done)} answers to one request"
    return answers.current

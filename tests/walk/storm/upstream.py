"""The upstream of a storm, a process of its own: answers each request with what it read of it, and keeps a record.

    python -m tests.walk.storm.upstream        prints its port; `GET /record` tells what happened; SIGTERM ends it

A request whose parts disagree, a body that is not the one it was to be, a second request before the first was answered
and bytes that begin no request are offences: an upstream that read them so would have done the wrong thing. Connections
that end within a request are not; that is how a gateway says that its client has left.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import uvloop

from tests.walk.storm.exchanges import ID_CHARS, Wish, answer_body, request_body

HEAD_END = b"\r\n\r\n"
OFFENCES_MAX = 20


@dataclass
class Record:
    """What reached this upstream. ids: of the requests that arrived whole, in order."""

    ids: list[str] = field(default_factory=list)
    offences: list[str] = field(default_factory=list)
    cut: int = 0
    connections: int = 0
    open: int = 0
    open_max: int = 0

    def offence(self, text: str) -> None:
        if len(self.offences) < OFFENCES_MAX:
            self.offences.append(text)


class Conversation(asyncio.Protocol):
    """One connection from the gateway."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._buffer = bytearray()
        self._busy = False
        self._counted = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        if self._counted:
            self._record.open -= 1
            self._record.cut += bool(self._buffer) or self._busy

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._busy:
            self._record.offence(f"more before the answer: {bytes(self._buffer[:200])!r}")
        else:
            self._read()

    def _read(self) -> None:
        end = self._buffer.find(HEAD_END)
        if end < 0:
            if not b"POST /".startswith(self._buffer[:6]) and not b"GET /".startswith(self._buffer[:5]):
                self._offend(f"no request: {bytes(self._buffer[:200])!r}")
            return
        line, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        method, _, target = line.rpartition(" ")[0].partition(" ")
        if target == "/record":
            self._tell()
            return
        self._count()
        fields = dict((name.lower(), value) for name, _, value in (line.partition(": ") for line in lines))
        if method not in ("GET", "POST") or "x-wish" not in fields:
            self._offend(f"no request: {bytes(self._buffer[:200])!r}")
            return
        start = end + len(HEAD_END)
        if "transfer-encoding" in fields:
            found = _unchunk(self._buffer, start)
        else:
            size = int(fields.get("content-length", "0"))
            found = (
                None if len(self._buffer) < start + size else (bytes(self._buffer[start : start + size]), start + size)
            )
        if found is None:
            return
        body, taken = found
        del self._buffer[:taken]
        if self._buffer:
            self._offend(f"more before the answer: {bytes(self._buffer[:200])!r}")
            return
        self._judge(target[-ID_CHARS:], fields, body)

    def _judge(self, path_id: str, fields: dict[str, str], body: bytes) -> None:
        record, field_id, wish = self._record, fields["x-storm-id"], Wish.read(fields["x-wish"])
        if path_id != field_id or fields.get("x-request-id") != field_id:
            record.offence(f"path {path_id}, field {field_id}, request id {fields.get('x-request-id')}")
        if body != request_body(field_id, wish.body_bytes):
            record.offence(f"{field_id}: {len(body)} of {wish.body_bytes} bytes: {body[:200]!r}")
        record.ids.append(field_id)
        self._busy = True
        answer = answer_body(path_id, field_id, body, wish)
        self._later(wish.pause_ms, partial(self._head, field_id, path_id, wish, answer))

    def _head(self, field_id: str, path_id: str, wish: Wish, answer: bytes) -> None:
        framing = f"Content-Length: {len(answer)}" if wish.style == "length" else "Transfer-Encoding: chunked"
        kind = "text/event-stream" if wish.style == "events" else "text/plain"
        head = (
            f"HTTP/1.1 200 OK\r\nX-Storm-Id: {field_id}\r\nX-Storm-Path: {path_id}\r\nContent-Type: {kind}\r\n{framing}"
        )
        size = -(-len(answer) // wish.parts)
        parts = [answer[start : start + size] for start in range(0, len(answer), size)]
        if wish.style != "length":
            parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
            parts[-1] += b"0\r\n\r\n"
        self._part(head.encode() + HEAD_END + parts[0], parts[1:], wish.pause_ms)

    def _part(self, data: bytes, parts: list[bytes], pause_ms: int) -> None:
        if self._transport is None:
            return
        self._busy = bool(parts)
        self._transport.write(data)
        if parts:
            self._later(pause_ms, partial(self._part, parts[0], parts[1:], pause_ms))

    def _later(self, pause_ms: int, call: Callable[[], None]) -> None:
        if pause_ms:
            self._timer = self._loop.call_later(pause_ms / 1000, call)
        else:
            call()

    def _offend(self, text: str) -> None:
        self._record.offence(text)
        self._buffer.clear()
        if self._transport is not None:
            self._transport.abort()

    def _count(self) -> None:
        if not self._counted:
            self._counted = True
            record = self._record
            record.connections += 1
            record.open += 1
            record.open_max = max(record.open_max, record.open)

    def _tell(self) -> None:
        self._buffer.clear()
        record = self._record
        told = json.dumps(
            {
                "ids": record.ids,
                "offences": record.offences,
                "cut": record.cut,
                "connections": record.connections,
                "open": record.open,
                "open_max": record.open_max,
            }
        ).encode()
        assert self._transport is not None
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))


def _unchunk(buffer: bytearray, at: int) -> tuple[bytes, int] | None:
    """The chunked body that begins at `at`, and where it ends; None while it is not whole."""
    body = b""
    while True:
        line_end = buffer.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(bytes(buffer[at:line_end]).partition(b";")[0], 16)
        at = line_end + 2
        if len(buffer) < at + size + 2:
            return None
        body += buffer[at : at + size]
        at += size + 2
        if not size:
            return body, at


async def main() -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    record = Record()
    server = await loop.create_server(lambda: Conversation(record), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(main())

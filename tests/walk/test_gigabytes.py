"""Bodies of any size pass through in constant memory, also when whoever receives them stops reading for a while.

The gateway is a process of its own, so its memory is nobody else's. Both ends are plain sockets in threads: one repeats
a prepared block, the other compares what arrives with that block, and stands still now and then until the sender does
too. `--full` makes each body 1 GiB.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.waiting import until
from tests.walk.house import House, Process

MIB = 1 << 20
BLOCK = b"".join(b"%015x\n" % number for number in range(MIB // 16))
#: One chunk, where there is no Content-Length.
CHUNK_BYTES = 64 * 1024
#: How often the receiver stands still.
PAUSES = 2
#: A sender that got rid of nothing for so long stands still. On a machine that is busy elsewhere it may only seem so;
#: then the receiver goes on early, which proves less and breaks nothing.
STILL_S = 0.2
#: What the kernel may keep on our ends of the two connections; on the gateway's ends it may keep as much as it likes.
SOCKET_BUFFER_BYTES = MIB
#: What the gateway itself may keep.
KEPT_MAX = 2 * MIB
SAMPLE_S = 0.005
SOCKET_TIMEOUT_S = 60.0
ROUTES = "[ { path: /*, upstream: ai_router, body_bytes_max: 2GiB } ]"


class Sender:
    """Sends BLOCK `blocks` times."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.bytes = 0
        self._moved_at = time.monotonic()

    def send(self, peer: socket.socket, *, chunked: bool) -> None:
        pieces = [BLOCK[at : at + CHUNK_BYTES] for at in range(0, MIB, CHUNK_BYTES)]
        framed = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] if chunked else pieces
        for _ in range(self._blocks):
            for piece in framed:
                peer.sendall(piece)
                self.bytes += CHUNK_BYTES
                self._moved_at = time.monotonic()
        if chunked:
            peer.sendall(b"0\r\n\r\n")

    def stands_still(self) -> bool:
        return time.monotonic() - self._moved_at > STILL_S


class Receiver:
    """Reads BLOCK `blocks` times, and waits `pauses` times on the way for `go_on`."""

    def __init__(self, blocks: int, pauses: int) -> None:
        self._blocks = blocks
        self._pauses = {blocks * (2 * number + 1) // (2 * pauses + 2) for number in range(pauses)}
        self._paused = threading.Event()
        self._going = threading.Event()
        self.bytes = 0

    @property
    def paused(self) -> bool:
        return self._paused.is_set()

    def go_on(self, *, to_the_end: bool = False) -> None:
        if to_the_end:
            self._pauses.clear()
        self._paused.clear()
        self._going.set()

    def read(self, stream: BufferedReader, *, chunked: bool) -> None:
        """The whole body came, every byte of it as it was sent, and then its proper end."""
        block = bytearray(MIB)
        chunk_left = 0 if chunked else self._blocks * MIB
        for number in range(self._blocks):
            if number in self._pauses:
                self._stand_still()
            filled = 0
            while filled < MIB:
                if chunked and chunk_left == 0:
                    chunk_left = int(stream.readline(), 16)
                count = stream.readinto(memoryview(block)[filled : min(MIB, filled + chunk_left)])
                assert count, f"the body ended after {self.bytes} bytes"
                filled += count
                chunk_left -= count
                self.bytes += count
                if chunked and chunk_left == 0:
                    assert stream.readline() == b"\r\n"
            assert block == BLOCK, f"bytes before the {self.bytes}th were changed"
        if chunked:
            assert stream.read(5) == b"0\r\n\r\n"

    def _stand_still(self) -> None:
        self._going.clear()
        self._paused.set()
        assert self._going.wait(SOCKET_TIMEOUT_S)


class Exchange:
    """One request and its answer; the body of the one or of the other is large."""

    def __init__(self, blocks: int, pauses: int, *, upwards: bool, chunked: bool) -> None:
        self.pauses = pauses
        self.sender, self.receiver = Sender(blocks), Receiver(blocks, pauses)
        self._upwards, self._chunked = upwards, chunked
        self._framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (blocks * MIB)

    def as_client(self, address: str, secret: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None and parts.port is not None
        first = b"POST /files HTTP/1.1\r\n%b\r\n" % self._framing if self._upwards else b"GET /files HTTP/1.1\r\n"
        with _streaming(_socket()) as (peer, stream):
            peer.connect((parts.hostname, parts.port))
            peer.sendall(b"%bHost: files\r\nAuthorization: Bearer %b\r\n\r\n" % (first, secret.encode()))
            if self._upwards:
                self.sender.send(peer, chunked=self._chunked)
            assert _head(stream).startswith(b"HTTP/1.1 200 ")
            if not self._upwards:
                self.receiver.read(stream, chunked=self._chunked)

    def as_upstream(self, listener: socket.socket) -> None:
        with _streaming(listener.accept()[0]) as (peer, stream):
            _head(stream)
            if self._upwards:
                self.receiver.read(stream, chunked=self._chunked)
            framing = b"Content-Length: 0" if self._upwards else self._framing
            peer.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n%b\r\n\r\n" % framing)
            if not self._upwards:
                self.sender.send(peer, chunked=self._chunked)


def _socket() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return made


def _under_way_max() -> int:
    """The kernel's buffers at both ends of both connections, and the gateway's own."""
    most = [int(Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text().split()[2]) for name in ("rmem", "wmem")]
    # The kernel doubles what it is asked for.
    return sum(most) + 4 * SOCKET_BUFFER_BYTES + KEPT_MAX


@contextlib.contextmanager
def _streaming(peer: socket.socket) -> Iterator[tuple[socket.socket, BufferedReader]]:
    peer.settimeout(SOCKET_TIMEOUT_S)
    with peer, peer.makefile("rb") as stream:
        yield peer, stream


def _head(stream: BufferedReader) -> bytes:
    """A message's first line; its fields are read past."""
    first = line = stream.readline()
    while line.strip():
        line = stream.readline()
    return first


class Memory:
    """The resident memory of a process, looked at over and over while the block lasts."""

    def __init__(self, pid: int) -> None:
        self._statm = Path(f"/proc/{pid}/statm")
        self._before = self._peak = self._now()

    @property
    def growth_bytes(self) -> int:
        return self._peak - self._before

    async def __aenter__(self) -> "Memory":
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._now())
            await asyncio.sleep(SAMPLE_S)

    def _now(self) -> int:
        return int(self._statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def transfer(exchange: Exchange, listener: socket.socket, gateway: Process, secret: str) -> None:
    """The exchange took place, and whenever its receiver stood still its sender came to stand still as well."""
    ends = [
        asyncio.create_task(asyncio.to_thread(exchange.as_upstream, listener)),
        asyncio.create_task(asyncio.to_thread(exchange.as_client, gateway.address, secret)),
    ]
    sender, receiver = exchange.sender, exchange.receiver

    def failed() -> bool:
        return any(end.done() and end.exception() is not None for end in ends)

    try:
        for _ in range(exchange.pauses):
            await until(lambda: receiver.paused or failed(), SOCKET_TIMEOUT_S)
            await until(lambda: sender.stands_still() or failed(), SOCKET_TIMEOUT_S)
            assert sender.bytes - receiver.bytes <= _under_way_max()
            receiver.go_on()
    finally:
        receiver.go_on(to_the_end=True)
        await asyncio.gather(*ends)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("upwards", [True, False], ids=["up", "down"])
async def test_a_body_of_any_size_passes_in_constant_memory(
    house: House,
    full: bool,
    record_property: Callable[[str, object], None],
    upwards: bool,
    chunked: bool,
) -> None:
    blocks, growth_max = (1024, 32 * MIB) if full else (64, 24 * MIB)
    house.price, house.settings["routes"] = 0, ROUTES
    with _socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(SOCKET_TIMEOUT_S)
        house.upstream_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with Process(house) as gateway:
            assert gateway.process is not None
            # What the first exchange of a process brings into memory is not what a body costs.
            await transfer(Exchange(4, 0, upwards=upwards, chunked=chunked), listener, gateway, house.secret)
            began = time.monotonic()
            async with Memory(gateway.process.pid) as memory:
                exchange = Exchange(blocks, PAUSES, upwards=upwards, chunked=chunked)
                await transfer(exchange, listener, gateway, house.secret)
            moving_s = time.monotonic() - began - PAUSES * STILL_S
    record_property("mib", blocks)
    record_property("mib_per_s", round(blocks / moving_s))
    record_property("memory_growth_mib", round(memory.growth_bytes / MIB, 1))
    assert exchange.receiver.bytes == blocks * MIB
    assert memory.growth_bytes < growth_max

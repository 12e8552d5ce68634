"""An upstream that fails at every byte of its answer, in every way that a network has.

All offsets of an answer run at once, each on a connection of its own, so that a stall costs its deadline once. None of
them may look like a whole answer, deliver a byte that was not sent, or leave a connection behind.
"""

import asyncio

import httpx
import pytest

from gateway.upstream import Stats, Timeouts, Transport
from tests.upstream.scripted import Peer, Server, exchange_of, read, request, turns, until

SIZED = b"HTTP/1.1 200 OK\r\nX: y\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-Trailer: t\r\n\r\n"
)
HINTED = b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + SIZED
ENDLESS = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello world"
BODY = b"hello world"
#: From here on an orderly close is the end of the answer.
HEAD_OF_ENDLESS = ENDLESS.index(BODY)


class Fault:
    """The upstream sends the answer up to the byte that the request's path names, and then does what it does."""

    def __init__(self, answer: bytes, kind: str) -> None:
        self.answer = answer
        self.kind = kind
        self.over = asyncio.Event()

    async def script(self, peer: Peer) -> None:
        head = await peer.head()
        sent = self.answer[: int(head.split(b" ")[1][1:])]
        if self.kind == "drip":
            for at in range(len(sent)):
                await peer.send(sent[at : at + 1])
                await turns(2)
        else:
            await peer.send(sent)
            await turns(8)
        if self.kind == "reset":
            peer.reset()
        elif self.kind == "half-close":
            peer.writer.write_eof()
            await peer.closed()
        elif self.kind == "stall":
            await self.over.wait()


async def _attempt(transport: Transport, server: Server, fault: Fault, at: int) -> None:
    """The answer up to byte `at`, and what came of it."""
    received = b""
    message = request(server, target=b"/%d" % at)
    whole = fault.answer is ENDLESS and at >= HEAD_OF_ENDLESS and fault.kind in ("close", "half-close", "drip")
    error: httpx.TransportError | None = None
    try:
        stream = await exchange_of(transport, message)
        async for piece in stream:
            received += piece
    except httpx.TransportError as exc:
        error = exc
    where = f"{fault.kind} at byte {at}"
    assert BODY.startswith(received), where
    if whole:
        assert error is None and received == BODY[: at - HEAD_OF_ENDLESS], where
        return
    assert error is not None, f"{where}: a clean end"
    if fault.kind == "stall":
        assert isinstance(error, httpx.ReadTimeout), where
    elif fault.kind == "reset":
        assert isinstance(error, (httpx.ReadError, httpx.RemoteProtocolError)), where
    else:
        assert isinstance(error, httpx.RemoteProtocolError), where
    # What arrived whole was delivered: a client that is charged for it has it.
    sent = fault.answer[:at]
    if fault.kind != "reset" and fault.answer in (SIZED, HINTED) and BODY[:1] in sent.partition(b"11\r\n\r\n")[2]:
        assert received == sent.partition(b"11\r\n\r\n")[2], where


@pytest.mark.parametrize("kind", ["close", "reset", "half-close", "stall", "drip"])
@pytest.mark.parametrize(
    "answer", [SIZED, CHUNKED, HINTED, ENDLESS], ids=["sized", "chunked", "after hints", "until the end"]
)
async def test_a_fault_at_any_byte_is_never_a_whole_answer(server: Server, answer: bytes, kind: str) -> None:
    fault = Fault(answer, kind)
    server.script = fault.script
    transport = Transport(timeouts=Timeouts(first_byte_ms=800, idle_ms=800) if kind == "stall" else Timeouts())
    await asyncio.gather(*[_attempt(transport, server, fault, at) for at in range(len(answer))])
    assert transport.stats() == Stats(0, 0, 0, 0, 0)
    fault.over.set()
    await until(lambda: server.open == 0)


@pytest.mark.parametrize("answer", [SIZED, CHUNKED, HINTED], ids=["sized", "chunked", "after hints"])
async def test_an_answer_in_single_bytes_is_whole_and_its_connection_stays(server: Server, answer: bytes) -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            for at in range(len(answer)):
                await peer.send(answer[at : at + 1])
                await turns(2)

    server.script = script
    transport = Transport(connections_max=1)
    for _ in range(2):
        response = await transport.handle_async_request(request(server))
        assert await read(response) == BODY
    assert server.connections == 1
    await transport.aclose()

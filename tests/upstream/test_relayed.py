"""What comes back: pieces, framing, and tunnels that hold their place as long as they live."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from gateway import errors
from gateway.upstream import Upstreams
from gateway.upstream.relayed import framing_of, pieces_of
from tests.upstream.configured import Config
from tests.upstream.scripted import OK, Peer, Server, answering, turns, until

SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
UPGRADE = [(b"Host", b"a"), (b"Connection", b"Upgrade"), (b"Upgrade", b"echo")]


@pytest.fixture
async def upstreams(server: Server) -> AsyncIterator[Upstreams]:
    upstreams = Upstreams({"ai": Config((server.origin,), requests_max=1, queue_timeout_ms=60_000)})
    yield upstreams
    stats = upstreams.stats()["ai"]
    assert (stats.in_flight, stats.queued, stats.in_use) == (0, 0, 0)
    await upstreams.aclose()


async def echo(peer: Peer) -> None:
    """Switches protocols, and then sends back what comes."""
    await peer.request()
    await peer.send(SWITCH)
    while data := await peer.reader.read(65_536):
        await peer.send(data)


async def test_pieces_are_the_chunks_of_the_upstream(server: Server, upstreams: Upstreams) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n")
    async with upstreams.forward("ai", "GET", b"/", [], None) as answer:
        assert [pieces async for pieces in answer.pieces] == [[b"a", b"bc"]]


async def test_interim_answers_come_before_the_answer(server: Server, upstreams: Upstreams) -> None:
    seen: list[tuple[int, bytes, list[tuple[bytes, bytes]]]] = []

    async def interim(status: int, reason: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        seen.append((status, reason, fields))

    server.script = answering(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK)
    async with upstreams.forward("ai", "GET", b"/", [], None, interim=interim) as answer:
        assert answer.status == 200
    assert seen == [(103, b"Early Hints", [(b"Link", b"</a>")])]


async def test_a_tunnel_holds_its_place_for_its_life(server: Server, upstreams: Upstreams) -> None:
    server.script = echo
    async with upstreams.forward("ai", "GET", b"/", UPGRADE, None) as answer:
        assert (answer.status, answer.framing) == (101, "none")
        assert [pieces async for pieces in answer.pieces] == []
        assert answer.tunnel is not None
        await answer.tunnel.write(b"ping")
        assert await answer.tunnel.read() == b"ping"
        behind = asyncio.ensure_future(upstreams.forward("ai", "GET", b"/", [], None).__aenter__())
        await turns(5)
        stats = upstreams.stats()["ai"]
        assert (stats.in_flight, stats.queued, stats.targets[0].in_flight) == (1, 1, 1)
        behind.cancel()
        await asyncio.wait({behind})


@pytest.mark.parametrize("fails", [True, False])
async def test_leaving_the_block_closes_the_tunnel(server: Server, upstreams: Upstreams, fails: bool) -> None:
    got: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(SWITCH)
        while data := await peer.reader.read(65_536):
            got.append(data)
        got.append(b"")

    server.script = script
    try:
        async with upstreams.forward("ai", "GET", b"/", UPGRADE, None) as answer:
            assert answer.tunnel is not None
            await answer.tunnel.write(b"bye")
            if fails:
                raise errors.ClientLeft
    except errors.ClientLeft:
        pass
    if not fails:
        await until(lambda: got[-1:] == [b""])
        assert b"".join(got) == b"bye", "what was written is delivered before the orderly end"


async def test_a_tunnel_that_breaks_speaks_our_words(server: Server, upstreams: Upstreams) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(SWITCH)
        await peer.reader.read(1)
        peer.reset()

    server.script = script
    async with upstreams.forward("ai", "GET", b"/", UPGRADE, None) as answer:
        assert answer.tunnel is not None
        await answer.tunnel.write(b"x")
        with pytest.raises(errors.UpstreamBroke):
            await answer.tunnel.read()
        with pytest.raises(errors.UpstreamBroke):
            await answer.tunnel.write(b"x")


async def test_whether_the_whole_request_was_sent_is_known_while_waiting_for_the_answer(
    server: Server, upstreams: Upstreams
) -> None:
    more = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await more.wait()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.closed()

    server.script = script
    forwarding = upstreams.forward("ai", "POST", b"/", [], body())
    entering = asyncio.ensure_future(forwarding.__aenter__())
    await until(lambda: server.connections == 1)
    assert forwarding.request_sent is False
    more.set()
    await until(lambda: forwarding.request_sent)
    entering.cancel()
    await asyncio.wait({entering})


@pytest.mark.parametrize(
    ("method", "status", "headers", "framing"),
    [
        ("GET", 200, [(b"Content-Length", b"2")], "length"),
        ("GET", 200, [(b"Transfer-Encoding", b"gzip, Chunked")], "chunked"),
        ("GET", 200, [(b"Transfer-Encoding", b"gzip")], "close"),
        ("GET", 200, [], "close"),
        ("HEAD", 200, [(b"content-length", b"2")], "none"),
        ("GET", 204, [], "none"),
        ("GET", 304, [(b"Content-Length", b"2")], "none"),
        ("GET", 101, [], "none"),
    ],
)
def test_how_a_body_ends(method: str, status: int, headers: list[tuple[bytes, bytes]], framing: str) -> None:
    assert framing_of(method, status, headers) == framing


async def test_a_stream_that_knows_no_chunks_gives_each_read_as_one_piece() -> None:
    class Reads(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"

    assert [pieces async for pieces in pieces_of(Reads())] == [[b"a"], [b"b"]]

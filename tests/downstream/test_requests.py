"""What the application is told of a request, however its bytes arrive."""

import asyncio
import contextvars
import itertools
from collections.abc import MutableMapping
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from gateway.downstream import EXTENSION, Head
from gateway.downstream.connection import Connection
from tests.downstream.site import ANSWERED, GET, HOST, Receive, Recorder, Send, answer, serving
from tests.waiting import until

CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\n" + HOST

ONE = b"Content-Length: 1\r\n\r\n1"

#: Good requests, alone and behind each other, each to be read in one way only.
GOOD = {
    "no body": GET,
    "an empty line before it": b"\r\n" + GET,
    "names in their own case": b"GET / HTTP/1.1\r\nhOST: a\r\nX-MiXeD: 1\r\nx-mixed: 2\r\n\r\n",
    "white space around values": b"GET / HTTP/1.1\r\nHost:  a \t\r\nA:\r\nB: \t \r\nC:d\te\r\n\r\n",
    "bytes above ASCII in values": b"GET / HTTP/1.1\r\nHost: a\r\nA: \x80\xff\xc3\xbc\r\n\r\n",
    "an empty query": b"GET /a? HTTP/1.1\r\n" + HOST + b"\r\n",
    "escapes": b"GET /a%2Fb/%C3%BC/%zz/..%2f?c=%2F&d HTTP/1.1\r\n" + HOST + b"\r\n",
    "bytes above ASCII in the path": b"GET /\xc3\xbc/\xff?\xe4 HTTP/1.1\r\n" + HOST + b"\r\n",
    "odd characters in the path": b"GET //a;b=c/'\"<>[]{}|\\^`?? HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method of its own": b"M-SEARCH!x / HTTP/1.1\r\n" + HOST + b"\r\n",
    "a length": POST + b"Content-Length: 5\r\n\r\nhello",
    "no length at all": POST + b"Content-Length: 0\r\n\r\n",
    "a body that looks like a request": POST + b"Content-Length: %d\r\n\r\n" % len(GET) + GET,
    "chunks": POST + CHUNKED + b'5\r\nhello\r\n6;a=b;c="d; \\"e"\r\n world\r\n0\r\n\r\n',
    "no chunks": POST + CHUNKED + b"0\r\n\r\n",
    "sizes in both cases": POST + CHUNKED + b"0a\r\n0123456789\r\nA\r\n0123456789\r\n000;x\r\n\r\n",
    "trailers": POST + CHUNKED + b"1\r\nx\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n",
    "an upper-case coding": POST + b"transfer-encoding: CHUNKED\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "line ends in the body": POST + CHUNKED + b"6\r\n\r\n0\r\n\n\r\n0\r\n\r\n",
    "two": GET + POST + b"Content-Length: 2\r\n\r\nhi",
    "three, chunked first": POST + CHUNKED + b"1\r\na\r\n0\r\nT: 1\r\n\r\n" + GET + POST + ONE,
    "an empty line between": POST + b"Content-Length: 2\r\n\r\nhi\r\n" + GET,
}


@pytest.mark.parametrize("request_bytes", GOOD.values(), ids=GOOD)
async def test_a_request_is_the_same_byte_by_byte(request_bytes: bytes) -> None:
    app = Recorder()
    async with serving(app) as site:
        heard = []
        for width in (len(request_bytes), 1):
            app.requests.clear()
            async with site.connect() as peer:
                for at in range(0, len(request_bytes), width):
                    peer.write(request_bytes[at : at + width])
                    await asyncio.sleep(0)
                await until(lambda: site.connections == 1 and site.tasks == 0 and app.requests)
                count = len(app.requests)
                await peer.exactly(ANSWERED * count)
                # Nothing is left over that could become a part of the next request.
                peer.write(GET)
                await peer.exactly(ANSWERED)
            assert all(seen.whole for seen in app.requests)
            heard.append([seen.heard for seen in app.requests])
        assert heard[0] == heard[1]
        assert len(heard[0]) > request_bytes.count(b"\nHost") // 2


async def test_the_scope_says_what_asgi_says_and_the_head_what_was_on_the_wire() -> None:
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        peer.write(b"PUT /a%20b/%C3%BC?x=%2F HTTP/1.1\r\nHOST: site\r\nX-One: 1\r\nx-one:2\r\n")
        peer.write(b"Content-length: 2\r\n\r\nhi")
        await peer.exactly(ANSWERED)
        scope = app.requests[0].scope
        assert scope["type"] == "http" and scope["asgi"] == {"version": "3.0", "spec_version": "2.3"}
        assert (scope["method"], scope["http_version"], scope["scheme"]) == ("PUT", "1.1", "http")
        assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a b/ü", b"/a%20b/%C3%BC", b"x=%2F")
        assert scope["root_path"] == "" and scope["state"] == {}
        assert scope["server"] == ("127.0.0.1", site.port)
        assert scope["client"] == peer.writer.get_extra_info("sockname")
        wanted = [(b"host", b"site"), (b"x-one", b"1"), (b"x-one", b"2"), (b"content-length", b"2")]
        assert scope["headers"] == wanted
        fields = ((b"HOST", b"site"), (b"X-One", b"1"), (b"x-one", b"2"), (b"Content-length", b"2"))
        assert scope["extensions"][EXTENSION] == Head(fields, b"/a%20b/%C3%BC?x=%2F")


async def test_what_one_request_sets_for_itself_the_next_does_not_see() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen = []

    async def app(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        seen.append((variable.get(), dict(scope["state"])))
        variable.set("set")
        scope["state"]["set"] = True
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(GET * 3)
        await peer.exactly(ANSWERED * 3)
    assert seen == [("unset", {})] * 3


# -- any way to cut the bytes ----------------------------------------------------------------------------------------


class Ear(asyncio.Transport):
    """A transport without a socket: hears what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = b""
        self.ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.heard += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def said(pieces: list[bytes]) -> tuple[list[tuple[object, ...]], bytes, bool]:
    """What the application hears and the client gets when the bytes arrive in these pieces."""

    async def run() -> tuple[list[tuple[object, ...]], bytes, bool]:
        app = Recorder()
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        connection, ear = Connection(config, state, {}), Ear()
        connection.connection_made(ear)
        for piece in pieces:
            connection.data_received(piece)
            await asyncio.sleep(0)
        await until(lambda: not state.tasks)
        heard, ended = [seen.heard for seen in app.requests], ear.ended
        connection.connection_lost(None)
        return heard, ear.heard, ended

    return asyncio.run(run())


def cut(data: bytes, at: set[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(data)]
    return [data[left:right] for left, right in itertools.pairwise(edges) if left < right]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(sorted(GOOD.values())), min_size=1, max_size=4), st.data())
def test_any_way_to_cut_the_bytes_gives_the_same_requests(requests: list[bytes], data: st.DataObject) -> None:
    together = b"".join(requests)
    whole = said([together])
    assert not whole[2] and whole[1] == ANSWERED * len(whole[0])
    at = data.draw(st.sets(st.integers(1, len(together) - 1), max_size=30))
    assert said(cut(together, at)) == whole

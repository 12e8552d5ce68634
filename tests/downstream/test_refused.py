"""What cannot be read in one way only is refused, before any application sees it, and ends its connection."""

import pytest

from gateway.downstream.chunked import EXTENSIONS_BYTES_MAX, LINE_BYTES_MAX
from gateway.downstream.request import (
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    METHOD_BYTES_MAX,
    TARGET_BYTES_MAX,
    TRAILERS_BYTES_MAX,
    TRAILERS_MAX,
)
from tests.downstream.site import ANSWERED, GET, HOST, Recorder, serving
from tests.waiting import until

LINE = b"GET / HTTP/1.1\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def with_field(field: bytes, line: bytes = LINE + HOST) -> bytes:
    return line + field + b"\r\n\r\n"


BAD_HEADS: dict[str, tuple[int, bytes]] = {
    # lengths and codings
    "two lengths": (400, with_field(b"Content-Length: 1\r\nContent-Length: 2") + b"ab"),
    "the same length twice": (400, with_field(b"Content-Length: 1\r\nContent-Length: 1") + b"a"),
    "a list of lengths": (400, with_field(b"Content-Length: 1, 1") + b"a"),
    "a signed length": (400, with_field(b"Content-Length: +1") + b"a"),
    "a negative length": (400, with_field(b"Content-Length: -1")),
    "a hexadecimal length": (400, with_field(b"Content-Length: 0x1") + b"a"),
    "a length with a space": (400, with_field(b"Content-Length: 1 1") + b"a"),
    "a length with an underscore": (400, with_field(b"Content-Length: 1_0") + b"a" * 10),
    "a length in other digits": (400, with_field("Content-Length: ١".encode()) + b"a"),
    "an empty length": (400, with_field(b"Content-Length:")),
    "a length without bound": (400, with_field(b"Content-Length: " + b"9" * 19)),
    "a length and a coding": (400, with_field(b"Content-Length: 5\r\nTransfer-Encoding: chunked") + b"0\r\n\r\n"),
    "a coding and a length": (400, with_field(b"Transfer-Encoding: chunked\r\nContent-Length: 5") + b"0\r\n\r\n"),
    "two codings": (400, with_field(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked") + b"0\r\n\r\n"),
    "two codings, one hidden": (400, with_field(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x") + b"0\r\n\r\n"),
    "a coding that is none": (501, with_field(b"Transfer-Encoding: xchunked") + b"0\r\n\r\n"),
    "a coding after chunked": (501, with_field(b"Transfer-Encoding: chunked, identity") + b"0\r\n\r\n"),
    "a coding before chunked": (501, with_field(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n"),
    "chunked twice": (501, with_field(b"Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n"),
    "identity": (501, with_field(b"Transfer-Encoding: identity")),
    "a quoted coding": (501, with_field(b'Transfer-Encoding: "chunked"') + b"0\r\n\r\n"),
    "a coding with a parameter": (501, with_field(b"Transfer-Encoding: chunked;q=1") + b"0\r\n\r\n"),
    "an empty coding": (501, with_field(b"Transfer-Encoding:")),
    "a coding behind a vertical tab": (400, with_field(b"Transfer-Encoding: \x0bchunked")),
    "a coding in HTTP/1.0": (400, with_field(b"Transfer-Encoding: chunked", b"POST / HTTP/1.0\r\n") + b"0\r\n\r\n"),
    "a coding with an underscore": (400, with_field(b"Transfer_Encoding: chunked")),
    "a length with an underscore in its name": (400, with_field(b"content_length: 5")),
    # hosts
    "no host": (400, LINE + b"\r\n"),
    "two hosts": (400, LINE + HOST + HOST + b"\r\n"),
    "an empty host": (400, LINE + b"Host:\r\n\r\n"),
    "a host with a path": (400, LINE + b"Host: a/b\r\n\r\n"),
    "a host with a user": (400, LINE + b"Host: u@a\r\n\r\n"),
    "a host with a space": (400, LINE + b"Host: a b\r\n\r\n"),
    "a list of hosts": (400, LINE + b"Host: a, b\r\n\r\n"),
    "a host with a bad port": (400, LINE + b"Host: a:8o\r\n\r\n"),
    "a bad host in HTTP/1.0": (400, b"GET / HTTP/1.0\r\nHost: a/b\r\n\r\n"),
    # lines
    "bare LF everywhere": (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    "bare LF behind the request line": (400, b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    "bare LF behind a field": (400, with_field(b"A: b\nC: d")),
    "bare LF at the end": (400, LINE + HOST + b"\n" + GET),
    "bare CR in a value": (400, with_field(b"A: b\rC: d")),
    "bare CR at the end of a value": (400, with_field(b"A: b\r\r")),
    "CR LF the wrong way round": (400, with_field(b"A: b\n\rC: d")),
    "NUL in a value": (400, with_field(b"A: b\0c")),
    "a control character in a value": (400, with_field(b"A: \x01")),
    "DEL in a value": (400, with_field(b"A: \x7f")),
    "a folded field": (400, with_field(b"A: b\r\n c")),
    "a field folded with a tab": (400, with_field(b"A: b\r\n\tc")),
    "a space before the first field": (400, LINE + b" Host: a\r\n\r\n"),
    "a space before the colon": (400, with_field(b"A : b")),
    "a tab before the colon": (400, with_field(b"A\t: b")),
    "no colon": (400, with_field(b"A")),
    "no name": (400, with_field(b": b")),
    "a space in a name": (400, with_field(b"A B: c")),
    "a parenthesis in a name": (400, with_field(b"A(: c")),
    "a byte above ASCII in a name": (400, with_field(b"\xe4: c")),
    "NUL in a name": (400, with_field(b"A\0: c")),
    # request lines
    "nothing but line ends": (400, b"\r\n\r\n" + GET),
    "no version": (400, b"GET /\r\n" + HOST + b"\r\n"),
    "no target": (400, b"GET HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a tab in place of a space": (400, b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a tab in the target": (400, b"GET /a\tb HTTP/1.1\r\n" + HOST + b"\r\n"),
    "two spaces before the target": (400, b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "two spaces behind the target": (400, b"GET /  HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a space behind the version": (400, b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n"),
    "a space in the target": (400, b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "NUL in the target": (400, b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a fragment": (400, b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a method that is no token": (400, b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a space before the method": (400, b" GET / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a long method": (501, b"A" * (METHOD_BYTES_MAX + 1) + b" / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "CONNECT": (501, b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "TRACE": (501, b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "trace": (501, b"trace / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "TRACK": (501, b"TRACK / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an absolute target": (400, b"GET http://site/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an absolute target of somebody else": (400, b"GET http://other/ HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an authority for a target": (400, b"GET site:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "an asterisk": (400, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a relative target": (400, b"GET a HTTP/1.1\r\n" + HOST + b"\r\n"),
    "HTTP/0.9": (505, b"GET / HTTP/0.9\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\n" + HOST + b"\r\n"),
    "HTTP/2.0": (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
    "HTTP/2": (505, b"GET / HTTP/2\r\n" + HOST + b"\r\n"),
    "HTTP/1.10": (400, b"GET / HTTP/1.10\r\n" + HOST + b"\r\n"),
    "http/1.1": (400, b"GET / http/1.1\r\n" + HOST + b"\r\n"),
    "another protocol": (400, b"GET / ICE/1.0\r\n" + HOST + b"\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # sizes
    "a long target": (414, b"GET /" + b"a" * TARGET_BYTES_MAX + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a long head": (431, with_field(b"A: " + b"a" * HEAD_BYTES_MAX)),
    "a head without end": (431, LINE + HOST + b"A: " + b"a" * HEAD_BYTES_MAX),
    "many fields": (431, with_field(b"\r\n".join([b"A: b"] * FIELDS_MAX))),
    # expectations
    "another expectation": (417, with_field(b"Expect: 200-ok")),
    "two expectations": (417, with_field(b"Expect: 100-continue, 200-ok")),
}

BAD_BODIES: dict[str, tuple[int, bytes]] = {
    "no size": (400, b"\r\nx\r\n0\r\n\r\n"),
    "a size with a sign": (400, b"+1\r\nx\r\n0\r\n\r\n"),
    "a size with 0x": (400, b"0x1\r\nx\r\n0\r\n\r\n"),
    "a size in other digits": (400, "١\r\nx\r\n0\r\n\r\n".encode()),
    "a size with an underscore": (400, b"0_1\r\nx\r\n0\r\n\r\n"),
    "a space before a size": (400, b" 1\r\nx\r\n0\r\n\r\n"),
    "a space behind a size": (400, b"1 \r\nx\r\n0\r\n\r\n"),
    "a space before an extension": (400, b"1 ;a\r\nx\r\n0\r\n\r\n"),
    "a size without bound": (400, b"1" + b"0" * 15 + b"\r\nx"),
    "bare LF behind a size": (400, b"1\nx\r\n0\r\n\r\n"),
    "bare CR behind a size": (400, b"1\rx\r\n0\r\n\r\n"),
    "bare LF in an extension": (400, b"1;a\nb\r\nx\r\n0\r\n\r\n"),
    "a control character in an extension": (400, b"1;\x01\r\nx\r\n0\r\n\r\n"),
    "a space behind an extension": (400, b"1;a \r\nx\r\n0\r\n\r\n"),
    "an extension without a name": (400, b"1;\r\nx\r\n0\r\n\r\n"),
    "an extension without an end": (400, b'1;a="b\r\nx\r\n0\r\n\r\n'),
    "a long extension": (400, b"1;" + b"a" * LINE_BYTES_MAX + b"\r\nx\r\n0\r\n\r\n"),
    "a line without end": (400, b"1;" + b"a" * LINE_BYTES_MAX),
    "many extensions": (400, (b"1;" + b"a" * 200 + b"\r\nx\r\n") * (EXTENSIONS_BYTES_MAX // 200 + 1) + b"0\r\n\r\n"),
    "a chunk that is too long": (400, b"1\r\nxx\r\n0\r\n\r\n"),
    "a chunk that is too short": (400, b"3\r\nx\r\n0\r\n\r\n"),
    "bare LF behind a chunk": (400, b"1\r\nx\n0\r\n\r\n"),
    "nothing behind a chunk": (400, b"1\r\nx0\r\n\r\n"),
    "bare LF at the end": (400, b"0\r\n\n"),
    "a trailer without a colon": (400, b"0\r\nA\r\n\r\n"),
    "a folded trailer": (400, b"0\r\nA: b\r\n c\r\n\r\n"),
    "bare LF behind a trailer": (400, b"0\r\nA: b\n\r\n\r\n"),
    "NUL in a trailer": (400, b"0\r\nA: \0\r\n\r\n"),
    "a length for a trailer": (400, b"0\r\nContent-Length: 1\r\n\r\n"),
    "a coding for a trailer": (400, b"0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "a host for a trailer": (400, b"0\r\nHost: other\r\n\r\n"),
    "many trailers": (431, b"0\r\n" + b"A: b\r\n" * (TRAILERS_MAX + 1) + b"\r\n"),
    "long trailers": (431, b"0\r\nA: " + b"a" * TRAILERS_BYTES_MAX + b"\r\n\r\n"),
    "trailers without end": (431, b"0\r\nA: " + b"a" * TRAILERS_BYTES_MAX),
}


def assert_refused(said: bytes, status: int) -> None:
    """One answer of our own, which says that it is the last."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), said
    assert b"\r\nConnection: close" in head
    assert b"\r\nContent-Length: %d" % len(body) in head and body.endswith(b"\n")


@pytest.mark.parametrize(("status", "request_bytes"), BAD_HEADS.values(), ids=BAD_HEADS)
async def test_a_head_that_is_not_clear_is_refused(status: int, request_bytes: bytes) -> None:
    app = Recorder()
    async with serving(app) as site:
        assert_refused(await site.ask(request_bytes + GET), status)
        async with site.connect() as peer:
            peer.write(GET)
            await peer.exactly(ANSWERED)
            peer.write(request_bytes + GET)
            assert_refused(await peer.rest(), status)
    assert [seen.scope["raw_path"] for seen in app.requests] == [b"/"]


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
@pytest.mark.parametrize(("status", "body"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_is_not_clear_never_ends(status: int, body: bytes, at_once: bool) -> None:
    """The application has not even begun, or is told that the client has left: never that the body is whole."""
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        peer.write(CHUNKED + (body + GET if at_once else b"1\r\na\r\n"))
        if not at_once:
            await until(lambda: app.requests and app.requests[0].body == b"a")
            peer.write(body + GET)
        assert_refused(await peer.rest(), status)
    assert not any(seen.whole for seen in app.requests)
    assert len(app.requests) == (0 if at_once else 1)


async def test_a_bad_request_behind_a_good_one_has_no_influence_on_its_answer() -> None:
    app = Recorder()
    async with serving(app) as site:
        said = await site.ask(GET + b"GET / HTTP/1.1\r\n\r\n" + GET)
        assert said.startswith(ANSWERED)
        assert_refused(said.removeprefix(ANSWERED), 400)
    assert len(app.requests) == 1


async def test_an_http2_client_without_tls_gets_an_end_and_no_words() -> None:
    app = Recorder()
    async with serving(app) as site:
        assert await site.ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0" + GET) == b""
    assert app.requests == []

"""Nothing is read here that llhttp, the strictest parser in wide use (Node's), reads in another way."""

import httptools
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.downstream.chunked import ChunkedBody
from gateway.downstream.request import Unreadable, read_head

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Opinion:
    """What llhttp reads."""

    def __init__(self) -> None:
        self.target = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.complete = 0
        self._heads = 0
        self.trailers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        (self.trailers if self._heads else self.fields).append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self._heads += 1

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete += 1


def one_of(*parts: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(parts)


NAMES = one_of(
    b"A", b"Host", b"Content-Length", b"content-length", b"Transfer-Encoding", b"Connection", b"A b", b"", b"\t"
)
COLONS = one_of(b":", b": ", b" :", b":\t", b"", b"\r\n ", b":\r\n ")
VALUES = one_of(
    b"a", b"", b"5", b"05", b"+5", b"5, 5", b"chunked", b"x, chunked", b"close", b"a\rb", b"a\nb", b"\0", b"\xff"
)
ENDS = one_of(b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b" \r\n", b"\r\r\n")
FIELDS = st.lists(st.tuples(NAMES, COLONS, VALUES, ENDS).map(b"".join), max_size=4).map(b"".join)
TARGETS = one_of(b"/", b"/a?b", b"/a#b", b"/a b", b"*", b"a:80", b"http://a/", b"/%00", b"/\t", b"//")
LINES = st.tuples(
    one_of(b"", b"\r\n", b"\n", b" "),
    one_of(b"GET", b"POST", b"OPTIONS", b"QUERY", b"CONNECT"),
    one_of(b" ", b" ", b"  ", b"\t"),
    TARGETS,
    one_of(b" ", b" ", b"  "),
    one_of(b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"http/1.1"),
    ENDS,
    one_of(b"Host: a\r\n", b"Host: a\r\n", b""),
).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(LINES, FIELDS)
@example(b"POST / HTTP/1.1\r\nHost: a\r\n", b"Content-Length: 05\r\n")
def test_no_head_is_read_that_llhttp_reads_otherwise(line: bytes, fields: bytes) -> None:
    """Methods and bytes above ASCII in targets, which we take and llhttp does not, are left out here."""
    raw = line + fields + b"\r\n"
    if raw.find(b"\r\n\r\n") != len(raw) - 4:
        return
    try:
        request = read_head(raw)
    except Unreadable:
        return
    opinion = Opinion()
    parser = httptools.HttpRequestParser(opinion)
    parser.feed_data(raw)
    assert (opinion.target, tuple(opinion.fields)) == (request.head.target, request.head.fields)
    assert (parser.get_method().decode(), parser.get_http_version()) == (request.method, request.version)
    assert bool(opinion.complete) == (request.body_bytes == 0)
    if request.body_bytes:
        parser.feed_data(b"x" * (request.body_bytes - 1))
        assert not opinion.complete
        parser.feed_data(b"x")
        assert opinion.complete


SIZES = one_of(b"0", b"1", b"3", b"03", b"", b"+1", b"0x1", b" 1", b"1 ", b"1;a", b'1;a="b"', b"1;\x01", b"a" * 17)
CHUNK = st.tuples(SIZES, ENDS, one_of(b"", b"x", b"abc", b"\r\n"), ENDS).map(b"".join)
TRAILERS = st.lists(st.tuples(NAMES, COLONS, VALUES, ENDS).map(b"".join), max_size=2).map(b"".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(CHUNK, max_size=3).map(b"".join), one_of(b"0\r\n", b"0\r\n", b"00;a\r\n", b"0\n"), TRAILERS)
@example(b"1;a\r\nx\r\n", b"0\r\n", b"A:b \r\n")
def test_no_body_is_read_that_llhttp_reads_otherwise(chunks: bytes, last: bytes, trailers: bytes) -> None:
    body = ChunkedBody()
    raw = chunks + last + trailers + b"\r\n"
    try:
        read = body.feed(raw)
    except Unreadable:
        return
    opinion = Opinion()
    parser = httptools.HttpRequestParser(opinion)
    parser.feed_data(CHUNKED)
    parser.feed_data(raw[: len(raw) - len(body.rest)])
    assert (opinion.body, opinion.trailers, bool(opinion.complete)) == (read, body.trailers, body.complete)


def test_a_good_head_is_read() -> None:
    """The comparisons above would also hold for a reader that refuses everything."""
    request = read_head(POST + b"Content-Length: 5\r\nExpect: 100-Continue\r\n\r\n")
    assert (request.method, request.body_bytes, request.keep_alive) == ("POST", 5, True)
    assert request.head.expects_continue

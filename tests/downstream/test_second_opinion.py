"""Nothing is read here that llhttp, the strictest parser in wide use (Node's), reads in another way."""

import httptools
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.downstream.chunked import ChunkedBody
from gateway.downstream.request import Unreadable, read_head

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


#: Of those that changes of a letter or two can make.
KNOWN_METHODS = {"GET", "POST", "PUT", "OPTIONS", "QUERY"}


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


#: What has led two servers to read one message in two ways.
NASTY = one_of(
    *(b"\n", b"\r", b"\r\n", b"\r\n ", b" ", b"\t", b"\x0b", b"\0", b"\x7f", b"\xff", b":", b";", b",", b'"', b"="),
    *(b"0", b"1", b"+", b"x", b"0x", b"#", b"\r\nContent-Length: 1", b"\r\nTransfer-Encoding: chunked"),
)


@st.composite
def spoiled(draw: st.DrawFn, good: st.SearchStrategy[bytes]) -> bytes:
    """Something good, in which up to two places were changed: most of what is drawn can still be read."""
    data = draw(good)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.one_of(st.just(b""), NASTY)) + data[at + draw(st.integers(0, 2)) :]
    return data


FIELD = st.tuples(
    one_of(b"A", b"a-b", b"Accept", b"X_y", b"Connection"),
    one_of(b":", b": ", b":\t "),
    one_of(b"a", b"", b"a b", b"close"),
).map(lambda parts: b"".join(parts) + b"\r\n")
FRAMING = one_of(b"", b"", b"Content-Length: 5\r\n", b"content-length:05 \r\n", b"Transfer-Encoding: chunked\r\n")
HEADS = st.tuples(
    one_of(b"GET /", b"POST /a?b", b"OPTIONS //%00", b"QUERY /;a=b", b"\r\nPUT /a:80"),
    one_of(b" HTTP/1.1\r\nHost: a\r\n", b" HTTP/1.1\r\nhost:[::1]:80\r\n", b" HTTP/1.0\r\n"),
    st.lists(FIELD, max_size=3).map(b"".join),
    FRAMING,
    st.lists(FIELD, max_size=1).map(b"".join),
).map(lambda parts: b"".join(parts) + b"\r\n")


@settings(max_examples=500, deadline=None)
@given(spoiled(HEADS))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 05\r\n\r\n")
def test_no_head_is_read_that_llhttp_reads_otherwise(raw: bytes) -> None:
    """Methods and bytes above ASCII in targets, which we take and llhttp does not, are left out."""
    end = raw.find(b"\r\n\r\n")
    if end < 0:
        return  # what a connection goes on waiting for
    raw = raw[: end + 4]
    try:
        request = read_head(raw)
    except Unreadable:
        return
    if request.method not in KNOWN_METHODS or not request.head.target.isascii():
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


CHUNK = st.tuples(
    one_of(b"3", b"03", b"000003"), one_of(b"", b"", b";a", b";a=b", b';a="b; c"'), one_of(b"abc", b"\r\n0", b"0\r\n")
).map(lambda parts: parts[0] + parts[1] + b"\r\n" + parts[2] + b"\r\n")
BODIES = st.tuples(
    st.lists(CHUNK, max_size=3).map(b"".join),
    one_of(b"0\r\n", b"00;a\r\n"),
    st.lists(FIELD, max_size=2).map(b"".join),
).map(lambda parts: b"".join(parts) + b"\r\n")


@settings(max_examples=500, deadline=None)
@given(spoiled(BODIES))
@example(b"1;a\r\nx\r\n0\r\nA:b \r\n\r\n")
def test_no_body_is_read_that_llhttp_reads_otherwise(raw: bytes) -> None:
    body = ChunkedBody()
    try:
        read = body.feed(raw)
    except Unreadable:
        return
    if not body.complete:
        return  # the rest may still make it unreadable
    opinion = Opinion()
    parser = httptools.HttpRequestParser(opinion)
    parser.feed_data(CHUNKED)
    parser.feed_data(raw[: len(raw) - len(body.rest)])
    assert (opinion.body, opinion.trailers, opinion.complete) == (read, body.trailers, 1)


def test_a_good_head_is_read() -> None:
    """The comparisons above would also hold for a reader that refuses everything."""
    request = read_head(POST + b"Content-Length: 5\r\nExpect: 100-Continue\r\n\r\n")
    assert (request.method, request.body_bytes, request.keep_alive) == ("POST", 5, True)
    assert request.head.expects_continue

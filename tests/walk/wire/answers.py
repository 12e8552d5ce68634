"""Cases about what the client gets: statuses, reason phrases, fields, framing."""

import gzip
from collections.abc import Iterator

from tests.walk.wire.case import (
    ALL,
    BUFFERED,
    METERED,
    PLAIN,
    Case,
    answer,
    answer_chunked,
    ask,
    chat,
    chunked,
    once,
    once_closed,
)
from tests.walk.wire.stage import Answers, Arrives, Asks, Gets

GET, HEAD = ask(), ask(b"HEAD")
USAGE = b'{"id":"c","model":"m","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
JSON = b"Content-Type: application/json"
EVENTS = b"Content-Type: text/event-stream; charset=utf-8"

#: (status, reason phrase)
STATUSES = (
    (200, b"OK"),
    (201, b"Created"),
    (202, b"Accepted"),
    (203, b"Non-Authoritative Information"),
    (206, b"Partial Content"),
    (207, b"Multi-Status"),
    (208, b"Already Reported"),
    (218, b"This is fine"),
    (226, b"IM Used"),
    (299, b"Custom"),
    (300, b"Multiple Choices"),
    (301, b"Moved Permanently"),
    (302, b"Found"),
    (303, b"See Other"),
    (307, b"Temporary Redirect"),
    (308, b"Permanent Redirect"),
    (399, b"Odd"),
    (400, b"Bad Request"),
    (401, b"Unauthorized"),
    (402, b"Payment Required"),
    (403, b"Forbidden"),
    (404, b"Not Found"),
    (408, b"Request Timeout"),
    (409, b"Conflict"),
    (410, b"Gone"),
    (413, b"Content Too Large"),
    (418, b"I'm a teapot"),
    (421, b"Misdirected Request"),
    (422, b"Unprocessable Content"),
    (425, b"Too Early"),
    (429, b"Too Many Requests"),
    (431, b"Request Header Fields Too Large"),
    (451, b"Unavailable For Legal Reasons"),
    (499, b"Client Closed Request"),
    (500, b"Internal Server Error"),
    (501, b"Not Implemented"),
    (502, b"Bad Gateway"),
    (503, b"Service Unavailable"),
    (504, b"Gateway Timeout"),
    (511, b"Network Authentication Required"),
    (520, b"Web Server Returned an Unknown Error"),
    (529, b"Overloaded"),
    (599, b"Network Connect Timeout Error"),
)

REASONS: dict[str, bytes] = {
    "of its own": b"Fine, thanks",
    "in another case": b"oK",
    "of another status": b"Not Found",
    "empty": b"",
    "with spaces inside": b"Very  well   done",
    "with a tab": b"well\tdone",
    "in latin-1": b"tr\xe8s bien",
    "in utf-8": b"\xe2\x9c\x93 ok",
    "with marks": b'<b>"1:2"</b>;=,',
    "of 2 KiB": b"r" * 2_048,
}

FIELDS: dict[str, tuple[bytes, ...]] = {
    "names in every case": (b"CONTENT-TYPE: a/b", b"x-lower: 1", b"X-cAmEl: 2", b"ETag: e", b"WWW-Authenticate: Basic"),
    "order kept": tuple(b"%b: %d" % (name, at) for at, name in enumerate((b"Z", b"A", b"M", b"a1", b"Z1"))),
    "duplicates kept apart": (b"X-Twice: 1", b"Vary: a", b"x-twice: 2", b"VARY: b", b"X-Twice: 1"),
    "many Set-Cookie": tuple(
        b"Set-Cookie: c%d=%d; Path=/; Expires=Thu, 01 Jan 2037 00:00:00 GMT" % (n, n) for n in range(50)
    ),
    "Set-Cookie in every case": (b"set-cookie: a=1", b"SET-COOKIE: b=2", b"Set-Cookie: "),
    "empty values": (b"X-Empty: ", b"X-Full: 1"),
    "empty values without a space": (b"X-Empty:", b"X-Full: 1"),
    "spaces around values": (b"X-Left:   a", b"X-Right: a   ", b"X-Tabs: \ta\t", b"X-Inside: a  b\tc", b"X-None:a"),
    "latin-1 values": (b"X-Latin: caf\xe9", b"X-High: \x80\xa0\xff"),
    "utf-8 values": (b"X-Utf8: \xe2\x82\xac",),
    "every character of a name": (b"X-!#$%&'*+-.^`|~0129: a",),
    "a very long value": (b"X-Long: " + b"v" * 30_000,),
    "60 KiB of fields": tuple(b"X-Wide-%d: %b" % (at, b"w" * 1_000) for at in range(59)),
    "Date and Server": (b"Date: Thu, 01 Jan 1970 00:00:00 GMT", b"Server: uvicorn"),
    "no Date, no Server": (),
    "two Dates": (b"Date: yesterday", b"date: today"),
    "its own request id": (b"X-Request-Id: req_upstream", b"request-id: req_2", b"X-After: 1"),
    "its own gateway request id": (b"X-Request-Id: a", b"X-Gateway-Request-Id: b"),
    "its own session id": (b"X-Session-Id: theirs", b"X-After: 1"),
    "validators": (
        b'ETag: W/"a\xe9"',
        b"Last-Modified: Thu, 01 Jan 1970 00:00:00 GMT",
        b"Age: 7",
        b"Cache-Control: no-store",
    ),
    "CORS": (b"Access-Control-Allow-Origin: *", b"Access-Control-Expose-Headers: a,b"),
    "limits of its own": (
        b"x-ratelimit-remaining-tokens: 9",
        b"x-ratelimit-reset-tokens: 6m0s",
        b'RateLimit: "a";r=1;t=2',
    ),
    "limits of its own, as OpenAI has them": (b"X-RateLimit-Remaining-Tokens: 9",),
    "limits of its own, in the old way": (b"X-RateLimit-Limit: 9", b"RateLimit-Remaining: 1"),
    "limits of its own, as Anthropic has them": (b"anthropic-ratelimit-requests-limit: 9",),
    "a warning of its own": (b"X-RateLimit-Warning: theirs;used=0.99",),
    "Location": (b"Location: /x/../y?a=%2F",),
    "Content-Encoding: gzip": (b"Content-Encoding: gzip",),
    "Content-Encoding: br": (b"Content-Encoding: br",),
    "Via of its own": (b"Via: 1.1 theirs",),
    "Alt-Svc": (b'Alt-Svc: h3=":443"',),
    "Connection: keep-alive": (b"Connection: keep-alive", b"Keep-Alive: timeout=5, max=100", b"X-After: 1"),
    "Connection names a field": (b"Connection: X-Only-Here", b"X-Only-Here: 1", b"X-Stays: 2"),
    "Upgrade offered": (b"Upgrade: h2c", b"Connection: Upgrade", b"X-After: 1"),
    "Proxy-Authenticate": (b"Proxy-Authenticate: Basic", b"X-After: 1"),
    "Trailer without trailers": (b"Trailer: X-Sum",),
}

CHUNKED: dict[str, bytes] = {
    "one": answer_chunked(b"hello"),
    "none": answer_chunked(),
    "several in one packet": answer_chunked(b"a", b"bc", b"def", b"0"),
    "forty in one packet": answer_chunked(*(b"%d" % at for at in range(40))),
    "of one byte each": answer_chunked(*(b"%c" % at for at in range(256))),
    "line breaks inside": answer_chunked(b"\r\n", b"0\r\n\r\n", b"\n\n"),
    "trailers": answer_chunked(b"hello", trailers=(b"X-Sum: 1", b"x-sum: 2", b"X-Empty: ")),
    "trailers announced": answer_chunked(b"hello", lines=(b"Trailer: X-Sum",), trailers=(b"X-Sum: abc",)),
    "trailers without a body": answer_chunked(lines=(b"Trailer: X-Sum",), trailers=(b"X-Sum: 0",)),
    "trailers with spaces": answer_chunked(b"hello", trailers=(b"X-Sum:1", b"X-Left:   a  ")),
    "trailers that may not be": answer_chunked(
        b"hello", trailers=(b"Set-Cookie: a=1", b"X-Sum: 1", b"X-Request-Id: a", b"Retry-After: 9", b"Content-Type: b")
    ),
    "many trailers": answer_chunked(b"hello", trailers=tuple(b"X-T-%d: %d" % (at, at) for at in range(40))),
    "extensions": answer(b"Transfer-Encoding: chunked", body=None) + b'5;a=1;b="c;d"\r\nhello\r\n0;last\r\n\r\n',
    "sizes in capitals and zeros": answer(b"Transfer-Encoding: chunked", body=None)
    + b"000A\r\n0123456789\r\n1a\r\nabcdefghijklmnopqrstuvwxyz\r\n00\r\n\r\n",
    "the coding in capitals": answer(b"transfer-encoding: CHUNKED", body=None) + chunked(b"hello"),
    "Transfer-Encoding first": answer(b"Transfer-Encoding: chunked", b"X-Last: 1", body=None) + chunked(b"hello"),
    "compressed": answer_chunked(b"\x1f\x8b\x08\x00", b"not really", lines=(b"Content-Encoding: gzip",)),
    "a status of 404": answer(b"Transfer-Encoding: chunked", status=404, reason=b"No", body=None) + chunked(b"none"),
}

#: Answers whose body ends with the connection.
UNTIL_CLOSED: dict[str, bytes] = {
    "a body": answer(b"Content-Type: text/plain", body=None) + b"until the end",
    "an empty body": answer(body=None),
    "Connection: close": answer(b"Connection: close", body=None) + b"until the end",
    "HTTP/1.0": answer(body=None, version=b"1.0") + b"until the end",
    "HTTP/1.0 and its fields": answer(b"Server: SimpleHTTP", b"content-TYPE: a/b", body=None, version=b"1.0") + b"old",
}


def cases() -> Iterator[Case]:
    for status, reason in STATUSES:
        yield Case(f"status {status}", once(chat(), answer(status=status, reason=reason)), ALL)
    for name, reason in REASONS.items():
        yield Case(f"reason {name}", once(GET, answer(reason=reason)), (PLAIN, METERED))
    yield Case("reason left out", once(GET, b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"))
    yield Case("reason of an error of its own", once(GET, answer(status=503, reason=b"Slow down, please")))
    for name, lines in FIELDS.items():
        yield Case(f"answer fields: {name}", once(GET, answer(*lines)), (PLAIN, METERED))
        if "limits" in name:
            yield Case(f"answer fields: {name}, to a chat", once(chat(), answer(*lines)), (BUFFERED,))
    # Here the ways differ: what is left is the dialect's.
    policy = answer(b'RateLimit-Policy: "a";q=1', b"X-After: 1")
    yield Case("answer fields: a policy of its own", once(GET, policy))
    yield Case("answer fields: a policy of its own, to a chat", once(chat(), policy), (METERED,))
    yield from _errors()
    yield from _lengths()
    for name, said in CHUNKED.items():
        yield Case(f"answer in chunks: {name}", once(chat(), said), ALL)
    for name, said in UNTIL_CLOSED.items():
        yield Case(f"answer until closed: {name}", once_closed(GET, said), (PLAIN, METERED))
    yield Case("answer HTTP/1.0: with a length", once_closed(GET, answer(version=b"1.0")))
    yield Case("answer HTTP/1.0: kept alive", once(GET, answer(b"Connection: keep-alive", version=b"1.0")))
    yield Case("answer with a length, then closed", once_closed(GET, answer(b"Connection: close")), (PLAIN, METERED))
    yield Case(
        "answer in chunks, then closed", once_closed(chat(), answer_chunked(b"a", lines=(b"Connection: close",))), ALL
    )
    yield from _to_old_clients()
    yield from _without_a_body()


def _errors() -> Iterator[Case]:
    """An upstream's own errors are the client's to see, word for word."""
    body = b'{"error":{"message":"slow down","type":"rate_limit_error","code":null}}'
    for status, lines in (
        (429, (b"Retry-After: 7", b"retry-after-ms: 6500", b"x-should-retry: true")),
        (429, (b"Retry-After: Thu, 01 Jan 2037 00:00:00 GMT",)),
        (503, (b"Retry-After: 120",)),
        (529, (b"x-should-retry: true", b"request-id: req_1")),
        (401, (b'WWW-Authenticate: Bearer realm="x"',)),
        (402, (b"x-should-retry: false",)),
        (502, (b"Server: nginx",)),
    ):
        said = answer(JSON, *lines, status=status, reason=b"Refused", body=body)
        yield Case(f"upstream error {status} with {lines[0].decode()}", once(chat(), said), ALL)
    yield Case("405 with Allow", once(ask(b"PUT"), answer(b"Allow: GET", status=405, reason=b"Method Not Allowed")))


def _lengths() -> Iterator[Case]:
    """Bodies with Content-Length."""
    yield Case("answer: empty", once(chat(), answer(body=b"")), ALL)
    yield Case("answer: every byte", once(chat(), answer(body=bytes(range(256)))), ALL)
    yield Case("answer: 1 MiB", once(GET, answer(body=bytes(range(256)) * 4_096)), (PLAIN, METERED))
    yield Case("answer: JSON with usage", once(chat(), answer(JSON, body=USAGE)), ALL)
    packed = gzip.compress(USAGE, mtime=0)
    yield Case("answer: gzip with usage", once(chat(), answer(JSON, b"Content-Encoding: gzip", body=packed)), ALL)
    yield Case("answer: broken gzip", once(chat(), answer(JSON, b"Content-Encoding: gzip", body=packed[:-9])), ALL)
    yield Case(
        "answer: Content-Length first", once(GET, b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Last: 1\r\n\r\nok")
    )
    yield Case("answer: Content-Length with zeros", once(GET, b"HTTP/1.1 200 OK\r\nContent-Length: 002\r\n\r\nok"))
    part = answer(b"Content-Range: bytes 0-4/100", b"Accept-Ranges: bytes", status=206, reason=b"Partial Content")
    yield Case("range: one", once(ask(b"GET", b"/x", b"Range: bytes=0-4"), part), (PLAIN, METERED))
    parts = b"--b\r\nContent-Range: bytes 0-0/9\r\n\r\na\r\n--b\r\nContent-Range: bytes 8-8/9\r\n\r\ni\r\n--b--\r\n"
    lines = (b"Content-Type: multipart/byteranges; boundary=b",)
    said = answer(*lines, status=206, reason=b"Partial Content", body=parts)
    yield Case("range: several", once(ask(b"GET", b"/x", b"Range: bytes=0-0,8-8"), said), (PLAIN, METERED))
    none = answer(b"Content-Range: bytes */5", status=416, reason=b"Range Not Satisfiable", body=b"")
    yield Case("range: none", once(ask(b"GET", b"/x", b"Range: bytes=9-"), none))
    head, rest = answer(b"Content-Length: 6", body=None), (b"ab", b"cd", b"ef")
    steps = tuple(line for data in rest for line in (Answers(data), Gets(data)))
    yield Case(
        "answer: in steps", (Asks(GET), Arrives(), Answers(head), Gets(b"\r\n\r\n"), *steps, Gets()), (PLAIN, METERED)
    )
    split = tuple(Answers(head[at : at + 1]) for at in range(len(head)))
    yield Case("answer: head byte by byte", (Asks(GET), Arrives(), *split, Answers(b"abcdef"), Gets()))


def _to_old_clients() -> Iterator[Case]:
    """What HTTP/1.0 clients get of an HTTP/1.1 answer (RFC 9112 §6.1, §7)."""
    old = ask(version=b"1.0")
    yield Case("to HTTP/1.0: chunks", once_closed(old, answer_chunked(b"a", b"bc")), (PLAIN, METERED))
    trailing = answer_chunked(b"a", lines=(b"Trailer: X-Sum",), trailers=(b"X-Sum: 1",))
    yield Case("to HTTP/1.0: chunks and trailers", once_closed(old, trailing))
    yield Case("to HTTP/1.0: until closed", once_closed(old, answer(body=None) + b"until the end"))
    yield Case("to HTTP/1.0: an HTTP/1.0 answer", once_closed(old, answer(version=b"1.0")))
    yield Case("to HTTP/1.0: 103", once_closed(old, b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + answer()))


def _without_a_body() -> Iterator[Case]:
    """Answers that end with their head, whatever it says."""
    for name, lines in {
        "Content-Length": (b"Content-Length: 5000",),
        "Content-Length: 0": (b"Content-Length: 0",),
        "Transfer-Encoding": (b"Transfer-Encoding: chunked",),
        "no framing": (b"X-Odd: 1",),
        "a range": (b"Content-Range: bytes 0-4/100", b"Content-Length: 5"),
    }.items():
        yield Case(f"HEAD: {name}", once(HEAD, answer(*lines, body=None)), (PLAIN, METERED))
    yield Case("HEAD: 404", once(HEAD, answer(b"Content-Length: 9", status=404, reason=b"Not Found", body=None)))
    yield Case("HEAD: events", once(HEAD, answer(EVENTS, body=None)))
    for status, reason, named in (
        (204, b"No Content", {"alone": (), "fields": (b"ETag: e", b"X-Odd: 1")}),
        (205, b"Reset Content", {"Content-Length: 0": (b"Content-Length: 0",)}),
        (
            304,
            b"Not Modified",
            {
                "alone": (),
                "validators": (b'ETag: "a"', b"Vary: x", b"Cache-Control: no-cache", b"Date: today"),
                "Content-Length": (b'ETag: "a"', b"Content-Length: 5000"),
                "Transfer-Encoding": (b"Transfer-Encoding: chunked",),
            },
        ),
    ):
        for name, lines in named.items():
            said = answer(*lines, status=status, reason=reason, body=None)
            yield Case(f"{status}: {name}", once(GET, said), (PLAIN, METERED))
    yield Case(
        "205: in chunks",
        once(GET, answer(b"Transfer-Encoding: chunked", status=205, reason=b"R", body=None) + chunked()),
    )
    yield Case("204: to a chat", once(chat(), answer(status=204, reason=b"No Content", body=None)), ALL)

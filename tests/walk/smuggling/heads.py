"""Attacks on what a head says: request lines, fields, expectations, changes of protocol."""

from tests.walk.smuggling.payload import AUTH, CHUNKED, END, HIDDEN, Payload, chunk, length, request

LINES = [
    *(
        Payload(f"{line!r}", line + b"\r\nHost: a\r\n" + AUTH + b"\r\n" + HIDDEN, (400,))
        for line in (
            b"GET  /x HTTP/1.1",
            b"GET\t/x\tHTTP/1.1",
            b"GET /x\tHTTP/1.1",
            b"GET\x0b/x HTTP/1.1",
            b" GET /x HTTP/1.1",
            b"\tGET /x HTTP/1.1",
            b"GET /x HTTP/1.1 ",
            b"GET /x HTTP/1.1\t",
            b"GET /x  HTTP/1.1",
            b"GET /x HTTP/1.1 HTTP/1.1",
            b"GET /x y HTTP/1.1",
            b"GET /x HTTP/1.1\x00",
            b"GET /x\x00 HTTP/1.1",
            b"GET /x\x7f HTTP/1.1",
            b"GET /x\x0c HTTP/1.1",
            b"GET /x\r HTTP/1.1",
            b"GET /x\n HTTP/1.1",
            b"GET /x HTTP/1.1\r",
            b"GET /x HTTP/1.1\rX: y",
            b"GET /x HTTP/1.1\nX: y",
            b"GET /x http/1.1",
            b"GET /x HTTP/01.1",
            b"GET /x HTTP/1.1.1",
            b"GET /x HTTP/1,1",
            b"GET /x HTTP/+1.1",
            b"GET /x HTTP /1.1",
            b"GET /x HTTP",
            b"GET /x XTTP/1.1",
            b"GET /x",
            b"GET",
            b"GET HTTP/1.1",
            b"G(T /x HTTP/1.1",
            b"GET: /x HTTP/1.1",
            b"G\xc9T /x HTTP/1.1",
            b"GE\x00T /x HTTP/1.1",
            b"\x00GET /x HTTP/1.1",
            b"\xef\xbb\xbfGET /x HTTP/1.1",
            b"GET x HTTP/1.1",
            b"GET * HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"GET a:80 HTTP/1.1",
            b"GET http://a/x HTTP/1.1",
            b"GET http://b/x HTTP/1.1",
            b"GET http://a@b/x HTTP/1.1",
            b"GET HTTP://a/x HTTP/1.1",
            b"GET https://b/x HTTP/1.1",
            b"GET @b/x HTTP/1.1",
            b"GET :80/x HTTP/1.1",
            b"GET \\x HTTP/1.1",
            b"GET ?x HTTP/1.1",
            b"GET #x HTTP/1.1",
            b"GET /x#y HTTP/1.1",
            b"GET /x?y#z HTTP/1.1",
        )
    ),
    *(
        Payload(f"{line!r}", line + b"\r\nHost: a\r\n" + AUTH + b"\r\n" + HIDDEN, (status,))
        for line, status in (
            (b"GET /x HTTP/2.0", 505),
            (b"GET /x HTTP/1.2", 505),
            (b"GET /x HTTP/0.9", 505),
            (b"GET /x HTTP/3", 505),
            (b"CONNECT a:80 HTTP/1.1", 501),
            (b"CONNECT /x HTTP/1.1", 501),
            (b"TRACE /x HTTP/1.1", 501),
            (b"trace /x HTTP/1.1", 501),
            (b"TRACK /x HTTP/1.1", 501),
        )
    ),
    # Framed well enough for the connection to go on: what follows is a request of its own, admitted as one.
    *(
        Payload(f"{line!r}", line + b"\r\nHost: a\r\n" + AUTH + b"\r\n" + HIDDEN, (400, 200), (b"/smuggled",))
        for line in (
            b"GET /%00 HTTP/1.1",
            b"GET /x%0d%0aX:%20y HTTP/1.1",
            b"GET /x%0A HTTP/1.1",
            b"GET /../x HTTP/1.1",
            b"GET /%2e%2e/x HTTP/1.1",
            b"GET /x%zz HTTP/1.1",
            b"GET //-/metrics HTTP/1.1",
            b"GET /./-/metrics HTTP/1.1",
        )
    ),
    Payload("an HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN, ()),
    Payload(
        "an HTTP/2 preface behind a request",
        request() + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + HIDDEN,
        (200,),
        ends_unsaid=True,
    ),
    Payload("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n" + HIDDEN, (400,)),
    Payload("line ends of LF alone", request().replace(b"\r\n", b"\n") + HIDDEN, (400,)),
    Payload("line ends of CR alone", request().replace(b"\r\n", b"\r") + HIDDEN, (400,)),
    Payload("an end of LF LF", request()[:-4] + b"\n\n" + HIDDEN, (400,)),
    Payload("an end of CR LF LF", request()[:-4] + b"\r\n\n" + HIDDEN, (400,)),
    Payload("an end of LF CR LF", request()[:-4] + b"\n\r\n" + HIDDEN, (400,)),
    Payload("an end of CR CR LF", request()[:-4] + b"\r\n\r\r\n" + HIDDEN, (400,)),
]
FIELDS = [
    *(
        Payload(f"{line!r}", request(line, body=HIDDEN, line=b"GET /x HTTP/1.1"), (400,))
        for line in (
            b":method: POST",
            b":path: /smuggled",
            b":authority: b",
            b":scheme: https",
            b": empty",
            b"no colon",
            b" leading: space",
            b"\tleading: tab",
            b"trailing : space",
            b"trailing\t: tab",
            b"in side: space",
            b"X: y\r\n folded",
            b"X: y\r\n\tfolded",
            b"X: y\r\n \r\n",
            b"X: y\n folded",
            b"X: a\rb",
            b"X: a\nb",
            b"X: a\x00b",
            b"X: a\x01b",
            b"X: a\x1bb",
            b"X: a\x7fb",
            b"X\x00: y",
            b"X\r: y",
            b"X\n: y",
            b"X\xe9: y",
            b"X@Y: z",
            b"X/Y: z",
            b"X[Y]: z",
            b'"X": y',
            b"GET /smuggled HTTP/1.1",
            b"\r",
            b"X: y\r",
            b"\x00",
            b"Host: a",
            b"Host: b",
            b"host: b",
            b"HOST : b",
            b"Expect: 100-continue\r\nExpect: 100-continue",
        )
    ),
    *(
        Payload(f"{host!r}", request(host=host, body=HIDDEN), (400,))
        for host in (
            b"",
            b"Host:\r\n",
            b"Host: \r\n",
            b"Host: a b\r\n",
            b"Host: a, b\r\n",
            b"Host: a/b\r\n",
            b"Host: a@b\r\n",
            b"Host: a\\b\r\n",
            b"Host: a#b\r\n",
            b"Host: a?b\r\n",
            b"Host: a:80:90\r\n",
            b"Host: a:x\r\n",
            b"Host: http://a\r\n",
            b"Host: [::1\r\n",
            b"Host: a\x00\r\n",
            b"Host: a\xe9\r\n",
            b"Host : a\r\n",
            b" Host: a\r\n",
            b"Host: a\r\nHost: b\r\n",
            b"Host: a\r\nhost: a\r\n",
            b"Host: a\r\n\tb\r\n",
        )
    ),
    *(
        Payload(f"{line!r} crosses or goes", request(line, line=b"GET /x HTTP/1.1"), (200,))
        for line in (
            b"X:y",
            b"X:",
            b"X: \t ",
            b"X: \xe9\xff",
            b"X: a\tb",
            b"Connection: Authorization",
            b"Connection: Host, X-Org-Id, Content-Length, Transfer-Encoding, X-Forwarded-For",
            b"Connection: close, Content-Length",
            b"Connection: keep-alive, close",
            b"Connection: ,,, ,",
            b"Connection: X\x2c Y",
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"TE: chunked",
            b"TE: trailers\r\nConnection: TE",
            b"X-Org-Id: b",
            b"X_Org_Id: b",
            b"x-org-id: b\r\nX-ORG-ID: c",
            b"X-Original-URL: /smuggled",
            b"Forwarded: for=b",
            b"Trailer: Content-Length",
        )
    ),
    Payload("a hundred and one fields", request(*[b"X: y"] * 99), (431,)),
    Payload("a head too large", request(b"X: " + b"y" * 70_000), (431,)),
    Payload("a target too long", request(line=b"GET /" + b"x" * 40_000 + b" HTTP/1.1"), (414,)),
    Payload("a method too long", request(line=b"G" * 100 + b" /x HTTP/1.1"), (501,)),
]
EXPECT = [
    *(
        Payload(f"{value!r}", request(b"Expect: " + value, length(HIDDEN), body=HIDDEN), (417,))
        for value in (b"", b"y 100-continue", b"100-continue, y", b"100-continue;q=1", b"200-ok", b"100-continu", b"x")
    ),
    *(
        Payload(f"{value!r}", request(b"Expect: " + value, length(HIDDEN), body=HIDDEN, line=line), (200,))
        for value in (b"100-continue", b"100-Continue")
        for line in (b"POST /x HTTP/1.1", b"GET /x HTTP/1.1", b"OPTIONS /x HTTP/1.1")
    ),
    Payload("in chunks", request(b"Expect: 100-continue", CHUNKED, body=chunk(HIDDEN) + END), (200,)),
    Payload("without a body", request(b"Expect: 100-continue", body=HIDDEN), (200, 200), (b"/x", b"/smuggled")),
    Payload(
        "with a body of none",
        request(b"Expect: 100-continue", b"Content-Length: 0", body=HIDDEN),
        (200, 200),
        (b"/x", b"/smuggled"),
    ),
    Payload(
        "with two framings", request(b"Expect: 100-continue", CHUNKED, b"Content-Length: 4", body=END + HIDDEN), (400,)
    ),
    Payload("folded", request(b"Expect:\r\n 100-continue", length(HIDDEN), body=HIDDEN), (400,)),
    Payload(
        "HTTP/1.0",
        request(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello", line=b"POST /x HTTP/1.0"),
        (200,),
    ),
]
_H2C = (b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
SEC_KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
VERSION = b"Sec-WebSocket-Version: 13"
UPGRADES = [
    Payload("h2c", request(b"Connection: Upgrade, HTTP2-Settings", *_H2C) + HIDDEN, (200,)),
    Payload("h2c, settings not nominated", request(b"Connection: Upgrade", *_H2C) + HIDDEN, (200,)),
    Payload("h2c not nominated", request(*_H2C), (200,)),
    Payload("h2c and a body", request(b"Connection: Upgrade", *_H2C, length(HIDDEN), body=HIDDEN), (200,)),
    Payload("h2 and TLS", request(b"Connection: Upgrade", b"Upgrade: h2, TLS/1.2") + HIDDEN, (200,)),
    Payload(
        "h2c beside a websocket",
        request(b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c") + HIDDEN,
        (403,),
    ),
    Payload(
        "a websocket where none may be",
        request(b"Connection: Upgrade", b"Upgrade: websocket", SEC_KEY) + HIDDEN,
        (403,),
    ),
    Payload("an unknown protocol", request(b"Connection: Upgrade", b"Upgrade: x") + HIDDEN, (200,)),
    Payload("an empty one", request(b"Connection: Upgrade", b"Upgrade:") + HIDDEN, (200, 200), (b"/x", b"/smuggled")),
    Payload(
        "websocket not nominated",
        request(b"Upgrade: websocket", line=b"GET /x HTTP/1.1") + HIDDEN,
        (200, 200),
        (b"/x", b"/smuggled"),
    ),
]


def handshake(*fields: bytes, line: bytes = b"GET /ws HTTP/1.1") -> bytes:
    return request(b"Upgrade: websocket", b"Connection: Upgrade", *fields, line=line)


#: The upstream answers the one that is whole with 200, so there is no tunnel, whatever the client says next.
FAKE_HANDSHAKES = [
    Payload("declined", handshake(VERSION, SEC_KEY) + HIDDEN, (200,), (b"/ws",)),
    Payload("of no version", handshake(SEC_KEY) + HIDDEN, (426,)),
    Payload("of a wrong version", handshake(b"Sec-WebSocket-Version: 777", SEC_KEY) + HIDDEN, (426,)),
    Payload("without a key", handshake(VERSION) + HIDDEN, (400,)),
    Payload("by POST", handshake(VERSION, SEC_KEY, line=b"POST /ws HTTP/1.1") + HIDDEN, (400,)),
    Payload("by HTTP/1.0", handshake(VERSION, SEC_KEY, line=b"GET /ws HTTP/1.0") + HIDDEN, (400,)),
    Payload("with a body", handshake(VERSION, SEC_KEY, length(HIDDEN)) + HIDDEN, (400,)),
    Payload("with chunks", handshake(VERSION, SEC_KEY, CHUNKED) + END + HIDDEN, (400,)),
]

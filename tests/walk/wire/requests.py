"""Cases about what the upstream gets: methods, targets, fields, bodies."""

from collections.abc import Iterator

from tests.walk.wire.case import (
    ALL,
    CHAT,
    METERED,
    PLAIN,
    Case,
    answer,
    ask,
    ask_chunked,
    chat,
    chunk,
    chunked,
    once,
    once_closed,
)
from tests.walk.wire.stage import Answers, Arrives, Asks, Drips, Gets

#: Those that parsers know, and some that nobody does; HEAD has cases of its own.
METHODS = (
    b"ACL BIND CHECKOUT COPY DELETE GET LINK LOCK M-SEARCH MERGE MKACTIVITY MKCALENDAR MKCOL MOVE NOTIFY OPTIONS PATCH "
    b"POST PROPFIND PROPPATCH PURGE PUT QUERY REBIND REPORT SEARCH SOURCE SUBSCRIBE UNBIND UNLINK UNLOCK UNSUBSCRIBE"
    b" FOO get Post X!#$%&'*+-.^_`|~9"
).split()

TARGETS = (
    b"/",
    b"/a/b/c",
    b"/a/b/",
    b"/a%2Fb",
    b"/a%2fb",
    b"/%61%62",
    b"/a%20b",
    b"/%E2%82%AC",
    b"/%e2%82%ac",
    b"/%ff%FE",
    b"/100%25",
    b"/a%3Fb",
    b"/a%23b",
    b"/a;v=1;w=2/b",
    b"/a,b",
    b"/a+b",
    b"/a:b@c",
    b"/~user/!$&'()*=",
    b"/[a]",
    b"/{b}",
    b"/a|b",
    b"/a^b`c",
    b'/"quoted"',
    b"/<a>",
    b"/...",
    b"/.well-known/x",
    b"/a..b",
    b"//",
    b"//a//b//",
    b"/./a/./b/.",
    b"/a/../b",
    b"/%2e/a",
    b"/a%2F..%2Fb",
    b"/a;/../b",
    b"/a\\b",
    b"/a%5Cb",
    b"/a%252Fb",
    b"/x?",
    b"/x??",
    b"/x?a",
    b"/x?a=",
    b"/x?=b",
    b"/x?&&",
    b"/x?a=1&&b=2&",
    b"/x?a=1&a=2&A=3",
    b"/x?a=1;b=2",
    b"/x?a+b=c+d",
    b"/x?a=%2F%2f%3F&b=%00",
    b"/x?q=a/../b/./c//d",
    b"/x?u=http://other.example/y?z",
    b"/x?%zz=%",
    b"/x?a[0]=1&a[]=2",
    b'/x?q={"a":[1,2]}',
    b"/x?a|b^c`d",
    b"/x?\\",
    b"/x?\xe2\x82\xac=\xff",
    b"/caf\xc3\xa9",
    b"/caf\xe9",
    b"/trpc/a.b,c.d?batch=1&input=%7B%220%22%3A%7B%7D%7D",
    b"/" + b"deep/" * 200,
    b"/" + b"l" * 4000,
)

#: Field lines between the credential and the end of the head.
FIELDS: dict[str, tuple[bytes, ...]] = {
    "names in every case": (b"ACCEPT: a", b"accept-language: b", b"X-cAmEl-CaSe: c", b"x-LOWER: d"),
    "order kept": tuple(b"%b: %d" % (name, at) for at, name in enumerate((b"Z", b"A", b"M", b"a1", b"Z1", b"B"))),
    "duplicates kept apart": (b"X-Twice: 1", b"Accept: a", b"x-twice: 2", b"X-Twice: 1"),
    "empty values": (b"X-Empty: ", b"X-Full: 1", b"x-empty-too: "),
    "empty values without a space": (b"X-Empty:", b"X-Full: 1"),
    "spaces around values": (b"X-Left:   a", b"X-Right: a   ", b"X-Tabs: \ta\t", b"X-Inside: a  b\tc", b"X-None:a"),
    "only spaces": (b"X-Spaces:    ", b"X-Tab: \t"),
    "latin-1 values": (b"X-Latin: caf\xe9", b"X-High: \x80\xa0\xff"),
    "utf-8 values": (b"X-Utf8: \xe2\x82\xac \xf0\x9f\x98\x80",),
    "quotes, commas, semicolons": (b'X-Odd: "a, b"; c="d\\"e", <f>; {g}; |', b"X-Colon: a:b::c", b"X-Eq: ===="),
    "every character of a name": (b"X-!#$%&'*+-.^`|~0129: a",),
    "one letter": (b"a: 1", b"B: 2"),
    "underscores of the client's own": (b"x_my_field: 1", b"X_Y: 2"),
    "a very long value": (b"X-Long: " + b"v" * 30_000,),
    "a very long name": (b"X-" + b"n" * 4_000 + b": v",),
    "many fields": tuple(b"X-Field-%d: %d" % (at, at) for at in range(90)),
    "60 KiB of fields": tuple(b"X-Wide-%d: %b" % (at, b"w" * 1_000) for at in range(59)),
    "many cookies in one line": (b"Cookie: " + b"; ".join(b"c%d=%d" % (at, at) for at in range(60)),),
    "several Cookie lines": (b"Cookie: a=1", b"cookie: b=2", b"Cookie: c="),
    "Accept-Encoding as it is": (b"Accept-Encoding: gzip;q=1.0, br;q=0.5, *;q=0",),
    "ranges and validators": (
        b"Range: bytes=0-1,5-",
        b'If-Range: W/"e"',
        b'If-None-Match: "a", W/"b", *',
        b"If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT",
    ),
    "traces": (b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"tracestate: a=b"),
    "a stainless client": (b"X-Stainless-Retry-Count: 0", b"OpenAI-Organization: o", b"Idempotency-Key: k"),
    "an Anthropic client": (b"anthropic-version: 2023-06-01", b"anthropic-beta: a,b"),
    "browsers": (b"Origin: https://shop.example", b"Referer: https://shop.example/?a=%20", b"Sec-Fetch-Mode: cors"),
    "a client's Via": (b"Via: 1.1 before", b"Max-Forwards: 3"),
    "Connection: keep-alive": (b"Connection: keep-alive", b"Keep-Alive: timeout=5"),
    "Connection names a field": (b"Connection: x-only-here, keep-alive", b"X-Only-Here: 1", b"X-Stays: 2"),
    "Connection names what it may not": (b"Connection: cookie, content-type", b"Cookie: a=1", b"Content-Type: a/b"),
    "Proxy-Connection": (b"Proxy-Connection: keep-alive", b"X-After: 1"),
    "TE: trailers": (b"TE: trailers", b"Connection: te", b"X-After: 1"),
    "TE with more": (b"X-Before: 1", b"Connection: close-not, TE, x-gone", b"te: gzip, Trailers", b"X-Gone: 1"),
    "TE without trailers": (b"TE: gzip", b"Connection: TE", b"X-After: 1"),
    "TE that Connection does not name": (b"TE: trailers", b"X-After: 1"),
    "a proxy's credential": (b"Proxy-Authorization: Basic YTpi", b"X-After: 1"),
    "an upgrade nobody offers": (b"Connection: upgrade, http2-settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    "forged identity": (b"X-Org-Id: evil", b"x-user-id: evil", b"X-Plan: all", b"X-Request-Id: mine", b"X-Mine: 1"),
    "forged identity in disguise": (b"X_Org_Id: evil", b"x-org_id: evil", b"X-Mine: 1"),
    "forged session": (b"X-Session-Context: e30", b"x-session-signature: v1", b"X-Session-Turn: 9", b"X-Mine: 1"),
    "forged gateway fields": (b"X-Gateway-Anything: 1", b"x_gateway_other: 2", b"X-Mine: 1"),
    "a session of the client's": (b"X-Session-Id: talk.{way}",),
    "claims about the client": (
        b"X-Forwarded-For: 1.2.3.4",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: evil",
        b"Forwarded: for=1.2.3.4",
        b"X-Real-IP: 1.2.3.4",
        b"X-Forwarded-Port: 1",
        b"X-Forwarded-Anything: 1",
        b"X-Original-URL: /admin",
        b"X-Rewrite-URL: /admin",
        b"X-Mine: 1",
    ),
}

#: What a client may do with a body: (lines, body as framed).
BODIES: dict[str, bytes] = {
    "Content-Length: 0": ask(b"POST", b"/x", body=b""),
    "one byte": ask(b"POST", b"/x", body=b"a"),
    "every byte": ask(b"PUT", b"/x", body=bytes(range(256))),
    "line breaks": ask(b"POST", b"/x", body=b"\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n"),
    "1 MiB": ask(b"PUT", b"/x", body=bytes(range(256)) * 4096),
    "1 MiB and a byte": ask(b"PUT", b"/x", body=b"x" * (1 << 20) + b"y"),
    "a GET with a body": ask(b"GET", b"/x", body=b"asked"),
    "a DELETE with a body": ask(b"DELETE", b"/x", body=b"asked"),
    "gzip": ask(b"POST", b"/x", b"Content-Encoding: gzip", body=b"\x1f\x8b\x08\x00not really"),
    "br": ask(b"POST", b"/x", b"Content-Encoding: br", body=b"\x8b\x02\x80hello\x03"),
    "two encodings": ask(b"POST", b"/x", b"Content-Encoding: gzip, br", body=b"\x00\x01"),
    "multipart": ask(
        b"POST", b"/x", b'Content-Type: multipart/form-data; boundary="b"', body=b"--b\r\n\r\na\r\n--b--\r\n"
    ),
    "Content-Length first": (
        b"POST {at}/x HTTP/1.1\r\ncontent-length: 4\r\nHost: shop.example\r\nauthorization: Bearer {key}\r\n"
        b"X-Last: 1\r\n\r\nbody"
    ),
}

CHUNKED_BODIES: dict[str, bytes] = {
    "one chunk": ask_chunked(b"hello"),
    "no chunk": ask_chunked(),
    "several chunks in one packet": ask_chunked(b"a", b"bc", b"def"),
    "trailers": ask_chunked(b"hello", trailers=(b"X-Sum: 1", b"x-sum: 2", b"X-Empty: ")),
    "trailers with spaces": ask_chunked(b"hello", trailers=(b"X-Sum:1", b"X-Left:   a  ")),
    "trailers announced": ask_chunked(b"hello", lines=(b"Trailer: X-Sum",), trailers=(b"X-Sum: abc",)),
    "trailers without a body": ask_chunked(trailers=(b"X-Sum: 0",)),
    "trailers that may not be": ask_chunked(
        b"hello",
        trailers=(
            b"X-Sum: 1",
            b"Content-Type: a",
            b"x-org-id: evil",
            b"Authorization: a",
            b"x_session-id: b",
            b"X-Sum: 2",
        ),
    ),
    "chunk extensions": ask(b"POST", b"/x", b"Transfer-Encoding: chunked")
    + b'5;a=1;b="c;d"\r\nhello\r\n0;last\r\n\r\n',
    "sizes in capitals and zeros": ask(b"POST", b"/x", b"Transfer-Encoding: chunked")
    + b"00A\r\n0123456789\r\n000\r\n\r\n",
    "the coding in capitals": ask(b"POST", b"/x", b"transfer-encoding: Chunked") + chunked(b"hello"),
    "Transfer-Encoding first": (
        b"POST {at}/x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nHost: shop.example\r\nAuthorization: Bearer {key}\r\n"
        b"X-Last: 1\r\n\r\n"
    )
    + chunked(b"hello"),
}


def cases() -> Iterator[Case]:
    for method in METHODS:
        yield Case(f"method {method.decode()}", once(ask(method)))
    yield Case("method HEAD", once(ask(b"HEAD"), answer(b"Content-Length: 5", body=None)), (PLAIN, METERED))
    for target in TARGETS:
        text = target[:40].decode("latin-1").encode("ascii", "backslashreplace").decode()
        yield Case(f"target {text}", once(ask(b"GET", target)))
    yield Case("target with a query of 8 KiB", once(ask(b"GET", b"/x?" + b"q=%41&" * 1365)))
    for name, lines in FIELDS.items():
        yield Case(f"fields: {name}", once(ask(b"GET", b"/x", *lines)), (PLAIN, METERED))
    yield Case("fields: credential in X-Api-Key", once(_with_x_api_key()))
    yield Case("fields: two credentials", once(ask(b"GET", b"/x", b"X-Api-Key: other", b"X-After: 1")))
    yield Case("fields: Host last and in capitals", once(_host_last()))
    yield Case("fields: Host with a port", once(_host_last(b"Shop.Example:8080")))
    yield Case("chat: as SDKs send it", once(chat(b"Accept: application/json", b"User-Agent: a/1 (b; c)")), ALL)
    yield Case("chat: fields in every case", once(chat(b"X-ODD: 1", b"x-odd: 2", b"X-Empty: ")), ALL)
    yield Case("chat: forged fields", once(chat(b"X-Org-Id: evil", b"X-Forwarded-For: 1.2.3.4")), ALL)
    yield Case("chat: spaces in the JSON kept", once(chat(body=b' {\r\n\t"model" : "m" ,"messages":[ ]} \n')), ALL)
    for name, request in BODIES.items():
        yield Case(f"body: {name}", once(request), (PLAIN, METERED))
    for name, request in CHUNKED_BODIES.items():
        yield Case(f"body in chunks: {name}", once(request), (PLAIN, METERED))
    yield Case("body in chunks: read whole", once(_chat_chunked(CHAT[:10], CHAT[10:])), ALL)
    yield from _slow_bodies()
    yield from _old_clients()


def _with_x_api_key() -> bytes:
    return b"GET {at}/x HTTP/1.1\r\nHost: shop.example\r\nX-API-Key: {key}\r\nX-After: 1\r\n\r\n"


def _host_last(host: bytes = b"shop.example") -> bytes:
    return b"GET {at}/x HTTP/1.1\r\nX-First: 1\r\nAuthorization: Bearer {key}\r\nHOST: %b\r\n\r\n" % host


def _chat_chunked(*chunks: bytes) -> bytes:
    lines = (b"Content-Type: application/json", b"Transfer-Encoding: chunked")
    return ask(b"POST", b"/chat", *lines) + chunked(*chunks)


def _slow_bodies() -> Iterator[Case]:
    """Bodies whose parts are only sent when the upstream has the parts before them."""
    head = ask(b"POST", b"/x", b"Content-Length: 6")
    yield Case(
        "body: in steps",
        (Asks(head), Asks(b"ab"), Arrives(b"ab"), Asks(b"cd"), Arrives(b"cd"), Asks(b"ef"), Arrives())
        + (Answers(answer()), Gets()),
        (PLAIN, METERED),
    )
    head = ask(b"POST", b"/x", b"Transfer-Encoding: chunked")
    steps = tuple(
        line for data in (b"first", b"second", b"third") for line in (Asks(chunk(data)), Arrives(data + b"\r\n"))
    )
    ended = (Arrives(), Answers(answer()), Gets())
    yield Case("body in chunks: in steps", (Asks(head), *steps, Asks(b"0\r\n\r\n"), *ended), (PLAIN, METERED))
    yield Case(
        "body in chunks: in steps, with trailers",
        (Asks(head), *steps, Asks(b"0\r\nX-Sum: 7\r\nx-sum: 8\r\n\r\n"), *ended),
        (PLAIN, METERED),
    )
    yield Case(
        "body in chunks: a chunk in parts",
        (Asks(head + b"6\r\nab"), Arrives(b"ab"), Asks(b"cd"), Arrives(b"cd"), Asks(b"ef\r\n0\r\n\r\n"), *ended),
        in_parts=True,
    )
    yield Case(
        "body in chunks: one of 300 KiB", (Asks(head + chunked(b"c" * 300_000)), *ended), (PLAIN,), in_parts=True
    )
    start = ask(b"GET", b"/x", b"X-Split: abc")
    yield Case(
        "head: byte by byte",
        (Drips(start), Arrives(), Answers(answer()), Gets()),
    )


def _old_clients() -> Iterator[Case]:
    """Clients that speak HTTP/1.0, and clients that want no second request."""
    yield Case("HTTP/1.0: a GET", once_closed(ask(version=b"1.0"), answer()), (PLAIN, METERED))
    yield Case("HTTP/1.0: a POST", once_closed(ask(b"POST", b"/x", body=b"old", version=b"1.0"), answer()))
    yield Case(
        "HTTP/1.0: no Host", once_closed(b"GET {at}/x HTTP/1.0\r\nAuthorization: Bearer {key}\r\n\r\n", answer())
    )
    yield Case(
        "HTTP/1.0: keep-alive",
        once(ask(b"GET", b"/x", b"Connection: keep-alive", version=b"1.0"), answer(b"Connection: keep-alive")),
    )
    for value in (b"close", b"Close", b"x-other, close"):
        request = ask(b"GET", b"/x", b"Connection: " + value)
        yield Case(f"Connection: {value.decode()}", once_closed(request, answer(b"Connection: close")))
    yield Case("Connection: close, with a body", once_closed(chat(b"Connection: close"), answer()), ALL)

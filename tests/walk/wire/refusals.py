"""What is not forwarded at all, because two readers could take it for two things, or because no gateway may.

Each class has its name in docs/transparency.md. How such requests are dealt with in depth is not the matter here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.walk.wire.case import ask


@dataclass(frozen=True, slots=True)
class Refusal:
    #: The class it belongs to.
    name: str
    request: bytes
    status: int


def refusals() -> Iterator[Refusal]:
    for method in (b"CONNECT", b"TRACE", b"TRACK", b"M" * 41):
        yield Refusal("methods", ask(method), 501)
    for target in (b"http://shop.example/x", b"shop.example:443", b"*", b"x", b"/x#fragment", b""):
        yield Refusal("target-form", _line(b"GET " + target + b" HTTP/1.1"), 400)
    yield Refusal("target-length", ask(b"GET", b"/" + b"a" * 33_000), 414)
    for path in (b"/metered/../x", b"/x/../metered/y", b"/metered%2Fx", b"/m%65tered/x", b"/METERED/x", b"//metered/x"):
        yield Refusal("ambiguous-path", ask(b"GET", path), 400)
    for path in (b"/..", b"/%2e%2e/a", b"/..;/a", b"/%zz", b"/%", b"/a%00b", b"/a%0Ab", b"/a%7Fb"):
        yield Refusal("broken-path", ask(b"GET", path), 400)
    for version, status in ((b"HTTP/2.0", 505), (b"HTTP/1.2", 505), (b"HTTP/0.9", 505), (b"http/1.1", 400)):
        yield Refusal("version", _line(b"GET /x " + version), status)
    for lines, status in (
        (b"Content-Length: +4", 400),
        (b"Content-Length: 4, 4", 400),
        (b"Content-Length: 4\r\nContent-Length: 4", 400),
        (b"Content-Length: 4\r\nTransfer-Encoding: chunked", 400),
        (b"Transfer-Encoding: gzip, chunked", 501),
        (b"Transfer-Encoding: identity", 501),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", 400),
        (b"Transfer_Encoding: chunked", 400),
    ):
        yield Refusal("framing", ask(b"POST", b"/x", lines), status)
    yield Refusal("framing", ask(b"POST", b"/x", b"Transfer-Encoding: chunked", version=b"1.0"), 400)
    for line in (b"X: a\r\n folded", b"X : a", b"X: a\0b", b"X: a\rb", b"X: a\nY: b", b"X y: a", b": a", b"nothing"):
        yield Refusal("field-syntax", ask(b"GET", b"/x", line), 400)
    yield Refusal("field-syntax", ask().replace(b"\r\n", b"\n"), 400)
    yield Refusal("host", ask(b"GET", b"/x", b"Host: other"), 400)
    for host in (b"", b"Host: \r\n", b"Host: a/b@c\r\n"):
        yield Refusal("host", b"GET /x HTTP/1.1\r\n" + host + b"Authorization: Bearer {key}\r\n\r\n", 400)
    yield Refusal("head-size", ask(b"GET", b"/x", b"X-Big: " + b"a" * 70_000), 431)
    yield Refusal("head-size", ask(b"GET", b"/x", *(b"X-%d: a" % at for at in range(99))), 431)
    chunked = ask(b"POST", b"/x", b"Transfer-Encoding: chunked")
    long = b"4;" + b"a" * 300 + b"\r\n"
    for body in (b"g\r\n", b"0x4\r\n", b"4 \r\nabcd", b"4\r\nabcde", b"4\nabcd", b"-1\r\n", long):
        yield Refusal("chunk-syntax", chunked + body, 400)
    for line in (b"Content-Length: 4", b"Host: other", b"Transfer-Encoding: chunked", b"X Y: a"):
        yield Refusal("trailers", chunked + b"0\r\n%b\r\n\r\n" % line, 400)
    yield Refusal("expectation", ask(b"POST", b"/x", b"Expect: 200-ok", body=b""), 417)
    yield Refusal("session-name", ask(b"GET", b"/x", b"X-Session-Id: a b"), 400)


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: shop.example\r\nAuthorization: Bearer {key}\r\n\r\n"

"""Cases for a gateway that is told to differ as little as it can, from a client that it trusts, and to name itself; and
for a route that holds requests to the output that is paid for."""

from collections.abc import Iterator

from tests.walk.wire.case import CAPPED, CONFIGURED, Case, answer, answer_chunked, ask, chat, once, once_closed


def cases() -> Iterator[Case]:
    ways = (CONFIGURED,)
    yield Case(
        "configured: Host and credential kept", once(ask(b"GET", b"/x", b"X-Api-Key: other", b"X-Last: 1")), ways
    )
    yield Case("configured: via", once(ask(b"GET", b"/x", b"Via: 1.0 before"), answer(b"Via: 1.1 theirs")), ways)
    yield Case("configured: via and chunks", once(ask(), answer_chunked(b"a", trailers=(b"X-Sum: 1",))), ways)
    yield Case("configured: via, HTTP/1.0", once_closed(ask(version=b"1.0"), answer()), ways)
    yield Case("configured: via, an HTTP/1.0 answer", once_closed(ask(), answer(version=b"1.0")), ways)
    yield Case("configured: session named", once(ask(b"GET", b"/x", b"X-Session-Id: talk.{way}")), ways)
    yield Case("configured: a request id of a trusted proxy", once(ask(b"GET", b"/x", b"X-Request-Id: edge-1")), ways)
    claims = (
        b"X-Forwarded-For: 1.2.3.4, 5.6.7.8",
        b"X-Forwarded-Proto: https",
        b"X-First: 1",
        b"Forwarded: for=1.2.3.4;proto=https",
        b"x-forwarded-for: 9.9.9.9",
        b"X-Real-IP: 1.2.3.4",
        b"X-Last: 1",
    )
    yield Case("configured: a trusted proxy's claims continued", once(ask(b"GET", b"/x", *claims)), ways)
    capped = (CAPPED,)
    yield Case("capped: a chat", once(chat(b"X-Last: 1")), capped)
    yield Case("capped: an answer in chunks", once(chat(), answer_chunked(b"a", b"b")), capped)
    yield Case("capped: digests of another body", once(chat(b"Content-MD5: x", b"Content-Digest: a=:b:")), capped)
    yield Case("capped: an error of the upstream", once(chat(), answer(status=429, reason=b"No")), capped)

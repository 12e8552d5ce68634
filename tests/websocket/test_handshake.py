"""The opening handshake: what is forwarded as one, and which answer opens a tunnel."""

import pytest
from websockets.utils import accept_key

from gateway.types import HeaderList
from gateway.websocket import is_handshake, proven, refused

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
GOOD = {
    b"host": b"gateway",
    b"connection": b"keep-alive, Upgrade",
    b"upgrade": b"websocket",
    b"sec-websocket-version": b"13",
    b"sec-websocket-key": KEY,
}


def request(*more: tuple[bytes, bytes], without: bytes = b"", **changed: bytes) -> HeaderList:
    values = {**GOOD, **{name.replace("_", "-").encode(): value for name, value in changed.items()}}
    return (*((name, value) for name, value in values.items() if name != without), *more)


def code(headers: HeaderList, method: str = "GET", version: str = "1.1", allowed: bool = True) -> str | None:
    refusal = refused(method, version, headers, allowed=allowed)
    return None if refusal is None else refusal.code


@pytest.mark.parametrize(
    "headers",
    [
        request(),
        request(upgrade=b"WebSocket", connection=b"upgrade"),
        request(upgrade=b"foo/2, websocket"),
        request((b"connection", b"upgrade"), connection=b"close"),
    ],
)
def test_a_handshake_is_known_by_an_upgrade_that_connection_nominates(headers: HeaderList) -> None:
    assert is_handshake(headers)


@pytest.mark.parametrize(
    "headers",
    [
        request(without=b"upgrade"),
        request(without=b"connection"),
        request(connection=b"keep-alive"),
        request(upgrade=b"h2c"),
        request(upgrade=b"websockets"),
        request(connection=b"upgraded"),
    ],
)
def test_anything_else_is_an_ordinary_request(headers: HeaderList) -> None:
    assert not is_handshake(headers)


def test_a_handshake_as_the_protocol_wants_it_is_forwarded() -> None:
    assert code(request()) is None
    assert code(request((b"content-length", b"0"))) is None


@pytest.mark.parametrize(
    ("headers", "method", "version"),
    [
        (request(), "POST", "1.1"),
        (request(), "get", "1.1"),
        (request(), "GET", "1.0"),
        (request((b"content-length", b"1")), "GET", "1.1"),
        (request((b"content-length", b"0"), (b"content-length", b"0")), "GET", "1.1"),
        (request((b"transfer-encoding", b"chunked")), "GET", "1.1"),
        (request(without=b"sec-websocket-key"), "GET", "1.1"),
        (request((b"sec-websocket-key", KEY)), "GET", "1.1"),
        (request(sec_websocket_key=b"c2hvcnQ="), "GET", "1.1"),
        (request(sec_websocket_key=KEY + b"AAAA"), "GET", "1.1"),
        (request(sec_websocket_key=b"dGhlIHNhbXBsZSBub25jZQ"), "GET", "1.1"),
        (request(sec_websocket_key=b"dGhlIHNhbXBsZSB\xffb25jZQ=="), "GET", "1.1"),
        (request(sec_websocket_key=b""), "GET", "1.1"),
    ],
)
def test_a_malformed_handshake_is_refused(headers: HeaderList, method: str, version: str) -> None:
    assert code(headers, method, version) == "bad_websocket_handshake"


@pytest.mark.parametrize(
    "headers",
    [
        request(sec_websocket_version=b"8"),
        request(sec_websocket_version=b"13, 8"),
        request(without=b"sec-websocket-version"),
        request((b"sec-websocket-version", b"13")),
    ],
)
def test_another_version_of_the_protocol_is_told_which_one_is_spoken(headers: HeaderList) -> None:
    refusal = refused("GET", "1.1", headers, allowed=True)
    assert refusal is not None and (refusal.status, refusal.code) == (426, "websocket_version")


def test_a_route_that_takes_no_websockets_says_so_before_anything_else() -> None:
    refusal = refused("GET", "1.1", request(sec_websocket_version=b"8"), allowed=False)
    assert refusal is not None and (refusal.status, refusal.code) == (403, "websocket_not_allowed")
    assert refusal.should_retry is False


ANSWER = [
    (b"Upgrade", b"WebSocket"),
    (b"Connection", b"keep-alive, Upgrade"),
    (b"Sec-WebSocket-Accept", accept_key(KEY.decode()).encode()),
    (b"Sec-WebSocket-Protocol", b"chat"),
]


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [field for field in ANSWER if field[0] != name]


def test_only_the_answer_to_this_very_handshake_opens_a_tunnel() -> None:
    assert proven(101, ANSWER, request())
    assert proven(101, [(name.lower(), value) for name, value in ANSWER], request())
    for status in (100, 200, 426):
        assert not proven(status, ANSWER, request())
    for name in (b"Upgrade", b"Connection", b"Sec-WebSocket-Accept"):
        assert not proven(101, without(name), request())
    for field in (
        (b"Upgrade", b"h2c"),
        (b"Upgrade", b"websocket, h2c"),
        (b"Connection", b"close"),
        (b"Sec-WebSocket-Accept", KEY),
        (b"Sec-WebSocket-Accept", accept_key("AAAAAAAAAAAAAAAAAAAAAA==").encode()),
    ):
        assert not proven(101, [*without(field[0]), field], request())
    for more in ((b"sec-websocket-accept", b"x"), (b"Transfer-Encoding", b"chunked")):
        assert not proven(101, [*ANSWER, more], request())

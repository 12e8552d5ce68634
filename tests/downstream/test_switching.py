"""Another protocol on the same connection: only when the application says so, and then for good."""

import asyncio

import pytest

from gateway.downstream import EXTENSION
from tests.downstream.site import GET, HOST, Message, Receive, Recorder, Seen, Send, answer, read, serving
from tests.waiting import until

OFFER = b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
HANDSHAKE = b"GET /ws HTTP/1.1\r\n" + HOST + OFFER + b"\r\n"
ACCEPTED = b"HTTP/1.1 101 Switching\r\nconnection: Upgrade\r\nUPGRADE: websocket\r\nX-Extra: 1\r\n\r\n"
SWITCH: Message = {
    "type": "http.response.switch",
    "reason": b"Switching",
    "headers": [(b"connection", b"Upgrade"), (b"UPGRADE", b"websocket"), (b"X-Extra", b"1")],
}
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


async def echo(scope: Message, receive: Receive, send: Send) -> None:
    """Switches, then sends back what it gets until it gets `bye`, or the client ends."""
    assert scope["extensions"][EXTENSION].upgrade == b"websocket"
    await read(Seen(scope), receive)
    await send(SWITCH)
    heard = b""
    while not heard.endswith(b"bye"):
        message = await receive()
        if message["type"] == "http.disconnect":
            await send({"type": "http.response.body", "body": b"end", "more_body": False})
            return
        assert message["more_body"]
        heard += message["body"]
        await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": b"!", "more_body": False})


async def test_bytes_pass_both_ways_as_they_are() -> None:
    async with serving(echo) as site, site.connect() as peer:
        peer.write(HANDSHAKE)
        await peer.exactly(ACCEPTED)
        for data in (b"\x81\0", b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"x" * 200_000):
            peer.write(data)
            await peer.exactly(data)
        peer.write(b"bye")
        assert await peer.rest() == b"bye!"
        peer.end()


async def test_bytes_that_came_early_come_first() -> None:
    async with serving(echo) as site, site.connect() as peer:
        peer.write(HANDSHAKE + GET + b"bye")
        assert await peer.rest() == ACCEPTED + GET + b"bye!"


async def test_too_many_early_bytes_are_no_conversation() -> None:
    raised = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError):
            await send(SWITCH)
        raised.set()
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(HANDSHAKE + b"x" * 1_000_000)
        assert await peer.rest() == LAST
    assert raised.is_set()


async def test_a_client_that_ends_may_still_be_answered() -> None:
    async with serving(echo) as site, site.connect() as peer:
        peer.write(HANDSHAKE)
        await peer.exactly(ACCEPTED)
        peer.write(b"last words")
        peer.end()
        assert await peer.rest() == b"last wordsend"


async def test_a_client_that_is_gone_is_noticed() -> None:
    async with serving(echo) as site, site.connect() as peer:
        peer.write(HANDSHAKE)
        await peer.exactly(ACCEPTED)
        peer.leave()
        await until(lambda: site.tasks == 0)


async def test_an_application_that_goes_ends_the_connection() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await send(SWITCH)
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async with serving(app) as site:
        assert await site.ask(HANDSHAKE + GET) == ACCEPTED + b"half"


OFFERS: dict[str, tuple[bytes, bytes]] = {
    "websocket": (OFFER, b"websocket"),
    "h2c": (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", b"h2c"),
    "several": (
        b"connection: x\r\nConnection: UPGRADE\r\nUpgrade: h2c\r\nupgrade: WebSocket, IRC/6\r\n",
        b"h2c, websocket, irc/6",
    ),
    "not nominated": (b"Connection: keep-alive\r\nUpgrade: websocket\r\n", b""),
    "nothing to switch to": (b"Connection: Upgrade\r\n", b""),
}


@pytest.mark.parametrize(
    "body", [b"", b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize(("fields", "offered"), OFFERS.values(), ids=OFFERS)
async def test_an_offer_that_is_not_taken_is_a_request_like_any_other_but_the_last(
    fields: bytes, offered: bytes, body: bytes
) -> None:
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        peer.write(b"POST / HTTP/1.1\r\n" + HOST + fields + (body or b"\r\n") + GET)
        if offered:
            assert await peer.rest() == LAST
        else:
            await peer.exactly(LAST.replace(b"Connection: close\r\n", b"") * 2)
    assert len(app.requests) == (1 if offered else 2)
    assert app.requests[0].scope["extensions"][EXTENSION].upgrade == offered
    assert app.requests[0].body == (b"hello" if body else b"")


async def test_an_old_client_offers_nothing() -> None:
    app = Recorder()
    async with serving(app) as site:
        assert await site.ask(b"GET / HTTP/1.0\r\n" + OFFER + b"\r\n") == LAST
    assert app.requests[0].scope["extensions"][EXTENSION].upgrade == b""


async def test_nothing_is_switched_that_was_not_offered_or_is_not_whole() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        with pytest.raises(RuntimeError):
            await send(SWITCH)
        await answer(send, b"ok")

    async with serving(app) as site:
        for head in (b"Connection: close\r\n\r\n", OFFER + b"Content-Length: 5\r\n\r\n"):
            assert await site.ask(b"GET / HTTP/1.1\r\n" + HOST + head) == LAST

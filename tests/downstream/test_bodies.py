"""Bodies on their way in: asked for, waited for, held back, answered early, and left behind."""

import asyncio
from typing import Any

import pytest

from gateway.downstream import EXTENSION, Bounds, line
from gateway.downstream.connection import Connection
from gateway.downstream.incoming import HIGH_WATER_BYTES
from tests.downstream.site import (
    ANSWERED,
    GET,
    HOST,
    Application,
    Message,
    Receive,
    Recorder,
    Seen,
    Send,
    answer,
    read,
    serving,
    start,
    write,
)
from tests.waiting import until

POST = b"POST / HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
EXPECTS = POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"

# -- Expect ----------------------------------------------------------------------------------------------------------


async def test_the_body_is_asked_for_by_the_application_only() -> None:
    asked = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        seen = Seen(scope)
        if scope["extensions"][EXTENSION].expects_continue:
            await asked.wait()
            await send({"type": "http.response.interim", "status": 100, "reason": b"Continue", "headers": []})
        await read(seen, receive)
        await answer(send, seen.body)

    async with serving(app) as site, site.connect() as peer:
        peer.write(EXPECTS)
        await until(lambda: site.tasks)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await peer.reader.read(1)
        asked.set()
        await peer.exactly(GO_ON)
        peer.write(b"hello")
        await peer.exactly(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        peer.write(GET)  # all went well, so the connection is kept
        await peer.exactly(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


async def test_who_is_refused_before_being_asked_gets_the_answer_and_the_end() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(EXPECTS)
        assert await peer.rest() == LAST


async def test_who_does_not_wait_to_be_asked_is_served_as_anybody_else() -> None:
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        peer.write(EXPECTS + b"hello" + GET)
        await peer.exactly(ANSWERED * 2)
    assert app.requests[0].body == b"hello"


async def test_only_a_body_that_comes_later_can_be_asked_for() -> None:
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        peer.write(POST + b"Expect: 100-CONTINUE\r\n\r\n")
        await peer.exactly(ANSWERED)
        peer.write(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi")
        assert await peer.rest() == LAST
    assert not any(seen.scope["extensions"][EXTENSION].expects_continue for seen in app.requests)


# -- answers before the request is complete --------------------------------------------------------------------------


def early(*, at_once: bool) -> Application:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await start(send, (b"Content-Length", b"2"))
        if not at_once:
            await asyncio.sleep(0.01)
        await write(send, b"ok", more=False)

    return app


async def test_an_early_answer_is_read_by_a_client_that_still_sends() -> None:
    """The unread rest of its body would otherwise turn the end into a reset, which takes the answer with it."""
    async with serving(early(at_once=True)) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: 100000000\r\n\r\n")
        await peer.until(b"Connection: close\r\n\r\nok")
        for _ in range(200):
            peer.write(b"x" * 65536)
            await peer.writer.drain()
        assert await peer.rest() == b""
        assert site.connections == 1
        peer.end()
        await until(lambda: site.connections == 0)


async def test_an_answer_that_began_early_is_the_last_even_if_it_did_not_say_so() -> None:
    async with serving(early(at_once=False)) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: 100\r\n\r\n")
        assert await peer.rest() == ANSWERED
    async with serving(early(at_once=False)) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: 3\r\n\r\n")
        await peer.until(b"\r\n\r\n")
        peer.write(b"abc" + GET)  # complete before the answer is: nothing is wrong with this connection
        await peer.exactly(b"ok" + ANSWERED)


async def test_who_was_never_asked_for_its_body_is_told_of_the_end_with_the_head() -> None:
    """It may send the body all the same, or not: nobody can tell what its next bytes are."""
    async with serving(early(at_once=False)) as site, site.connect() as peer:
        peer.write(EXPECTS)
        assert await peer.rest() == LAST


async def test_what_follows_an_early_answer_is_never_a_request() -> None:
    paths = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        paths.append(scope["raw_path"])
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: 10\r\n\r\n")
        await peer.exactly(LAST)
        peer.write(b"0123456789" + GET + GET)
        assert await peer.rest() == b""
    assert paths == [b"/"]


# -- back-pressure ---------------------------------------------------------------------------------------------------


async def test_a_body_that_is_not_taken_is_not_read() -> None:
    total_bytes = 64 * 1024 * 1024
    go_on = asyncio.Event()
    largest = 0

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal largest
        await go_on.wait()
        received = 0
        while True:
            message = await receive()
            assert message["type"] == "http.request"
            received += len(message["body"])
            largest = max(largest, len(message["body"]))
            if not message["more_body"]:
                break
        await answer(send, b"%d" % received)

    async with serving(app) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: %d\r\n\r\n" % total_bytes)
        await until(lambda: site.tasks)
        sent = 0

        async def push() -> None:
            nonlocal sent
            while sent < total_bytes:
                peer.write(b"x" * 65536)
                sent += 65536
                await peer.writer.drain()

        pushing = asyncio.create_task(push())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(pushing), 0.2)
        assert sent < total_bytes // 2  # the kernel's buffers, and no more
        go_on.set()
        assert (await peer.until(b"%d" % total_bytes)).startswith(b"HTTP/1.1 200")
        await pushing
    # What one read brings may come on top; both loops read at most 256 KiB at once.
    assert largest <= HIGH_WATER_BYTES + 256 * 1024


async def test_after_a_body_that_nobody_took_the_next_request_is_read() -> None:
    go_on = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: %d\r\n\r\n" % (HIGH_WATER_BYTES + 1) + b"x" * HIGH_WATER_BYTES)
        await until(lambda: site.tasks)
        peer.write(b"x")
        (connection,) = site.server.server_state.connections
        assert isinstance(connection, Connection)
        await until(lambda: connection._exchange is not None and connection._exchange.received)
        go_on.set()
        await peer.exactly(ANSWERED)
        peer.write(GET)
        await peer.exactly(ANSWERED)


async def test_a_client_that_does_not_read_holds_the_application_back() -> None:
    total_bytes = 64 * 1024 * 1024
    sent = 0

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal sent
        await start(send, (b"Content-Length", b"%d" % total_bytes))
        while sent < total_bytes:
            await write(send, b"x" * 65536)
            sent += 65536
        await write(send, more=False)

    async with serving(app) as site, site.connect() as peer:
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a socket's, which reads too
        peer.write(GET)
        before = -1

        async def stands_still() -> bool:
            nonlocal before
            before, now = sent, sent
            await asyncio.sleep(0.05)
            return sent == now > 0

        await until(stands_still)
        assert sent < total_bytes // 2
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await asyncio.wait_for(peer.reader.readexactly(total_bytes), 10)) == total_bytes


# -- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "leave"])
@pytest.mark.parametrize(
    "sent", [b"", b"Content-Length: 9\r\n\r\nhalf", b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"]
)
async def test_a_client_that_leaves_is_noticed_and_its_body_never_whole(how: str, sent: bytes) -> None:
    messages: list[Message] = []
    done = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        try:
            while not messages or messages[-1]["type"] != "http.disconnect":
                messages.append(await receive())
            for _ in range(3):  # nobody is there; nothing happens
                await send({"type": "http.response.start", "status": 200, "headers": []})
            messages.append(await receive())
        finally:
            done.set()

    async with serving(app) as site, site.connect() as peer:
        peer.write(POST + (sent or b"\r\n"))
        await until(lambda: messages)
        getattr(peer, how)()
        await asyncio.wait_for(done.wait(), 5)
        if how == "end":
            assert await peer.rest() == b""
    kinds = [message["type"] for message in messages]
    assert kinds[-2:] == ["http.disconnect"] * 2
    assert all(message["more_body"] for message in messages if message["type"] == "http.request") == bool(sent)


async def test_a_client_that_leaves_is_noticed_behind_requests_that_wait() -> None:
    left = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async with serving(app) as site, site.connect() as peer:
        peer.write(GET * 10)
        await until(lambda: site.tasks)
        peer.leave()
        await asyncio.wait_for(left.wait(), 5)


async def test_after_the_answer_the_application_is_told_of_no_more() -> None:
    kinds: list[Any] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await receive()
        await answer(send, b"ok")
        kinds.append((await waiting)["type"])
        kinds.append((await receive())["type"])

    async with serving(app) as site, site.connect() as peer:
        peer.write(GET)
        await peer.exactly(ANSWERED)
        await until(lambda: len(kinds) == 2)
    assert kinds == ["http.disconnect"] * 2


# -- time ------------------------------------------------------------------------------------------------------------

SOON = Bounds(head_timeout_s=0.1, body_timeout_s=0.1)


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"P", POST, POST + b"Content-Length: 0\r\n\r"])
async def test_a_head_that_does_not_come_ends_the_connection(begun: bytes) -> None:
    async with serving(Recorder(), SOON) as site, site.connect() as peer:
        peer.write(begun)
        assert await peer.rest() == b""
    # On a connection that has served, it is the first byte that counts.
    if begun:
        async with serving(Recorder(), SOON) as site, site.connect() as peer:
            peer.write(GET)
            await peer.exactly(ANSWERED)
            peer.write(begun)
            assert await peer.rest() == b""


async def test_a_head_that_drips_has_no_more_time_than_one_that_stalls() -> None:
    async with serving(Recorder(), SOON) as site, site.connect() as peer:

        async def drip() -> None:
            while True:
                peer.write(b"X")
                await asyncio.sleep(0.01)

        dripping = asyncio.create_task(drip())
        assert await peer.rest() == b""
        dripping.cancel()


async def test_a_connection_at_rest_is_closed_in_time_and_not_before() -> None:
    async with serving(Recorder(), SOON, keep_alive_s=1) as site, site.connect() as peer:
        peer.write(GET)
        await peer.exactly(ANSWERED)
        await asyncio.sleep(0.3)  # longer than a head may take
        peer.write(GET)
        await peer.exactly(ANSWERED)
        assert await peer.rest() == b""


@pytest.mark.parametrize("drips", [False, True])
async def test_a_body_that_is_late_is_told_to_the_application_which_may_answer(drips: bool) -> None:
    kinds: list[str] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while "http.request.timeout" not in kinds:
            message = await receive()
            kinds.append(message["type"])
            assert message.get("more_body", True)
        await answer(send, b"late", 408)

    async def drip(write: Any) -> None:
        while drips:
            write(b"1\r\nx\r\n")
            await asyncio.sleep(0.005)

    async with serving(app, SOON) as site, site.connect() as peer:
        peer.write(CHUNKED)
        dripping = asyncio.create_task(drip(peer.write))
        said = await peer.rest()
        dripping.cancel()
    assert said == b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlate"


async def test_a_late_body_is_answered_for_an_application_that_goes() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while (await receive())["type"] == "http.request":
            pass

    async with serving(app, SOON) as site, site.connect() as peer:
        peer.write(CHUNKED)
        assert (await peer.rest()).startswith(b"HTTP/1.1 408 Request Timeout\r\n")


async def test_a_late_body_ends_the_connection_of_an_application_that_waits_on() -> None:
    kinds: list[str] = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        while "http.disconnect" not in kinds:
            kinds.append((await receive())["type"])

    async with serving(app, SOON) as site, site.connect() as peer:
        peer.write(CHUNKED)
        assert await peer.rest() == b""
    assert kinds == ["http.request.timeout", "http.disconnect"]


async def test_time_for_a_body_does_not_limit_its_answer() -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await read(Seen(scope), receive)
        await asyncio.sleep(0.3)
        await answer(send, b"ok")

    async with serving(app, SOON) as site, site.connect() as peer:
        peer.write(POST + b"Content-Length: 4\r\n\r\nfo")
        await asyncio.sleep(0)
        peer.write(b"ur")
        await peer.exactly(ANSWERED)


async def test_a_client_that_never_ends_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "LINGER_S", 0.1)
    async with serving(Recorder()) as site, site.connect() as peer:
        peer.write(b"bad\r\n\r\n")
        assert b" 400 " in await peer.rest()
        await until(lambda: site.connections == 0)


# -- room ------------------------------------------------------------------------------------------------------------


async def test_one_client_too_many_is_told_to_come_back() -> None:
    async with serving(Recorder(), Bounds(connections_max=2)) as site:
        async with site.connect() as first, site.connect() as second:
            for peer in (first, second):
                peer.write(GET)
                await peer.exactly(ANSWERED)
            for sends in (b"", GET):
                async with site.connect() as third:
                    third.write(sends)
                    said = await third.rest()
                assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
                assert b"\r\nRetry-After: 1\r\n" in said and b"\r\nConnection: close\r\n" in said
            first.write(GET)
            await first.exactly(ANSWERED)
        await until(lambda: site.connections == 0)
        async with site.connect() as peer:
            peer.write(GET)
            await peer.exactly(ANSWERED)

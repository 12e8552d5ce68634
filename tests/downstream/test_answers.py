"""What leaves for the client: the fields as given, the body framed, nothing that looks whole and is not."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

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
HEAD = b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n"
OLD = b"GET / HTTP/1.0\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
CHUNKED = (b"Transfer-Encoding", b"chunked")
Script = Callable[[Send], Awaitable[None]]


def says(script: Script) -> Application:
    """An application that reads the request and answers as the script does."""

    async def app(scope: object, receive: Receive, send: Send) -> None:
        seen = Seen({})
        await read(seen, receive)
        if seen.whole:
            await script(send)

    return app


async def said(script: Script, request: bytes = CLOSE) -> bytes:
    async with serving(says(script)) as site:
        return await site.ask(request)


async def test_fields_reason_and_order_are_as_given() -> None:
    async def script(send: Send) -> None:
        fields = ((b"x-B", b"1"), (b"Content-LENGTH", b"2"), (b"X-b", b""), (b"x-B", b"\xfc\t2"))
        await start(send, *fields, reason=b"Fine, thanks \xfc")
        await write(send, b"ok", more=False)

    async with serving(says(script)) as site, site.connect() as peer:
        peer.write(GET)
        await peer.exactly(
            b"HTTP/1.1 200 Fine, thanks \xfc\r\nx-B: 1\r\nContent-LENGTH: 2\r\nX-b: \r\nx-B: \xfc\t2\r\n\r\nok"
        )


@pytest.mark.parametrize(
    ("status", "reason", "line"),
    [
        (200, None, b"200 OK"),
        (200, b"", b"200 "),
        (404, b"Nope", b"404 Nope"),
        (529, None, b"529 "),
        (529, b"Overloaded", b"529 Overloaded"),
        (999, None, b"999 "),
    ],
)
async def test_the_reason_is_the_given_or_the_standard_one(status: int, reason: bytes | None, line: bytes) -> None:
    async def script(send: Send) -> None:
        more = {} if reason is None else {"reason": reason}
        await start(send, (b"Content-Length", b"0"), status=status, **more)
        await write(send, more=False)

    assert await said(script) == b"HTTP/1.1 " + line + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


# -- framing ---------------------------------------------------------------------------------------------------------


async def in_pieces(send: Send, *fields: tuple[bytes, bytes], status: int = 200) -> None:
    await start(send, *fields, status=status)
    for piece in (b"one", b"", b"three"):
        await write(send, piece)
    await write(send, more=False)


CHUNKS = b"3\r\none\r\n5\r\nthree\r\n0\r\n\r\n"
ENDS = b"Connection: close\r\n\r\n"

FRAMED: dict[str, tuple[bytes, tuple[tuple[bytes, bytes], ...], int, bytes]] = {
    "nothing said": (CLOSE, (), 200, b"Transfer-Encoding: chunked\r\n" + ENDS + CHUNKS),
    "chunked": (CLOSE, ((b"transfer-Encoding", b"Chunked"),), 200, b"transfer-Encoding: Chunked\r\n" + ENDS + CHUNKS),
    "a length": (CLOSE, ((b"content-length", b"8"),), 200, b"content-length: 8\r\n" + ENDS + b"onethree"),
    "HTTP/1.0, nothing said": (OLD, (), 200, ENDS + b"onethree"),
    "HTTP/1.0, chunked": (OLD, (CHUNKED,), 200, ENDS + b"onethree"),
    "HTTP/1.0, a length": (OLD, ((b"Content-Length", b"8"),), 200, b"Content-Length: 8\r\n" + ENDS + b"onethree"),
    "204": (CLOSE, (), 204, ENDS),
    "204, chunked": (CLOSE, (CHUNKED,), 204, ENDS),
    "204, a length": (CLOSE, ((b"Content-Length", b"0"),), 204, b"Content-Length: 0\r\n" + ENDS),
    "304": (CLOSE, (), 304, ENDS),
    "304, a length": (CLOSE, ((b"Content-Length", b"9"),), 304, b"Content-Length: 9\r\n" + ENDS),
    "304, chunked": (CLOSE, (CHUNKED,), 304, b"Transfer-Encoding: chunked\r\n" + ENDS),
}


@pytest.mark.parametrize(("request_bytes", "fields", "status", "expected"), FRAMED.values(), ids=FRAMED)
async def test_a_body_is_framed_as_the_client_can_read_it(
    request_bytes: bytes, fields: tuple[tuple[bytes, bytes], ...], status: int, expected: bytes
) -> None:
    received = await said(lambda send: in_pieces(send, *fields, status=status), request_bytes)
    assert received.partition(b"\r\n")[2] == expected


@pytest.mark.parametrize("fields", [(), (CHUNKED,), ((b"Content-Length", b"8"),)], ids=["nothing", "chunked", "length"])
async def test_an_answer_to_head_has_the_head_only(fields: tuple[tuple[bytes, bytes], ...]) -> None:
    async with serving(says(lambda send: in_pieces(send, *fields))) as site, site.connect() as peer:
        for _ in range(2):
            peer.write(HEAD)
            await peer.exactly(b"HTTP/1.1 200 OK\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n")


async def test_pieces_are_chunks_and_a_length_knows_no_pieces() -> None:
    async def script(send: Send) -> None:
        await start(send)
        await write(send, b"onetwo", pieces=(b"one", b"", b"two"))
        await write(send, b"end", more=False, pieces=[b"e", b"nd"])

    received = await said(script)
    assert received.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n1\r\ne\r\n2\r\nnd\r\n0\r\n\r\n")

    async def measured(send: Send) -> None:
        await start(send, (b"Content-Length", b"6"))
        await write(send, b"onetwo", more=False, pieces=(b"one", b"two"))

    assert (await said(measured)).endswith(b"\r\n\r\nonetwo")


@pytest.mark.parametrize("request_bytes", [CLOSE, OLD], ids=["1.1", "1.0"])
@pytest.mark.parametrize("length", [False, True], ids=["chunked", "length"])
async def test_trailers_follow_chunks_only(request_bytes: bytes, length: bool) -> None:
    async def script(send: Send) -> None:
        await start(send, *([(b"Content-Length", b"2")] if length else []), trailers=True)
        await write(send, b"ok", more=False)
        trailers: Message = {"type": "http.response.trailers", "headers": [(b"X-Sum", b"1")], "more_trailers": True}
        await send(trailers)
        await send({**trailers, "headers": [(b"x-sum", b"2")], "more_trailers": False})

    body = (await said(script, request_bytes)).partition(b"\r\n\r\n")[2]
    is_chunked = request_bytes is CLOSE and not length
    assert body == (b"2\r\nok\r\n0\r\nX-Sum: 1\r\nx-sum: 2\r\n\r\n" if is_chunked else b"ok")


async def test_the_connection_closes_when_the_answer_says_so() -> None:
    async def script(send: Send) -> None:
        await start(send, (b"connection", b"X, Close"), (b"Content-Length", b"2"))
        await write(send, b"ok", more=False)

    received = await said(script, GET + GET)
    assert received == b"HTTP/1.1 200 OK\r\nconnection: X, Close\r\nContent-Length: 2\r\n\r\nok"


async def test_interim_answers_pass_before_the_answer_and_not_to_old_clients() -> None:
    async def script(send: Send) -> None:
        hints = [(b"Link", b"</a>; rel=preload"), (b"link", b"</b>")]
        await send({"type": "http.response.interim", "status": 103, "reason": b"Hints", "headers": hints})
        await send({"type": "http.response.interim", "status": 102, "reason": b"Processing", "headers": []})
        await answer(send, b"ok")

    received = await said(script)
    hints = b"HTTP/1.1 103 Hints\r\nLink: </a>; rel=preload\r\nlink: </b>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    assert received == hints + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    assert await said(script, OLD) == received.removeprefix(hints)


# -- what can never be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        (b"A\r\nB", b"c"),
        (b"A", b"b\r\nC: d"),
        (b"A", b"b\nc"),
        (b"A", b"b\rc"),
        (b"A", b"\0"),
        (b"", b"a"),
        (b"A B", b"c"),
    ],
)
async def test_nothing_given_breaks_out_of_its_line(field: tuple[bytes, bytes]) -> None:
    raised: list[type[Exception]] = []

    async def script(send: Send) -> None:
        for message in (
            {"type": "http.response.interim", "status": 103, "headers": [field]},
            {"type": "http.response.start", "status": 200, "headers": [field]},
        ):
            try:
                await send(message)
            except ValueError as exc:
                raised.append(type(exc))
        await start(send, trailers=True)
        await write(send, b"ok", more=False)
        await send({"type": "http.response.trailers", "headers": [field], "more_trailers": False})

    received = await said(script)
    assert raised == [ValueError, ValueError]
    assert received.endswith(b"\r\n\r\n2\r\nok\r\n")  # cut before its end


@pytest.mark.parametrize("reason", [b"a\r\nB: c", b"a\nb", b"\0"])
async def test_a_reason_stays_on_its_line(reason: bytes) -> None:
    async def script(send: Send) -> None:
        await start(send, reason=reason)

    assert (await said(script)).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")


BAD_STARTS: dict[str, tuple[int, list[tuple[bytes, bytes]]]] = {
    "a status that is none": (99, []),
    "an interim status": (103, []),
    "switching": (101, []),
    "two framings": (200, [(b"Content-Length", b"2"), CHUNKED]),
    "two lengths": (200, [(b"Content-Length", b"2"), (b"content-length", b"2")]),
    "another coding": (200, [(b"Transfer-Encoding", b"gzip, chunked")]),
    "a length that is no number": (200, [(b"Content-Length", b"+2")]),
}


@pytest.mark.parametrize(("status", "fields"), BAD_STARTS.values(), ids=BAD_STARTS)
async def test_an_answer_without_one_meaning_is_not_written(status: int, fields: list[tuple[bytes, bytes]]) -> None:
    async def script(send: Send) -> None:
        with pytest.raises(ValueError):
            await start(send, *fields, status=status)
        await answer(send, b"ok")

    assert (await said(script)).startswith(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n")


async def test_messages_out_of_order_are_refused() -> None:
    raised = []

    async def attempt(send: Send, message: Message) -> None:
        with pytest.raises(RuntimeError):
            await send(message)
        raised.append(message["type"])

    async def script(send: Send) -> None:
        body: Message = {"type": "http.response.body", "body": b"early"}
        trailers: Message = {"type": "http.response.trailers", "headers": []}
        begin: Message = {"type": "http.response.start", "status": 200, "headers": []}
        await attempt(send, body)
        await attempt(send, trailers)
        await attempt(send, {"type": "http.response.switch", "headers": []})
        await attempt(send, {"type": "unheard of"})
        await start(send, (b"Content-Length", b"2"))
        await attempt(send, begin)
        await attempt(send, trailers)
        await attempt(send, {"type": "http.response.interim", "status": 103, "headers": []})
        await write(send, b"ok", more=False)
        await attempt(send, body)

    assert (await said(script)).endswith(b"\r\n\r\nok")
    assert len(raised) == 8


# -- answers that do not come to their end ---------------------------------------------------------------------------


def log_has(capsys: pytest.CaptureFixture[str], words: str) -> bool:
    return words in capsys.readouterr().out


@pytest.mark.parametrize("request_bytes", [CLOSE, GET, OLD], ids=["last", "kept", "1.0"])
async def test_an_application_that_fails_before_its_answer_gives_500(
    request_bytes: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(send: Send) -> None:
        raise LookupError("lost")

    received = await said(script, request_bytes + GET)
    assert received.startswith(b"HTTP/1.1 500 Internal Server Error\r\n") and b"\r\nConnection: close\r\n" in received
    assert received.count(b"HTTP/1.1") == 1 and b"lost" not in received
    assert log_has(capsys, "lost")


async def test_an_application_that_says_nothing_gives_500() -> None:
    async def script(send: Send) -> None:
        return

    assert (await said(script)).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert (await said(script, HEAD)).endswith(b"\r\n\r\n")


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("length", [False, True], ids=["chunked", "length"])
async def test_an_answer_without_its_end_is_cut(length: bool, fails: bool) -> None:
    async def script(send: Send) -> None:
        await start(send, *([(b"Content-Length", b"9")] if length else []))
        await write(send, b"ha")
        if fails:
            raise LookupError
        # the rest never comes

    received = await said(script, GET + GET)
    assert received.endswith(b"\r\n\r\nha" if length else b"\r\n\r\n2\r\nha\r\n")
    assert received.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("last", [False, True])
async def test_a_body_of_another_length_than_announced_is_cut(last: bool) -> None:
    async def script(send: Send) -> None:
        await start(send, (b"Content-Length", b"4"))
        await write(send, b"ab")
        await write(send, b"c" if last else b"cde", more=not last)

    assert (await said(script, GET + GET)).endswith(b"\r\n\r\nab")


async def test_an_answer_that_ends_with_its_connection_is_reset_when_cut() -> None:
    """Nothing else tells the client that this was not the end."""

    async def script(send: Send) -> None:
        await start(send)
        await write(send, b"half")

    async with serving(says(script)) as site, site.connect() as peer:
        peer.write(OLD)
        with pytest.raises(ConnectionResetError):
            await peer.rest()


async def test_a_head_leaves_by_itself_and_pieces_when_they_are_sent() -> None:
    heard: asyncio.Queue[None] = asyncio.Queue()

    async def script(send: Send) -> None:
        await start(send)
        await heard.get()
        for number in range(3):
            await write(send, b"%d" % number)
            await heard.get()
        await write(send, more=False)

    async with serving(says(script)) as site, site.connect() as peer:
        peer.write(GET)
        await peer.until(b"\r\n\r\n")
        for number in range(3):
            heard.put_nowait(None)
            await peer.exactly(b"1\r\n%d\r\n" % number)
        heard.put_nowait(None)
        await peer.exactly(b"0\r\n\r\n")


# -- whose turn it is ------------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_one_after_the_other() -> None:
    running = 0
    paths = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        nonlocal running
        running += 1
        assert running == 1
        paths.append(scope["raw_path"])
        await asyncio.sleep(0.001)
        await start(send)
        await write(send, scope["raw_path"])
        await asyncio.sleep(0.001)
        running -= 1
        await write(send, more=False)

    requests = [b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(20)]
    async with serving(app) as site, site.connect() as peer:
        peer.write(b"".join(requests))
        for number in range(20):
            assert b"\r\n/%d\r\n" % number in await peer.until(b"0\r\n\r\n")
    assert paths == [b"/%d" % number for number in range(20)]


async def test_more_than_may_wait_for_its_turn_is_never_read() -> None:
    go_on = asyncio.Event()
    paths = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        paths.append(scope["raw_path"])
        await go_on.wait()
        await answer(send, b"ok")

    async with serving(app) as site, site.connect() as peer:
        peer.write(b"GET /first HTTP/1.1\r\n" + HOST + b"\r\n" + GET * 5000)
        await peer.writer.drain()
        await until(lambda: paths)
        go_on.set()
        said = await peer.rest()
    assert paths[0] == b"/first" and len(paths) < 5000
    assert said.count(b"HTTP/1.1 200 OK") == len(paths)
    assert said.endswith(b"Connection: close\r\n\r\nok")


async def test_what_follows_the_last_request_is_ignored() -> None:
    app = Recorder()
    async with serving(app) as site:
        for last in (CLOSE, OLD, b"GET / HTTP/1.1\r\n" + HOST + b"Connection: x , CLOSE\r\n\r\n"):
            said = await site.ask(last + GET + b"\0 anything")
            assert said == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    assert len(app.requests) == 3


async def test_a_kept_connection_serves_one_request_after_the_other() -> None:
    app = Recorder()
    async with serving(app) as site, site.connect() as peer:
        for number in range(5):
            peer.write(POST + b"Content-Length: 1\r\n\r\n%d" % number)
            await peer.exactly(ANSWERED)
        assert site.server.server_state.total_requests == 5
    assert [seen.body for seen in app.requests] == [b"0", b"1", b"2", b"3", b"4"]

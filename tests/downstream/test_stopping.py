"""uvicorn stops: what is at rest closes, what is under way is finished and says that it is the last."""

import asyncio
import socket

import pytest
import uvicorn

from gateway.downstream import Bounds, connection_type
from tests.downstream.site import ANSWERED, GET, HOST, Message, Receive, Seen, Send, Site, answer, read, start, write
from tests.waiting import until

LAST = ANSWERED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


async def test_a_server_that_stops_closes_what_rests_and_finishes_what_runs() -> None:
    finish = asyncio.Event()

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await read(Seen(scope), receive)
        if scope["path"] == "/begun":
            await start(send)
            await write(send, b"1")
        if scope["path"] != "/":
            await finish.wait()
        if scope["path"] == "/begun":
            await write(send, b"2", more=False)
        else:
            await answer(send, b"ok")

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=connection_type(Bounds()), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))  # `serve` would take over the test run's signals
    await until(lambda: server.started)
    site = Site(listener.getsockname()[1], server)
    async with site.connect() as rests, site.connect() as fresh, site.connect() as runs, site.connect() as begun:
        rests.write(GET)
        await rests.exactly(ANSWERED)
        runs.write(b"GET /runs HTTP/1.1\r\n" + HOST + b"\r\n" + GET)
        begun.write(b"GET /begun HTTP/1.1\r\n" + HOST + b"\r\n")
        await begun.until(b"1\r\n1\r\n")
        await until(lambda: site.connections == 4 and site.tasks == 2)
        server.should_exit = True
        assert await rests.rest() == await fresh.rest() == b""
        assert not serving.done()
        finish.set()
        assert await runs.rest() == LAST  # and nothing for the request behind it
        assert await begun.rest() == b"1\r\n2\r\n0\r\n\r\n"
    await serving
    listener.close()


@pytest.mark.parametrize("begun", [False, True])
async def test_a_request_whose_task_is_cancelled_is_refused_or_cut(begun: bool) -> None:
    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if begun:
            await start(send)
            await write(send, b"1")
        await asyncio.Event().wait()

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=connection_type(Bounds()),
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=0,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server._serve([listener]))
    await until(lambda: server.started)
    site = Site(listener.getsockname()[1], server)
    async with site.connect() as peer:
        peer.write(GET)
        await until(lambda: site.tasks)
        if begun:
            await peer.until(b"1\r\n1\r\n")
        server.should_exit = True
        said = await peer.rest()
    assert said == b"" if begun else said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    await serving
    listener.close()

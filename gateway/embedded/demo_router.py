"""A small AI router to put the gateway in front of: for the first try, for tests, and for measurements.

    POST /v1/chat/completions   OpenAI, plain and streamed      GET /v1/models
    POST /v1/messages           Anthropic, plain and streamed
    /trpc/demo.hello, /trpc/demo.add                            ANY /echo: what arrived here, as JSON

It is a program (`python -m gateway.embedded.demo_router --port 0` prints its port) and an ASGI application. What it
does can be bent per request:

    x-demo-first-byte-delay-ms, x-demo-chunk-delay-ms   how slow (at most five minutes each)
    x-demo-status: 400..599                             an error of this status, in the path's dialect (/echo: as ever)
    x-demo-break-after-chunks: N                        drop the connection after N events of a stream, or N bytes
    x-demo-reply-words: N                               length of a chat reply

With a journal it writes down what truly happened to each request; without one it keeps nothing.
"""

import argparse
import asyncio
import contextlib
import hashlib
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from gateway.embedded import demo_replies, demo_trpc
from gateway.embedded.demo_exchange import (
    DELAY_MS_MAX,
    DemoBreak,
    DemoClientLeft,
    Exchange,
    Journal,
    Pace,
    Receive,
    Refused,
    Scope,
    Send,
)
from gateway.embedded.demo_replies import InvalidRequest, Json


class DemoRouter:
    """The ASGI application. Keeps nothing between requests."""

    def __init__(self, pace: Pace | None = None, journal: Journal | None = None) -> None:
        self._pace = pace or Pace()
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise ValueError(f"the demo router does not speak {scope['type']}")
        exchange = Exchange(scope, receive, send)
        self._note("started", exchange.facts())
        end = "failed"
        try:
            await _answer(exchange, self._pace)
            end = "finished"
        except DemoClientLeft:
            end = "client_gone"
        except DemoBreak:
            end = "broke"
            raise
        finally:
            await exchange.close()
            self._note(end, exchange.result())

    def _note(self, event: str, facts: Json) -> None:
        if self._journal is not None:
            self._journal.write(event, facts)


async def _answer(exchange: Exchange, defaults: Pace) -> None:
    try:
        pace = exchange.pace(defaults)
        if exchange.path == "/echo":
            await _echo(exchange, pace)
            return
        body = await exchange.whole_body()
        if pace.first_byte_delay_ms:
            await exchange.pause(pace.first_byte_delay_ms)
        if pace.status is not None:
            raise Refused(pace.status, f"The demo router was asked for status {pace.status}")
        await _route(exchange, body, pace)
    except InvalidRequest as exc:
        await exchange.json(400, _error(exchange, 400, str(exc)), Pace())
    except Refused as exc:
        await exchange.json(exc.status, _error(exchange, exc.status, str(exc)), Pace())


async def _route(exchange: Exchange, body: bytes, pace: Pace) -> None:
    call = (exchange.method, exchange.path)
    if call == ("POST", "/v1/chat/completions"):
        completion = demo_replies.read_chat_completion(body)
        reply = demo_replies.compose(completion, pace.reply_words)
        created_s = int(time.time())
        if completion.stream:
            options = completion.stream_options or demo_replies.StreamOptions()
            chunks = demo_replies.chat_completion_chunks(reply, created_s, options.include_usage)
            await exchange.stream(chunks, pace)
        else:
            await exchange.json(200, demo_replies.chat_completion(reply, created_s), pace)
    elif call == ("POST", "/v1/messages"):
        request = demo_replies.read_messages(body)
        reply = demo_replies.compose(request, pace.reply_words)
        if request.stream:
            await exchange.stream(demo_replies.message_events(reply), pace)
        else:
            await exchange.json(200, demo_replies.message(reply), pace)
    elif call == ("GET", "/v1/models"):
        await exchange.json(200, demo_replies.models(), pace)
    elif exchange.path.startswith("/trpc/"):
        query = exchange.scope["query_string"].decode("latin-1")
        status, value = demo_trpc.answer(exchange.method, exchange.path.removeprefix("/trpc/"), query, body)
        await exchange.json(status, value, pace)
    else:
        raise Refused(404, f"Unknown request URL: {exchange.method} {exchange.path}")


async def _echo(exchange: Exchange, pace: Pace) -> None:
    digest, size = hashlib.sha256(), 0
    async for part in exchange.body():
        digest.update(part)
        size += len(part)
    if pace.first_byte_delay_ms:
        await exchange.pause(pace.first_byte_delay_ms)
    scope = exchange.scope
    value = {
        "method": exchange.method,
        "path": scope["raw_path"].decode("latin-1"),
        "query": scope["query_string"].decode("latin-1"),
        "http_version": scope["http_version"],
        "headers": [[name.decode("latin-1"), text.decode("latin-1")] for name, text in exchange.headers],
        "body_bytes": size,
        "body_sha256": digest.hexdigest(),
    }
    await exchange.json(pace.status or 200, value, pace)


def _error(exchange: Exchange, status: int, text: str) -> Json:
    if exchange.path == "/v1/messages":
        return demo_replies.anthropic_error(status, text) | {"request_id": exchange.request_id}
    if exchange.path.startswith("/trpc/"):
        return demo_trpc.error(status, text, exchange.path.removeprefix("/trpc/"))
    return demo_replies.openai_error(status, text)


class _Server(uvicorn.Server):
    """uvicorn, leaving the signals of the process it is a guest in alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def serving(router: DemoRouter) -> AsyncIterator[str]:
    """The router answers in this process at the yielded URL while the block runs."""
    listener = _listen("127.0.0.1", 0)
    server = _Server(_config(router, log_level=None))
    task = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                raise RuntimeError("the demo router did not start")
            await asyncio.sleep(0.001)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


def _config(router: DemoRouter, log_level: str | None) -> uvicorn.Config:
    return uvicorn.Config(
        router,
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=1,
    )


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def _duration_ms(text: str) -> int:
    found = re.fullmatch(r"(\d{1,9})(ms|s)?", text)
    if found is None or (text != "0" and found[2] is None):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration like 50ms or 2s")
    return min(int(found[1]) * (1000 if found[2] == "s" else 1), DELAY_MS_MAX)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; the port is the first line on stdout."""
    parser = argparse.ArgumentParser(prog="python -m gateway.embedded.demo_router", description="A demo AI router.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one (default)")
    parser.add_argument("--fd", type=int, help="an inherited listening socket, instead of host and port")
    parser.add_argument("--first-byte-delay", type=_duration_ms, default=0, metavar="50ms")
    parser.add_argument("--chunk-delay", type=_duration_ms, default=0, metavar="20ms")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="append one JSON line per event of a request")
    options = parser.parse_args(argv)
    listener = _listen(options.host, options.port) if options.fd is None else socket.socket(fileno=options.fd)
    pace = Pace(first_byte_delay_ms=options.first_byte_delay, chunk_delay_ms=options.chunk_delay)
    journal = None if options.journal is None else Journal(options.journal)
    # Listening before the port is told: whoever reads it may connect at once.
    listener.listen(2048)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    # Critical only: uvicorn reports every connection dropped on purpose as an exception.
    uvicorn.Server(_config(DemoRouter(pace, journal), log_level="critical")).run(sockets=[listener])


if __name__ == "__main__":
    main()

"""The multiplexed connection: replies go to whom they belong, deadlines hold, outages end."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import hiredis
import pytest

from gateway.errors import ConfigError, StoreUnavailable
from gateway.stores import Redis, Script
from gateway.stores.node import Node, error_kind
from tests.waiting import until

ECHO = Script("echo", "return ARGV[1]")


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[Redis]:
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=[ECHO])
    redis.start()
    await redis.connected()
    yield redis
    await redis.close()


#: What a server says of itself, as far as anybody asks.
INFO = b"$47\r\nrun_id:0123456789abcdef0123456789abcdef01234567\r\n"


class Frozen:
    """A server that accepts and never says a word; what it got is in `received`."""

    def __init__(self, port: int = 0) -> None:
        self._port = port
        self.received = b""
        self.connections = 0
        self.open = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "Frozen":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self.url = f"redis://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        await until(lambda: self.open == 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                self.received += data
                await self.say(writer, data)
        self.open -= 1
        writer.close()

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        return None


class Stalling(Frozen):
    """Answers the sign-in, then freezes."""

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if b"PING" in data:
            writer.write(b"+PONG\r\n" + INFO)


async def test_a_thousand_callers_get_their_own_replies(store: Redis) -> None:
    replies = await asyncio.gather(*(store.run(ECHO, [], [str(number)]) for number in range(1000)))
    assert replies == [str(number).encode() for number in range(1000)]


async def test_a_cancelled_call_leaves_its_reply_to_nobody_else(store: Redis) -> None:
    """redis-py #2624: the next caller read another user's data."""
    for number in range(200):
        first = asyncio.create_task(store.run(ECHO, [], [f"secret-{number}"]))
        await asyncio.sleep(0)
        first.cancel()
        assert await store.run(ECHO, [], [f"mine-{number}"]) == f"mine-{number}".encode()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_server_that_forgot_its_scripts_is_given_them_again(store: Redis) -> None:
    await store.call("SCRIPT", "FLUSH")
    assert await store.run(ECHO, [], ["again"]) == b"again"


async def test_an_error_reply_is_a_store_failure_and_leaves_the_connection_usable(store: Redis) -> None:
    await store.call("SET", "text", "x")
    with pytest.raises(StoreUnavailable) as caught:
        await store.call("HGET", "text", "f")
    assert "WRONGTYPE" in str(caught.value)
    assert "WRONGTYPE" not in caught.value.refusal().message
    assert await store.call("GET", "text") == b"x"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("READONLY You can't write against a read only replica.", "READONLY"),
        ("OOM command not allowed when used memory > 'maxmemory'. script: 4c1e, on @user_script:1.", "OOM"),
        ("ERR Error running script (call to f_4c1e): @user_script:7: @user_script: 7: -OOM command not ...", "OOM"),
        ("ERR Error running script (call to f_4c1e): @user_script:7: WRONGTYPE Operation against ...", "WRONGTYPE"),
        ("ERR Error running script (call to f_4c1e): @user_script:7: user_script:7: attempt to call nil", "ERR"),
        ("ERR value is not an integer or out of range", "ERR"),
        ("ERR", "ERR"),
    ],
)
def test_the_kind_of_an_error_is_known_even_when_redis_6_wraps_it(said: str, kind: str) -> None:
    assert error_kind(hiredis.ReplyError(said)) == kind


async def test_nothing_listening_fails_at_once_and_says_where(unused_tcp_port: int) -> None:
    redis = Redis(f"redis://:secret@127.0.0.1:{unused_tcp_port}", timeout_ms=100, connect_timeout_ms=200)
    redis.start()
    with pytest.raises(StoreUnavailable) as caught:
        await redis.call("PING")
    assert str(unused_tcp_port) in str(caught.value) and "secret" not in str(caught.value)
    assert not caught.value.ambiguous  # nothing was sent, so there is nothing to undo
    await redis.close()


async def test_a_server_that_stops_answering_costs_each_caller_one_deadline() -> None:
    async with Stalling() as server:
        redis = Redis(server.url, timeout_ms=50, connect_timeout_ms=100)
        redis.start()
        await redis.connected()
        started = time.monotonic()
        outcomes = await asyncio.gather(*(redis.call("GET", "x") for _ in range(50)), return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) and outcome.ambiguous for outcome in outcomes)
        assert time.monotonic() - started < 1.0
        # The connection is given up and another one tried.
        await until(lambda: server.connections >= 2)
        await redis.close()


async def test_a_late_reply_is_not_taken_for_the_next_callers() -> None:
    class Late(Stalling):
        async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
            await super().say(writer, data)
            if b"slow" in data:
                slow_writer.set_result(writer)
            if b"fast" in data:
                (await slow_writer).write(b"$4\r\nlate\r\n$4\r\nfast\r\n")

    slow_writer: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
    async with Late() as server:
        redis = Redis(server.url, timeout_ms=200, connect_timeout_ms=1_000)
        redis.start()
        with pytest.raises(StoreUnavailable):
            await redis.call("GET", "slow")
        assert await redis.call("GET", "fast") == b"fast"
        await redis.close()


async def test_a_lost_connection_fails_every_waiting_call_and_none_is_sent_again() -> None:
    async with Stalling() as server:
        redis = Redis(server.url, timeout_ms=5_000, connect_timeout_ms=1_000)
        redis.start()
        await redis.connected()
        calls = [asyncio.create_task(redis.call("INCR", f"counter{number}")) for number in range(10)]
        await until(lambda: server.received.count(b"INCR") == 10)
        server.writers[0].transport.abort()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, StoreUnavailable) and outcome.ambiguous for outcome in outcomes)
        await until(lambda: server.connections == 2 and redis.usable)
        assert server.received.count(b"INCR") == 10
        await redis.close()


class Demoted(Frozen):
    """Has become a replica behind our back: it still answers, and takes no writes."""

    async def say(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if b"PING" in data:
            writer.write(b"+PONG\r\n" + INFO)
        if b"INCR" in data:
            writer.write(b"-READONLY You can't write against a read only replica.\r\n" * data.count(b"INCR"))


@pytest.mark.parametrize("young", [False, True])
async def test_a_server_that_takes_no_writes_any_more_is_looked_for_again(
    monkeypatch: pytest.MonkeyPatch, young: bool
) -> None:
    """Behind its name there may be another one now. One that is new as well is kept for a while."""
    monkeypatch.setattr("gateway.stores.node.DEMOTED_AFTER_S", 3600.0 if young else 0.0)
    async with Demoted() as server:
        redis = Redis(server.url, timeout_ms=1_000, connect_timeout_ms=1_000)
        redis.start()
        await redis.connected()
        calls = (redis.call("INCR", f"counter{number}") for number in range(10))
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, StoreUnavailable) and not outcome.ambiguous
        assert redis.usable is young
        if not young:
            await until(lambda: redis.usable)
        await redis.close()
        assert server.connections == (1 if young else 2)


async def test_connecting_goes_on_until_the_server_is_there(unused_tcp_port: int) -> None:
    redis = Redis(f"redis://127.0.0.1:{unused_tcp_port}", timeout_ms=500, connect_timeout_ms=500)
    redis.start()
    with pytest.raises(StoreUnavailable):
        await redis.call("PING")

    gone = asyncio.Event()

    async def pong(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(b"+PONG\r\n" + (INFO if b"INFO" in data else b""))
        writer.transport.abort()
        gone.set()

    server = await asyncio.start_server(pong, "127.0.0.1", unused_tcp_port)
    await until(lambda: redis.usable)
    assert await redis.call("PING") == b"PONG"
    await redis.close()
    await gone.wait()
    server.close()


def test_a_url_of_something_else_is_a_mistake_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="^REDIS_URL: expected a URL"):
        Redis("http://:secret@host", timeout_ms=100, connect_timeout_ms=100)


async def test_a_host_name_that_cannot_be_one_is_an_outage_not_a_crash() -> None:
    redis = Redis("redis://a..b", timeout_ms=100, connect_timeout_ms=200)
    redis.start()
    with pytest.raises(StoreUnavailable):
        await redis.call("PING")
    assert isinstance(redis._servers, Node)
    assert redis._servers._keeper is not None and not redis._servers._keeper.done()
    await redis.close()

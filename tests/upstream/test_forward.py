"""Forwarding by name: targets, retries, and failures in the words of `gateway.errors`."""

import asyncio
from collections.abc import AsyncIterator
from typing import Literal

import httpx
import pytest
import respx

from gateway import errors
from gateway.upstream import Timeouts, Upstreams
from tests.upstream.configured import Config
from tests.upstream.scripted import OK, Peer, Server, answering, until

HEADERS = [(b"Host", b"client.example"), (b"X-A", b"1")]


@pytest.fixture
async def upstreams(server: Server) -> AsyncIterator[Upstreams]:
    upstreams = Upstreams({"ai": Config((server.origin,), Timeouts(first_byte_ms=50, idle_ms=50))})
    yield upstreams
    await upstreams.aclose()


async def ask(
    upstreams: Upstreams,
    method: str = "GET",
    target: bytes = b"/",
    headers: list[tuple[bytes, bytes]] = HEADERS,
    body: bytes | AsyncIterator[bytes] | None = None,
) -> tuple[int, bytes]:
    async with upstreams.forward("ai", method, target, headers, body) as answer:
        return answer.status, b"".join([piece async for pieces in answer.pieces for piece in pieces])


def in_use(upstreams: Upstreams) -> int:
    return upstreams.stats()["ai"].in_use


async def test_the_answer_passes_as_it_came(server: Server, upstreams: Upstreams) -> None:
    server.script = answering(
        b"HTTP/1.1 418 Short And Stout\r\nX-b: 1\r\nx-B: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\ntea\r\n0\r\nX-Sum: 3\r\n\r\n"
    )
    async with upstreams.forward("ai", "GET", b"/", HEADERS, None) as answer:
        assert (answer.status, answer.reason, answer.sent) == (418, b"Short And Stout", True)
        assert answer.headers == [(b"X-b", b"1"), (b"x-B", b"2"), (b"Transfer-Encoding", b"chunked")]
        assert (answer.framing, answer.tunnel) == ("chunked", None)
        assert [piece async for pieces in answer.pieces for piece in pieces] == [b"tea"]
        assert answer.trailers == [(b"X-Sum", b"3")]


def heads_of(server: Server) -> list[bytes]:
    """The heads the server gets from now on; it answers each with OK."""
    heads: list[bytes] = []

    async def script(peer: Peer) -> None:
        while True:
            heads.append((await peer.request())[0])
            await peer.send(OK)

    server.script = script
    return heads


async def test_target_path_and_prefix(server: Server) -> None:
    heads = heads_of(server)
    upstreams = Upstreams({"ai": Config((server.origin + "/base/",))})
    await ask(upstreams, target=b"/a%2fb?x=%20#y")
    await ask(upstreams, target=b"//other/..")
    assert [head.partition(b"\r\n")[0] for head in heads] == [
        b"GET /base/a%2fb?x=%20#y HTTP/1.1",
        b"GET /base//other/.. HTTP/1.1",
    ]
    await upstreams.aclose()


@pytest.mark.parametrize("method", ["GET", "Query", "x-custom"])
async def test_the_method_goes_out_as_it_is(server: Server, upstreams: Upstreams, method: str) -> None:
    heads = heads_of(server)
    await ask(upstreams, method)
    assert heads[0].startswith(method.encode() + b" /")


@pytest.mark.parametrize(
    ("given", "seen_by_target", "seen_by_client"),
    [
        (
            [(b"Accept", b"*/*"), (b"hOST", b"client.example"), (b"X-A", b"1")],
            b"Accept: */*\r\nhOST: AUTHORITY\r\nX-A: 1",
            b"Accept: */*\r\nhOST: client.example\r\nX-A: 1",
        ),
        ([(b"X-A", b"1")], b"Host: AUTHORITY\r\nX-A: 1", b"Host: AUTHORITY\r\nX-A: 1"),
        (
            [(b"Host", b"a"), (b"X-A", b"1"), (b"host", b"b")],
            b"Host: AUTHORITY\r\nX-A: 1",
            b"Host: a\r\nX-A: 1\r\nhost: b",
        ),
    ],
    ids=["in its place", "none given", "two given"],
)
async def test_whose_host_the_upstream_sees(
    server: Server, given: list[tuple[bytes, bytes]], seen_by_target: bytes, seen_by_client: bytes
) -> None:
    heads = heads_of(server)
    hosts: tuple[Literal["target", "client"], ...] = ("target", "client")
    for host in hosts:
        upstreams = Upstreams({"ai": Config((server.origin,), host=host)})
        await ask(upstreams, headers=list(given))
        await upstreams.aclose()
    authority = b"127.0.0.1:%d" % server.port
    expected = [seen.replace(b"AUTHORITY", authority) for seen in (seen_by_target, seen_by_client)]
    assert [head.partition(b"\r\n")[2].removesuffix(b"\r\n\r\n") for head in heads] == expected


@pytest.mark.parametrize("target", [b"@evil.example/", b":1/", b"", b"http://evil.example/", b"*"])
async def test_a_target_cannot_choose_the_host(server: Server, upstreams: Upstreams, target: bytes) -> None:
    with pytest.raises(errors.BadRequest):
        await ask(upstreams, target=target)
    assert server.connections == 0


async def test_a_target_httpx_cannot_parse_is_forwarded_all_the_same(server: Server, upstreams: Upstreams) -> None:
    assert await ask(upstreams, target=b"/" + b"a" * 70_000) == (200, b"ok")


async def test_targets_take_turns_and_the_dead_are_skipped(server: Server) -> None:
    async with Server(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\ntwo")) as second, Server() as dead:
        await dead.__aexit__(None, None, None)
        upstreams = Upstreams({"ai": Config((server.origin, dead.origin, second.origin))})
        assert [(await ask(upstreams, "POST", body=b"x"))[1] for _ in range(10)] == [b"ok", b"two"] * 5
        await upstreams.aclose()


async def test_an_unreachable_upstream_was_never_reached() -> None:
    async with Server() as dead:
        pass
    upstreams = Upstreams({"ai": Config((dead.origin, dead.origin))})
    forwarding = upstreams.forward("ai", "POST", b"/", HEADERS, b"x")
    with pytest.raises(errors.UpstreamUnreachable) as caught:
        await forwarding.__aenter__()
    assert (caught.value.status, caught.value.code, caught.value.reached) == (502, "upstream_unreachable", False)
    assert forwarding.reached is False
    with pytest.raises(errors.UpstreamUnreachable):
        await upstreams.probe("ai")
    await upstreams.aclose()


async def test_a_connect_timeout_is_a_504_that_never_reached(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.closed()

    server.script = script
    origin = f"https://127.0.0.1:{server.port}"
    upstreams = Upstreams({"ai": Config((origin,), Timeouts(connect_ms=30), tls_verify=False)})
    with pytest.raises(errors.UpstreamUnreachable) as caught:
        await ask(upstreams)
    assert (caught.value.status, caught.value.code, caught.value.reached) == (504, "upstream_unreachable", False)
    with pytest.raises(errors.UpstreamUnreachable):
        await upstreams.probe("ai")
    await upstreams.aclose()


async def test_a_full_pool_is_busy_and_never_reached(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.closed()

    server.script = script
    config = Config((server.origin,), connections_max=1, requests_max=2, queue_timeout_ms=30)
    upstreams = Upstreams({"ai": config})
    first = asyncio.ensure_future(ask(upstreams))
    await until(lambda: in_use(upstreams) == 1)
    with pytest.raises(errors.UpstreamBusy) as caught:
        await ask(upstreams)
    assert caught.value.reached is False
    refusal = caught.value.refusal()
    assert (refusal.status, refusal.code, refusal.retry_after_ms, refusal.should_retry) == (
        503,
        "upstream_busy",
        1_000,
        True,
    )
    first.cancel()
    await asyncio.wait({first})
    await upstreams.aclose()


async def test_silence_is_an_upstream_timeout(server: Server, upstreams: Upstreams) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.closed()

    server.script = script
    forwarding = upstreams.forward("ai", "GET", b"/", HEADERS, None)
    with pytest.raises(errors.UpstreamTimeout) as caught:
        await forwarding.__aenter__()
    assert (caught.value.reached, forwarding.reached) == (True, True)
    assert in_use(upstreams) == 0


@pytest.mark.parametrize("end", ["close", "silence"])
async def test_failures_within_the_body_are_mapped(server: Server, upstreams: Upstreams, end: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart")
        if end == "silence":
            await peer.closed()

    server.script = script
    seen = b""
    with pytest.raises(errors.UpstreamBroke if end == "close" else errors.UpstreamTimeout):
        async with upstreams.forward("ai", "GET", b"/", HEADERS, None) as answer:
            async for pieces in answer.pieces:
                seen += b"".join(pieces)
    assert seen == b"part"
    assert in_use(upstreams) == 0


async def test_leaving_the_block_early_closes_the_connection(server: Server, upstreams: Upstreams) -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\npart")
        await peer.closed()
        gone.set()

    server.script = script
    async with upstreams.forward("ai", "GET", b"/", HEADERS, None) as answer:
        assert await anext(answer.pieces) == [b"part"]
    assert in_use(upstreams) == 0
    await asyncio.wait_for(gone.wait(), 2)


async def _dies_when_reused(peer: Peer) -> None:
    """The first two connections answer once, and close without an answer when they are asked again."""
    await peer.request()
    await peer.send(OK)
    while True:
        await peer.request()
        if peer.number <= 2:
            return
        await peer.send(OK)


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"])
async def test_a_kept_connection_that_turns_out_dead_is_retried_on_a_new_one(
    server: Server, upstreams: Upstreams, method: str
) -> None:
    server.script = _dies_when_reused
    await asyncio.gather(ask(upstreams), ask(upstreams))
    assert upstreams.stats()["ai"].idle == 2
    body = b"x" if method == "PUT" else None
    async with upstreams.forward("ai", method, b"/", HEADERS, body) as answer:
        assert answer.status == 200
    assert server.connections == 3, "the other idle connection is as suspect and must not serve the retry"


async def test_what_must_not_be_sent_twice_is_not_retried(server: Server, upstreams: Upstreams) -> None:
    async def once() -> AsyncIterator[bytes]:
        yield b"x"

    server.script = _dies_when_reused
    await asyncio.gather(ask(upstreams), ask(upstreams))
    with pytest.raises(errors.UpstreamBroke) as caught:
        await ask(upstreams, "POST", body=b"x")
    assert caught.value.reached is True
    server.connections = 0
    await ask(upstreams)
    with pytest.raises(errors.UpstreamBroke):
        await ask(upstreams, "PUT", body=once())
    assert server.connections == 1


async def test_a_retry_that_cannot_connect_does_not_forget_the_first_attempt(server: Server) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()

    server.script = script
    upstreams = Upstreams({"ai": Config((server.origin,))})
    await ask(upstreams)
    server.stop_listening()
    forwarding = upstreams.forward("ai", "GET", b"/", HEADERS, None)
    with pytest.raises(errors.UpstreamUnreachable) as caught:
        await forwarding.__aenter__()
    assert (caught.value.reached, forwarding.reached) == (True, True)
    await upstreams.aclose()


async def test_a_kept_connection_that_breaks_within_the_answer_is_not_retried(
    server: Server, upstreams: Upstreams
) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK)
        await peer.request()
        await peer.send(b"HTTP/1.1 200")

    server.script = script
    await ask(upstreams)
    with pytest.raises(errors.UpstreamBroke):
        await ask(upstreams)
    assert server.connections == 1


async def test_a_new_connection_that_breaks_is_not_retried(server: Server, upstreams: Upstreams) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    server.script = script
    with pytest.raises(errors.UpstreamBroke):
        await ask(upstreams)
    assert server.connections == 1


async def test_reached_is_known_when_cancelled(server: Server, upstreams: Upstreams) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.closed()

    server.script = script
    early = upstreams.forward("ai", "GET", b"/", HEADERS, None)
    task = asyncio.ensure_future(early.__aenter__())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert early.reached is False
    late = upstreams.forward("ai", "GET", b"/", HEADERS, None)
    task = asyncio.ensure_future(late.__aenter__())
    await asked.wait()
    task.cancel()
    await asyncio.wait({task})
    assert late.reached is True
    assert in_use(upstreams) == 0


async def test_a_request_that_cannot_be_framed_is_the_callers_fault(server: Server, upstreams: Upstreams) -> None:
    forwarding = upstreams.forward("ai", "POST", b"/", [(b"Content-Length", b"9")], b"short")
    with pytest.raises(errors.BadRequest):
        await forwarding.__aenter__()
    assert forwarding.reached is False
    assert server.connections == 0


async def test_any_httpx_transport_can_stand_in() -> None:
    router = respx.Router()
    route = router.post("http://ai:3000/base/v1/chat?x=1").respond(201, headers={"X-A": "1"}, content=b"hello")
    router.get("http://ai:3000/base/down").mock(side_effect=httpx.ConnectError)
    router.get("http://ai:3000/base/slow").mock(side_effect=httpx.ReadTimeout)
    router.get("http://ai:3000/base/keys").respond(200, content=b"{}")
    upstreams = Upstreams({"ai": Config(("http://ai:3000/base",))}, transport=httpx.MockTransport(router.async_handler))
    async with upstreams.forward("ai", "POST", b"/v1/chat?x=1", HEADERS, b"body") as answer:
        assert (answer.status, answer.sent) == (201, True)
        assert (b"X-A", b"1") in answer.headers
        assert [piece async for pieces in answer.pieces for piece in pieces] == [b"hello"]
    assert route.calls.last.request.headers["host"] == "ai:3000"
    assert route.calls.last.request.read() == b"body"
    down = upstreams.forward("ai", "GET", b"/down", HEADERS, None)
    with pytest.raises(errors.UpstreamUnreachable):
        await down.__aenter__()
    assert down.reached is False
    slow = upstreams.forward("ai", "GET", b"/slow", HEADERS, None)
    with pytest.raises(errors.UpstreamTimeout):
        await slow.__aenter__()
    assert slow.reached is True
    assert await upstreams.fetch("http://ai:3000/base/keys", timeout_ms=1_000, bytes_max=10) == b"{}"
    await upstreams.probe("ai")
    assert (upstreams.stats()["ai"].open, upstreams.stats()["ai"].in_flight) == (0, 0)
    await upstreams.aclose()


@pytest.mark.parametrize("url", ["demo", "ftp://host", "http://", "http://host/?q", "http://u:p@host", "http://[::1"])
def test_a_target_that_is_no_http_url_is_a_config_error(url: str) -> None:
    with pytest.raises(errors.ConfigError):
        Upstreams({"ai": Config((url,))})


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("ca_file", Config(("https://host",), ca_file="/nonexistent.pem")),
        ("client_cert_file", Config(("https://host",), client_cert_file="/nonexistent.pem")),
    ],
)
def test_a_file_that_cannot_be_read_is_a_config_error(key: str, config: Config) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Upstreams({"ai": config})
    assert caught.value.problems[0].startswith(f"upstreams.ai.{key}: /nonexistent.pem cannot be used")


async def test_urls_are_remembered_up_to_a_bound(server: Server, upstreams: Upstreams) -> None:
    target = upstreams._upstreams["ai"].targets[0]
    for number in range(5_000):
        target.url(b"/%d" % number)
    assert target.url(b"/4999") is target.url(b"/4999")
    assert len(target._urls) == 4_096


# -- documents and health ----------------------------------------------------------------------------------------


async def test_fetch_returns_the_document(server: Server, upstreams: Upstreams) -> None:
    server.script = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nkeys")
    assert await upstreams.fetch(server.origin + "/jwks.json", timeout_ms=1_000, bytes_max=4) == b"keys"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nkeys!",
        b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
async def test_fetch_takes_nothing_but_a_small_200(server: Server, upstreams: Upstreams, answer: bytes) -> None:
    server.script = answering(answer)
    with pytest.raises(errors.UpstreamBroke):
        await upstreams.fetch(server.origin + "/", timeout_ms=1_000, bytes_max=4)


async def test_fetch_is_bounded_in_time(server: Server, upstreams: Upstreams) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not peer.reader.at_eof():
            await peer.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.005)

    server.script = script
    with pytest.raises(errors.UpstreamTimeout):
        await upstreams.fetch(server.origin + "/", timeout_ms=50, bytes_max=1_000_000)
    with pytest.raises(errors.UpstreamUnreachable):
        await upstreams.fetch("ftp://nowhere", timeout_ms=50, bytes_max=4)


async def test_probe_passes_when_any_target_accepts(server: Server) -> None:
    async with Server() as dead:
        pass
    upstreams = Upstreams({"ai": Config((dead.origin, server.origin))})
    await upstreams.probe("ai")
    await upstreams.aclose()

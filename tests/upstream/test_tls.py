"""TLS to the upstream, names, and IPv6."""

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.upstream import Transport, tls_context
from tests.upstream.certificates import self_signed
from tests.upstream.scripted import Peer, Server, exchange, read, request, stream_of, turns, until


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.fixture
async def tls_server(pem: Path) -> AsyncIterator[Server]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    async with Server(tls=context) as server:
        yield server


async def test_a_trusted_upstream_is_reused(tls_server: Server, pem: Path) -> None:
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    for _ in range(3):
        assert await exchange(transport, request(tls_server)) == (200, b"ok")
    assert tls_server.connections == 1
    await transport.probe(httpx.URL(tls_server.origin))
    await transport.aclose()


async def test_an_unknown_authority_is_refused(tls_server: Server) -> None:
    transport = Transport()
    with pytest.raises(httpx.ConnectError):
        await exchange(transport, request(tls_server))
    with pytest.raises(httpx.ConnectError):
        await transport.probe(httpx.URL(tls_server.origin))
    assert transport.stats().open == 0


async def test_verification_can_be_switched_off(tls_server: Server) -> None:
    transport = Transport(tls=tls_context(verify=False))
    assert await exchange(transport, request(tls_server)) == (200, b"ok")
    await transport.aclose()


async def test_large_bodies_pass_both_ways(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        while True:
            _, body = await peer.request()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    body = bytes(range(256)) * 8_192
    for _ in range(2):
        assert await exchange(transport, request(tls_server, "POST", body=body)) == (200, body)
    assert tls_server.connections == 1
    await transport.aclose()


async def test_closing_early_closes_the_upstream_connection(tls_server: Server, pem: Path) -> None:
    gone: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        await peer.closed()
        gone.append(1)

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    response = await transport.handle_async_request(request(tls_server))
    await stream_of(response).aclose()
    await until(lambda: gone == [1], timeout_s=2)


async def test_a_body_that_ends_without_close_notify_was_cut(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil close")
        await turns(10)
        peer.writer.transport.abort()

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    response = await transport.handle_async_request(request(tls_server))
    with pytest.raises(httpx.ReadError):
        await read(response)


async def test_a_body_that_ends_with_close_notify_is_whole(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil close")

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    assert await exchange(transport, request(tls_server)) == (200, b"until close")


# -- sessions, names, certificates -------------------------------------------------------------------------------


class Handshakes:
    """A TLS server that keeps, per connection, whether its session was resumed, and the name asked for."""

    def __init__(self, pem: Path, version: ssl.TLSVersion | None = None, authority: Path | None = None) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(pem)
        if version is not None:
            self.context.minimum_version = self.context.maximum_version = version
        if authority is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED
            self.context.load_verify_locations(authority)
        self.context.sni_callback = self._named
        self.names: list[str | None] = []
        self.resumed: list[bool] = []
        self.subjects: list[object] = []
        self.server = Server(self.script, tls=self.context)

    def _named(self, tls: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self.names.append(name)

    async def script(self, peer: Peer) -> None:
        tls: ssl.SSLObject = peer.writer.get_extra_info("ssl_object")
        self.resumed.append(bool(tls.session_reused))
        self.subjects.append((tls.getpeercert() or {}).get("subject"))
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")

    def url(self, host: str) -> str:
        return f"https://{host}:{self.server.port}/"


async def ask(transport: Transport, url: str) -> tuple[int, bytes]:
    return await exchange(transport, httpx.Request("GET", url, stream=httpx.ByteStream(b"")))


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@VERSIONS
async def test_later_connections_resume_the_session(pem: Path, version: ssl.TLSVersion) -> None:
    handshakes = Handshakes(pem, version)
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    async with handshakes.server:
        for _ in range(3):
            assert await ask(transport, handshakes.url("127.0.0.1")) == (200, b"ok")
    assert handshakes.resumed == [False, True, True]


@VERSIONS
async def test_a_session_is_never_offered_to_another_name(pem: Path, version: ssl.TLSVersion) -> None:
    handshakes = Handshakes(pem, version)
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    async with handshakes.server:
        for host in ("localhost", "127.0.0.1", "localhost", "127.0.0.1"):
            assert await ask(transport, handshakes.url(host)) == (200, b"ok")
    # A resumed session is not verified again.
    assert handshakes.resumed == [False, False, True, True]


@VERSIONS
async def test_an_upstream_that_forgot_the_session_is_no_problem(pem: Path, version: ssl.TLSVersion) -> None:
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    first, second = Handshakes(pem, version), Handshakes(pem, version)
    async with first.server, second.server:
        assert await ask(transport, first.url("127.0.0.1")) == (200, b"ok")
        for _ in range(2):
            assert await ask(transport, second.url("127.0.0.1")) == (200, b"ok")
    assert second.resumed == [False, True]


async def test_a_failed_handshake_forgets_the_session(pem: Path, tmp_path: Path) -> None:
    first, stranger = Handshakes(pem), Handshakes(self_signed(tmp_path / "stranger.pem"))
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    async with first.server, stranger.server:
        assert await ask(transport, first.url("127.0.0.1")) == (200, b"ok")
        with pytest.raises(httpx.ConnectError):
            await ask(transport, stranger.url("127.0.0.1"))
        assert await ask(transport, first.url("127.0.0.1")) == (200, b"ok")
    assert first.resumed == [False, False]


async def test_a_plain_context_works_too(pem: Path) -> None:
    handshakes = Handshakes(pem)
    transport = Transport(tls=ssl.create_default_context(cafile=str(pem)))
    async with handshakes.server:
        for _ in range(2):
            assert await ask(transport, handshakes.url("127.0.0.1")) == (200, b"ok")
    assert handshakes.resumed == [False, False]


async def test_names_are_announced_and_addresses_are_not(pem: Path) -> None:
    handshakes = Handshakes(pem)
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    async with handshakes.server:
        for host in ("localhost", "127.0.0.1"):
            assert await ask(transport, handshakes.url(host)) == (200, b"ok")
    assert handshakes.names == ["localhost", None]


@VERSIONS
async def test_the_upstream_may_demand_aself_signed(pem: Path, tmp_path: Path, version: ssl.TLSVersion) -> None:
    ours = self_signed(tmp_path / "gateway.pem", name="gateway")
    handshakes = Handshakes(pem, version, authority=ours)
    known = Transport(tls=tls_context(ca_file=str(pem), cert_file=str(ours)))
    unknown = Transport(tls=tls_context(ca_file=str(pem)))
    async with handshakes.server:
        for _ in range(2):
            assert await ask(known, handshakes.url("127.0.0.1")) == (200, b"ok")
        # In TLS 1.3 the client learns of the refusal only when it reads.
        with pytest.raises(httpx.TransportError):
            await ask(unknown, handshakes.url("127.0.0.1"))
    assert handshakes.subjects[0] == ((("commonName", "gateway"),),)
    assert handshakes.resumed[:2] == [False, True]
    assert unknown.stats().open == 0


async def test_certificate_and_key_may_be_in_two_files(pem: Path, tmp_path: Path) -> None:
    both = self_signed(tmp_path / "gateway.pem").read_bytes()
    end = both.index(b"-----BEGIN PRIVATE KEY")
    (tmp_path / "cert.pem").write_bytes(both[:end])
    (tmp_path / "key.pem").write_bytes(both[end:])
    tls_context(cert_file=str(tmp_path / "cert.pem"), key_file=str(tmp_path / "key.pem"))
    with pytest.raises(OSError):
        tls_context(cert_file=str(tmp_path / "cert.pem"))


async def test_an_encrypted_key_is_an_error_and_no_question_on_the_terminal(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    locked = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )
    certificate = self_signed(tmp_path / "cert.pem").read_bytes().partition(b"-----BEGIN PRIVATE KEY")[0]
    (tmp_path / "locked.pem").write_bytes(certificate + locked)
    with pytest.raises(OSError, match="encrypted"):
        tls_context(cert_file=str(tmp_path / "locked.pem"))


async def test_a_tunnel_inside_tls(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nearly")
        await peer.send((await peer.reader.readexactly(7)).upper())

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    upgrade = [(b"Connection", b"upgrade"), (b"Upgrade", b"x")]
    response = await transport.handle_async_request(request(tls_server, headers=upgrade))
    tunnel = response.extensions["network_stream"]
    assert await tunnel.read() == b"early"
    await tunnel.write(b"message")
    assert await tunnel.read() == b"MESSAGE"
    assert await tunnel.read() == b""
    await tunnel.aclose()
    assert transport.stats().open == 0


async def test_a_tunnel_that_ends_without_close_notify_was_cut(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n")
        await turns(10)
        peer.writer.transport.abort()

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    upgrade = [(b"Connection", b"upgrade"), (b"Upgrade", b"x")]
    response = await transport.handle_async_request(request(tls_server, headers=upgrade))
    with pytest.raises(httpx.ReadError):
        await response.extensions["network_stream"].read()
    assert transport.stats().open == 0


async def test_localhost_is_resolved(server: Server, transport: Transport) -> None:
    message = httpx.Request("GET", f"http://localhost:{server.port}/", stream=httpx.ByteStream(b""))
    assert await exchange(transport, message) == (200, b"ok")


async def test_ipv6(transport: Transport) -> None:
    try:
        server = await Server(host="::1").__aenter__()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    assert await exchange(transport, request(server)) == (200, b"ok")
    await server.__aexit__(None, None, None)


@pytest.mark.parametrize("url", ["ftp://host/", "http:///path", "/path"])
async def test_other_urls_cannot_be_connected_to(transport: Transport, url: str) -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        await transport.handle_async_request(httpx.Request("GET", url, stream=httpx.ByteStream(b"")))

"""TLS to the upstream, names, and IPv6."""

import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.upstream import Transport, tls_context
from tests.upstream.scripted import Peer, Server, exchange, read, request, stream_of, turns, until


def _certificate(path: Path) -> Path:
    """A self-signed certificate for localhost and 127.0.0.1, with its key, in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _certificate(tmp_path_factory.mktemp("tls") / "server.pem")


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
    with pytest.raises(httpx.RemoteProtocolError):
        await read(response)


async def test_a_body_that_ends_with_close_notify_is_whole(tls_server: Server, pem: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil close")

    tls_server.script = script
    transport = Transport(tls=tls_context(ca_file=str(pem)))
    assert await exchange(transport, request(tls_server)) == (200, b"until close")


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

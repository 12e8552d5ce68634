"""A JWKS document's life, and which of its keys are of use."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from gateway.errors import ConfigError, StoreUnavailable, UpstreamUnreachable
from gateway.identity import jwks as module
from gateway.identity.jwks import RETRY_MS, STALE_MS, UNKNOWN_KID_INTERVAL_MS, RemoteKeys
from gateway.identity.verify_key import KEYS_MAX, parse_jwks, pem_key, secret_key
from tests.identity.given import Gate, Time, until
from tests.identity.signing import (
    SECRET,
    JwksServer,
    ec_key,
    jwk,
    jwks,
    private_pem,
    public_pem,
    rsa_key,
)

URL = "https://issuer.example/jwks.json"
TTL_MS = 600_000


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def server() -> JwksServer:
    return JwksServer(jwks(jwk(ec_key(0), kid="a")))


@pytest.fixture
async def remote(server: JwksServer, time: Time) -> AsyncIterator[RemoteKeys]:
    remote = RemoteKeys(URL, server.fetch, ttl_ms=TTL_MS, monotonic_ms=time)
    yield remote
    await remote.close()


async def kids(remote: RemoteKeys) -> list[str | None]:
    return [key.kid for key in await remote.keys()]


async def test_the_document_is_read_once_per_ttl(remote: RemoteKeys, server: JwksServer, time: Time) -> None:
    assert await kids(remote) == ["a"]
    time.pass_ms(TTL_MS * 4 // 5 - 1)
    assert await kids(remote) == ["a"]
    assert server.fetches == 1
    server.body = jwks(jwk(ec_key(1), kid="b"))
    time.pass_ms(TTL_MS)
    assert await kids(remote) == ["b"]
    assert server.fetches == 2


async def test_it_is_read_again_in_time_without_making_anybody_wait(
    remote: RemoteKeys, server: JwksServer, time: Time
) -> None:
    await remote.keys()
    server.body = jwks(jwk(ec_key(1), kid="b"))
    time.pass_ms(TTL_MS * 4 // 5)
    assert await kids(remote) == ["a"]
    await until(lambda: server.fetches == 2)
    await until(lambda: remote.version == 2)
    assert await kids(remote) == ["b"]


async def test_many_callers_make_one_fetch_and_a_cancelled_one_harms_nobody(time: Time) -> None:
    gate, server = Gate(), JwksServer(jwks(jwk(ec_key(0), kid="a")))

    async def fetch(url: str) -> bytes:
        await gate()
        return await server.fetch(url)

    remote = RemoteKeys(URL, fetch, ttl_ms=TTL_MS, monotonic_ms=time)
    first, *others = [asyncio.create_task(kids(remote)) for _ in range(20)]
    await until(lambda: gate.begun == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open.set()
    assert await asyncio.gather(*others) == [["a"]] * 19
    assert gate.begun == 1


async def test_the_version_changes_with_the_keys_and_not_with_every_read(
    remote: RemoteKeys, server: JwksServer, time: Time
) -> None:
    await remote.keys()
    before = remote.version
    time.pass_ms(TTL_MS)
    server.body += b"\n"
    await remote.keys()
    assert (server.fetches, remote.version) == (2, before)
    time.pass_ms(TTL_MS)
    server.body = jwks(jwk(ec_key(0), kid="a"), jwk(ec_key(1), kid="b"))
    await remote.keys()
    assert remote.version != before


@pytest.mark.parametrize(
    "break_it",
    [
        lambda server: setattr(server, "error", UpstreamUnreachable()),
        lambda server: setattr(server, "error", ConnectionResetError()),
        lambda server: setattr(server, "error", TimeoutError()),
        lambda server: setattr(server, "body", b"<html>"),
        lambda server: setattr(server, "body", b"\xff\xfe"),
        lambda server: setattr(server, "body", b"[]"),
        lambda server: setattr(server, "body", b'{"keys": {}}'),
        lambda server: setattr(server, "body", b'{"keys": []}'),
        lambda server: setattr(server, "body", b'{"keys": [1, null, {"kty": "oct", "k": "c2VjcmV0"}]}'),
        lambda server: setattr(server, "body", b"[" * 100_000),
        lambda server: setattr(server, "body", b" " * 300_000 + server.body),
    ],
)
async def test_when_the_document_cannot_be_read_the_old_keys_stay_for_a_day_beyond_their_ttl(
    remote: RemoteKeys, server: JwksServer, time: Time, break_it: Callable[[JwksServer], None]
) -> None:
    await remote.keys()
    break_it(server)
    with structlog.testing.capture_logs() as logged:
        time.pass_ms(TTL_MS + STALE_MS - 1)
        assert await kids(remote) == ["a"]
        assert await kids(remote) == ["a"]
        time.pass_ms(1)
        with pytest.raises(StoreUnavailable):
            await remote.keys()
    assert [line["event"] for line in logged] == ["jwks_not_readable"]


async def test_an_outage_is_logged_at_its_ends_and_tried_at_intervals(
    remote: RemoteKeys, server: JwksServer, time: Time
) -> None:
    await remote.keys()
    server.error = UpstreamUnreachable()
    with structlog.testing.capture_logs() as logged:
        time.pass_ms(TTL_MS)
        for _ in range(100):
            await remote.keys()
        assert server.fetches == 2
        time.pass_ms(RETRY_MS)
        await remote.keys()
        await until(lambda: server.fetches == 3)
        server.error = None
        time.pass_ms(RETRY_MS)
        await remote.keys()
        await until(lambda: server.fetches == 4)
    await until(lambda: len(logged) == 2)
    assert [line["event"] for line in logged] == ["jwks_not_readable", "jwks_read_again"]


async def test_without_any_keys_callers_learn_at_once_that_the_server_is_away(
    remote: RemoteKeys, server: JwksServer, time: Time
) -> None:
    server.error = UpstreamUnreachable()
    for _ in range(10):
        with pytest.raises(StoreUnavailable):
            await remote.keys()
    assert server.fetches == 1
    server.error = None
    time.pass_ms(1_000)
    assert await kids(remote) == ["a"]


async def test_a_server_that_never_answers_is_given_up(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_TIMEOUT_MS", 10)

    async def fetch(url: str) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    remote = RemoteKeys(URL, fetch, ttl_ms=TTL_MS, monotonic_ms=time)
    with pytest.raises(StoreUnavailable):
        await remote.keys()


async def test_looking_for_new_keys_is_done_at_most_every_30_seconds(
    remote: RemoteKeys, server: JwksServer, time: Time
) -> None:
    await remote.keys()
    assert await remote.renewed()
    for _ in range(100):
        assert not await remote.renewed()
    time.pass_ms(UNKNOWN_KID_INTERVAL_MS - 1)
    assert not await remote.renewed()
    time.pass_ms(1)
    assert await remote.renewed()
    assert server.fetches == 3


async def test_closing_ends_a_fetch_under_way(time: Time) -> None:
    gate = Gate()

    async def fetch(url: str) -> bytes:
        await gate()
        return b""

    remote = RemoteKeys(URL, fetch, ttl_ms=TTL_MS, monotonic_ms=time)
    waiting = asyncio.create_task(remote.keys())
    await until(lambda: gate.begun == 1)
    await remote.close()
    with pytest.raises(StoreUnavailable):
        await waiting


@pytest.mark.parametrize(
    "useless",
    [
        {"use": "enc"},
        {"alg": "ES384"},
        {"alg": "RS256"},
        {"alg": "none"},
        {"alg": None, "crv": "P-384"},
        {"key_ops": ["sign"]},
        {"key_ops": "verify"},
        {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"},
        {"kty": "OKP", "crv": "Ed25519"},
        {"kty": None},
        {"kty": ["EC"]},
        {"x": None},
        {"x": "!!"},
        {"x": 5},
        {"y": "AAAA"},
        {"kid": 5},
    ],
)
def test_a_key_for_another_purpose_or_a_broken_one_is_passed_over(useless: dict[str, Any]) -> None:
    document = jwks(jwk(ec_key(0), **{"kid": "bad", **useless}), jwk(ec_key(1), kid="good"))
    assert [key.kid for key in parse_jwks(document)] == ["good"]


def test_each_key_verifies_the_one_algorithm_of_its_kind() -> None:
    document = jwks(
        jwk(rsa_key(), kid="r", alg="RS256", use="sig"), jwk(ec_key(), key_ops=["verify"]), jwk(rsa_key(0, 1024))
    )
    assert [(key.kid, key.algorithm) for key in parse_jwks(document)] == [("r", "RS256"), (None, "ES256")]


def test_a_leaked_private_key_is_read_as_its_public_half() -> None:
    private = rsa_key().private_numbers().d
    (key,) = parse_jwks(jwks(jwk(rsa_key(), d=f"{private:x}")))
    assert key.material == rsa_key().public_key()


def test_no_more_than_64_keys_are_read() -> None:
    assert len(parse_jwks(jwks(*(jwk(ec_key(), kid=str(number)) for number in range(KEYS_MAX + 5))))) == KEYS_MAX


def test_a_secret_must_be_long_and_no_pem() -> None:
    assert secret_key(SECRET).algorithm == "HS256"
    with pytest.raises(ConfigError, match="shorter than 32 bytes") as refused:
        secret_key("hunter2")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match="pem_file"):
        secret_key(public_pem(rsa_key()).decode())


def test_a_pem_file_must_hold_a_public_key_that_is_strong_enough() -> None:
    assert pem_key(public_pem(rsa_key()), "a.pem").algorithm == "RS256"
    assert pem_key(public_pem(ec_key()), "a.pem").algorithm == "ES256"
    for pem in (b"", b"text", private_pem(rsa_key())):
        with pytest.raises(ConfigError, match="a.pem holds no PEM public key"):
            pem_key(pem, "a.pem")
    for weak in (rsa_key(0, 1024), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(ConfigError, match="a.pem is neither"):
            pem_key(public_pem(weak), "a.pem")


def test_a_pem_certificate_stands_for_its_public_key() -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer.example")])
    start = datetime(2020, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, ec_key().public_key(), 1, start, start + timedelta(days=1))
        .sign(ec_key(), SHA256())
        .public_bytes(Encoding.PEM)
    )
    assert pem_key(certificate, "a.pem").material == ec_key().public_key()

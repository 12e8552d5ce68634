"""Which tokens are accepted, and every way in which one is not."""

import asyncio
import base64
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jwt as pyjwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConfigError, StoreUnavailable, Unauthenticated, UpstreamUnreachable
from gateway.identity import jwt as module
from gateway.identity.jwks import STALE_MS, UNKNOWN_KID_INTERVAL_MS
from gateway.identity.jwt import CANDIDATES_MAX, TOKEN_BYTES_MAX, JwtSource
from gateway.types import Facts, Principal
from tests.identity.given import Time, facts
from tests.identity.signing import SECRET, JwksServer, ec_key, jwk, jwks, public_pem, rsa_key, segment, sign

URL = "https://issuer.example/jwks.json"
NOW_S = 1_800_000_000


@dataclass(frozen=True)
class Key:
    jwks: str | None = None
    secret: str | None = None
    pem_file: str | Path | None = None


@dataclass(frozen=True)
class Config:
    keys: tuple[Key, ...] = (Key(secret=SECRET),)
    algorithms: tuple[str, ...] = ("HS256", "RS256", "ES256")
    issuer: str | None = None
    audience: str | None = None
    org: str = "org_id"
    user: str | None = "sub"
    plan: str | None = "plan"
    default_plan: str | None = None
    header: str = "Authorization"
    leeway_ms: int = 30_000
    jwks_ttl_ms: int = 600_000


class Bench:
    """A source with its clocks and its JWKS server."""

    def __init__(self, config: Config, body: bytes = b"", kept: frozenset[str] = frozenset()) -> None:
        self.mono, self.wall, self.server = Time(), Time(NOW_S * 1000), JwksServer(body)
        self.source = JwtSource(config, self.server.fetch, monotonic_ms=self.mono, wall_ms=self.wall, claims=kept)

    async def accepts(self, token: str) -> Principal:
        principal = await self.source.identify(bearing(token))
        assert principal is not None
        return principal

    async def refuses(self, token: str) -> str:
        with pytest.raises(Unauthenticated) as refused:
            await self.source.identify(bearing(token))
        for part in token.split("."):
            assert len(part) < 8 or part not in str(refused.value)
        return refused.value.message


def bearing(token: str) -> Facts:
    return facts(("authorization", f"Bearer {token}"))


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims with these changes; None takes one away."""
    good = {"org_id": "acme", "sub": "auth0|5f7c", "plan": "pro", "exp": NOW_S + 60, **changes}
    return {name: value for name, value in good.items() if value is not None}


def hs256(**changes: Any) -> str:
    return sign(SECRET, claims(**changes), "HS256")


def raw(payload: bytes, **head: Any) -> str:
    """A token over any payload at all, properly signed with the secret."""
    return pyjwt.PyJWS().encode(payload, SECRET, "HS256", headers=head)


@pytest.fixture
def bench() -> Bench:
    return Bench(Config())


@pytest.fixture
async def remote() -> AsyncIterator[Bench]:
    bench = Bench(Config(keys=(Key(jwks=URL),)), jwks(jwk(rsa_key(0), kid="r0"), jwk(ec_key(0), kid="e0")))
    yield bench
    await bench.source.close()


def mac(signing_input: str, secret: bytes) -> str:
    """The HS256 signature, with none of PyJWT's checks of the secret."""
    return base64.urlsafe_b64encode(hmac.digest(secret, signing_input.encode(), "sha256")).rstrip(b"=").decode()


def pem_file(tmp_path: Path, pem: bytes) -> Path:
    file = tmp_path / "issuer.pem"
    file.write_bytes(pem)
    return file


# What is accepted


async def test_a_token_says_who_asks(bench: Bench) -> None:
    assert await bench.accepts(hs256(jti="tok_1")) == Principal("acme", "pro", "auth0|5f7c", "tok_1", "jwt")


async def test_rs256_and_es256_tokens_verify_with_keys_from_a_jwks_document(remote: Bench) -> None:
    for _ in range(2):
        assert (await remote.accepts(sign(rsa_key(0), claims(), "RS256", kid="r0"))).org_id == "acme"
        assert (await remote.accepts(sign(ec_key(0), claims(), "ES256", kid="e0"))).org_id == "acme"
        assert (await remote.accepts(sign(ec_key(0), claims(), "ES256"))).org_id == "acme"
    assert remote.server.fetches == 1


async def test_rs256_and_es256_tokens_verify_with_a_pem_file(tmp_path: Path) -> None:
    for key, algorithm in ((rsa_key(), "RS256"), (ec_key(), "ES256")):
        bench = Bench(Config(keys=(Key(pem_file=pem_file(tmp_path, public_pem(key))),)))
        await bench.accepts(sign(key, claims(), algorithm))
        await bench.accepts(sign(key, claims(), algorithm, kid="any"))


async def test_several_configured_keys_are_all_tried(tmp_path: Path) -> None:
    keys = (Key(secret="x" * 32), Key(secret=SECRET), Key(pem_file=pem_file(tmp_path, public_pem(ec_key()))))
    bench = Bench(Config(keys=keys))
    await bench.accepts(hs256())
    await bench.accepts(sign(ec_key(), claims(), "ES256"))


# What is not a token of ours


@pytest.mark.parametrize(
    "value",
    ["Bearer sk-abc", "Bearer a.b", "Bearer a.b.c.d.e", "Basic a.b.c", "a.b.c", "Bearer", "", "Bearer gw_" + "a" * 43],
)
async def test_what_is_not_three_parts_of_a_bearer_token_is_left_to_others(bench: Bench, value: str) -> None:
    request = facts(("authorization", value))
    assert await bench.source.identify(request) is None
    assert bench.source.credential_headers(request) == frozenset()


async def test_only_the_configured_field_is_read() -> None:
    bench = Bench(Config(header="X-Jwt-Assertion"))
    assert await bench.source.identify(bearing(hs256())) is None
    for value in (hs256(), f"Bearer {hs256()}"):
        request = facts(("x-jwt-assertion", value))
        assert await bench.source.identify(request) is not None
        assert bench.source.credential_headers(request) == {b"x-jwt-assertion"}


async def test_two_different_tokens_are_ambiguous_and_the_same_twice_is_not(bench: Bench) -> None:
    one, two = f"Bearer {hs256()}", f"Bearer {hs256(org_id='other')}"
    assert await bench.source.identify(facts(("authorization", one), ("authorization", one))) is not None
    with pytest.raises(Unauthenticated, match="Different"):
        await bench.source.identify(facts(("authorization", one), ("authorization", two)))


# Algorithms and keys


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "", None, 5, ["HS256"], "HS512", "hs256", "EdDSA"])
@pytest.mark.parametrize("signature", ["", "c2lnbmF0dXJl"])
async def test_an_algorithm_that_is_not_listed_is_refused(bench: Bench, alg: object, signature: str) -> None:
    token = f"{segment({'alg': alg, 'typ': 'JWT'})}.{segment(claims())}.{signature}"
    assert "algorithm is not accepted" in await bench.refuses(token)


async def test_a_listed_algorithm_without_a_signature_is_refused(bench: Bench) -> None:
    head, payload, _ = hs256().split(".")
    await bench.refuses(f"{head}.{payload}.")


@pytest.mark.parametrize("algorithms", [("HS256", "RS256", "ES256"), ("RS256",)])
async def test_a_public_key_is_never_an_hmac_secret(tmp_path: Path, algorithms: tuple[str, ...]) -> None:
    # The classic: the attacker signs HS256 with the bytes of the public key, which everybody knows.
    pem = public_pem(rsa_key())
    bench = Bench(Config(keys=(Key(pem_file=pem_file(tmp_path, pem)), Key(jwks=URL)), algorithms=algorithms))
    bench.server.body = jwks(jwk(rsa_key(0), kid="r0"))
    head = segment({"alg": "HS256", "typ": "JWT", "kid": "r0"})
    for secret in (pem, pem.strip(), bench.server.body):
        signing_input = f"{head}.{segment(claims())}"
        await bench.refuses(f"{signing_input}.{mac(signing_input, secret)}")


async def test_a_symmetric_key_in_a_jwks_document_verifies_nothing() -> None:
    shared = {"kty": "oct", "k": pyjwt.utils.base64url_encode(SECRET.encode()).decode(), "kid": "s"}
    bench = Bench(Config(keys=(Key(jwks=URL),)), jwks(shared, jwk(rsa_key(0), kid="r0")))
    await bench.refuses(sign(SECRET, claims(), "HS256", kid="s"))
    assert bench.server.fetches == 0


async def test_an_ec_key_is_not_tried_for_an_rsa_token(remote: Bench) -> None:
    await remote.refuses(sign(rsa_key(0), claims(), "RS256", kid="e0"))
    await remote.refuses(sign(ec_key(0), claims(), "ES256", kid="r0"))


async def test_the_key_id_decides_which_key_is_tried(remote: Bench) -> None:
    remote.server.body = jwks(jwk(ec_key(0), kid="a"), jwk(ec_key(1), kid="b"))
    await remote.accepts(sign(ec_key(1), claims(), "ES256", kid="b"))
    await remote.refuses(sign(ec_key(1), claims(), "ES256", kid="a"))


async def test_a_key_named_in_the_token_itself_is_ignored(bench: Bench) -> None:
    own = ec_key(7)
    for head in ({"jwk": jwk(own)}, {"jku": "https://evil.example/jwks.json"}, {"x5u": "https://evil.example/c"}):
        await bench.refuses(sign(own, claims(), "ES256", **head))


@pytest.mark.parametrize("crit", [["exp"], ["b64"], ["https://example.com/x"], [], "exp"])
async def test_a_critical_extension_is_refused(bench: Bench, crit: object) -> None:
    await bench.refuses(raw(json.dumps(claims()).encode(), crit=crit, exp=1))


async def test_an_unencoded_payload_is_refused(bench: Bench) -> None:
    for b64 in (True, False):
        signing_input = f"{segment({'alg': 'HS256', 'b64': b64})}.{segment(claims()) if b64 else ''}"
        assert "extension" in await bench.refuses(f"{signing_input}.{mac(signing_input, SECRET.encode())}")


async def test_a_token_without_a_key_id_costs_a_bounded_number_of_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [jwk(ec_key(0), kid=str(number)) for number in range(30)]
    bench = Bench(Config(keys=(Key(jwks=URL),)), jwks(*others))
    tried = 0
    original = JwtSource._claims

    def counted(self: JwtSource, token: bytes, key: Any) -> Any:
        nonlocal tried
        tried += 1
        return original(self, token, key)

    monkeypatch.setattr(JwtSource, "_claims", counted)
    await bench.refuses(sign(ec_key(5), claims(), "ES256"))
    assert tried == 2 * CANDIDATES_MAX  # once more after looking for new keys
    await bench.refuses(sign(ec_key(5), claims(org_id="x"), "ES256"))
    assert tried == 3 * CANDIDATES_MAX


# Times


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": NOW_S - 30}, "has expired"),
        ({"exp": None}, "no claim `exp`"),
        ({"exp": "1900000000"}, "`exp` is not a time"),
        ({"exp": True}, "`exp` is not a time"),
        ({"exp": -1}, "`exp` is not a time"),
        ({"exp": float("inf")}, "`exp` is not a time"),
        ({"exp": float("nan")}, "`exp` is not a time"),
        ({"exp": 10**400}, "`exp` is not a time"),
        ({"exp": (NOW_S + 60) * 1000}, "`exp` is not a time"),
        ({"exp": [NOW_S + 60]}, "`exp` is not a time"),
        ({"nbf": NOW_S + 31}, "not valid yet (`nbf`)"),
        ({"nbf": "now"}, "`nbf` is not a time"),
        ({"iat": NOW_S + 31}, "not valid yet (`iat`)"),
        ({"iat": {}}, "`iat` is not a time"),
    ],
)
async def test_a_token_outside_its_time_is_refused(bench: Bench, changes: dict[str, Any], reason: str) -> None:
    payload = {**claims(), **changes}
    if changes.get("exp", 0) is None:
        del payload["exp"]
    assert reason in await bench.refuses(raw(json.dumps(payload).encode()))


@pytest.mark.parametrize(
    "changes",
    [{"exp": NOW_S - 29}, {"exp": NOW_S - 29.5}, {"nbf": NOW_S + 30}, {"iat": NOW_S + 30}, {"iat": NOW_S - 10**8}],
)
async def test_the_leeway_covers_clocks_that_differ(bench: Bench, changes: dict[str, Any]) -> None:
    await bench.accepts(hs256(**changes))


# Issuer and audience


@pytest.mark.parametrize(
    ("issuer", "accepted"),
    [("https://issuer.example", True), ("https://issuer.example/", False), ("", False), (None, False), (5, False)],
)
async def test_the_issuer_must_be_the_configured_one(issuer: object, accepted: bool) -> None:
    bench = Bench(Config(issuer="https://issuer.example"))
    payload = {**claims(), "iss": issuer} if issuer is not None else claims()
    token = raw(json.dumps(payload).encode())
    if accepted:
        await bench.accepts(token)
    else:
        await bench.refuses(token)


@pytest.mark.parametrize(
    ("configured", "audience", "accepted"),
    [
        ("gateway", "gateway", True),
        ("gateway", ["other", "gateway"], True),
        ("gateway", "other", False),
        ("gateway", "gateway2", False),
        ("gateway", ["other"], False),
        ("gateway", ["gateway", 5], False),
        ("gateway", {"gateway": 1}, False),
        ("gateway", None, False),
        (None, None, True),
        (None, "somebody", False),
    ],
)
async def test_the_audience_must_be_us(configured: str | None, audience: object, accepted: bool) -> None:
    bench = Bench(Config(audience=configured))
    token = hs256(aud=audience)
    if accepted:
        await bench.accepts(token)
    else:
        await bench.refuses(token)


# Claims


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"org_id": None}, "no claim `org_id`"),
        ({"org_id": ""}, "`org_id` is not a valid name"),
        ({"org_id": "a b"}, "`org_id` is not a valid name"),
        ({"org_id": "{acme}"}, "`org_id` is not a valid name"),
        ({"org_id": "acme\n"}, "`org_id` is not a valid name"),
        ({"org_id": "a" * 129}, "`org_id` is not a valid name"),
        ({"org_id": True}, "`org_id` is not text"),
        ({"org_id": 1.5}, "`org_id` is not text"),
        ({"org_id": ["acme"]}, "`org_id` is not text"),
        ({"sub": "two words"}, "`sub` is not a valid user id"),
        ({"sub": "a\r\nx-org-id: evil"}, "`sub` is not a valid user id"),
        ({"sub": {}}, "`sub` is not text"),
        ({"plan": None}, "no claim `plan`"),
        ({"plan": ""}, "`plan` is not a valid name"),
        ({"plan": ["pro"]}, "`plan` is not text"),
    ],
)
async def test_a_claim_that_is_missing_or_unusable_is_named(bench: Bench, changes: dict[str, Any], reason: str) -> None:
    assert reason in await bench.refuses(hs256(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"org_id": 42}, {"org_id": "42"}),
        ({"sub": None}, {"user_id": None}),
        ({"sub": 7}, {"user_id": "7"}),
        ({"jti": 5}, {"key_id": None}),
        ({"jti": ""}, {"key_id": None}),
        ({"jti": "a\nb"}, {"key_id": None}),
        ({"jti": "a" * 129}, {"key_id": None}),
    ],
)
async def test_other_forms_of_claims(bench: Bench, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    usual = Principal("acme", "pro", "auth0|5f7c", None, "jwt")
    assert await bench.accepts(hs256(**changes)) == replace(usual, **expected)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("blue", "blue"),
        ("0", "0"),
        (0, "0"),
        (-12, "-12"),
        (12.0, "12"),
        (1.5, "1.5"),
        (True, "true"),
        (False, "false"),
        ("a" * 256, "a" * 256),
        (10**255 - 1, "9" * 255),
        ("a" * 257, None),
        (10**255, None),
        (1e300, None),
        (float("inf"), None),
        (float("nan"), None),
        ("", None),
        ("two words", None),
        ("caf\u00e9", None),
        ("a\n", None),
        (["blue"], None),
        ({"name": "blue"}, None),
        (None, None),
    ],
)
async def test_a_claim_that_limits_are_per_goes_along_as_text_or_is_left_out(value: object, kept: str | None) -> None:
    bench = Bench(Config(), kept=frozenset(("team", "not-there")))
    for _ in range(2):  # the second time from memory
        principal = await bench.accepts(hs256(team=value, other="x"))
        assert principal.claims == ({} if kept is None else {"team": kept})


async def test_no_claim_goes_along_unless_a_limit_is_per_it(bench: Bench) -> None:
    assert (await bench.accepts(hs256(team="blue"))).claims == {}


async def test_the_default_plan_is_for_tokens_without_one() -> None:
    bench = Bench(Config(default_plan="trial"))
    assert (await bench.accepts(hs256(plan=None))).plan == "trial"
    assert (await bench.accepts(hs256())).plan == "pro"
    unread = Bench(Config(plan=None, user=None, default_plan="trial"))
    assert await unread.accepts(hs256()) == Principal("acme", "trial", None, None, "jwt")


# Malformed


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"null", b"5", b"{", b"\xff", b"[" * 9_000, b'{"exp": ' + b"9" * 5_000 + b"}"]
)
async def test_a_signed_payload_that_is_no_object_is_refused(bench: Bench, payload: bytes) -> None:
    await bench.refuses(raw(payload))


@pytest.mark.parametrize("token", ["..", "a..", "a.b.c", "é.é.é", "e30.e30.e30", "bnVsbA.e30.e30", "W10.e30.", "=.=.="])
async def test_a_token_that_is_none_is_refused(bench: Bench, token: str) -> None:
    await bench.refuses(token)


async def test_a_token_is_bounded_in_length(bench: Bench) -> None:
    assert f"longer than {TOKEN_BYTES_MAX}" in await bench.refuses(hs256(pad="x" * TOKEN_BYTES_MAX))


@given(st.integers(0, 10_000), st.integers(1, 255))
async def test_a_token_with_any_byte_changed_is_refused(place: int, change: int) -> None:
    bench = Bench(Config())
    token = bytearray(hs256().encode())
    place %= len(token)
    token[place] ^= change
    request = facts(("authorization", "Bearer " + token.decode("latin-1")))
    try:
        assert await bench.source.identify(request) is None  # a dot more or less: no token at all
        assert token.count(b".") != 2
    except Unauthenticated:
        pass


# Keys that change


async def test_a_token_signed_with_a_new_key_is_accepted_at_once(remote: Bench) -> None:
    await remote.accepts(sign(ec_key(0), claims(), "ES256", kid="e0"))
    remote.server.body = jwks(jwk(ec_key(0), kid="e0"), jwk(ec_key(1), kid="e1"))
    await remote.accepts(sign(ec_key(1), claims(), "ES256", kid="e1"))
    assert remote.server.fetches == 2


async def test_a_key_replaced_without_any_key_id_is_found_too(remote: Bench) -> None:
    remote.server.body = jwks(jwk(ec_key(0)))
    await remote.accepts(sign(ec_key(0), claims(), "ES256"))
    remote.server.body = jwks(jwk(ec_key(1)))
    await remote.accepts(sign(ec_key(1), claims(), "ES256"))


async def test_a_key_that_was_withdrawn_takes_its_remembered_tokens_with_it(remote: Bench) -> None:
    withdrawn, kept = sign(ec_key(0), claims(), "ES256", kid="e0"), sign(rsa_key(0), claims(), "RS256", kid="r0")
    await remote.accepts(withdrawn)
    remote.server.body = jwks(jwk(rsa_key(0), kid="r0"))
    remote.mono.pass_ms(600_000)
    await remote.refuses(withdrawn)
    await remote.accepts(kept)


async def test_a_flood_of_random_key_ids_reaches_the_jwks_server_twice_a_minute(remote: Bench) -> None:
    await remote.accepts(sign(ec_key(0), claims(), "ES256", kid="e0"))
    tokens = [sign(ec_key(1), claims(), "ES256", kid=f"random-{number}") for number in range(50)]
    for _ in range(2):
        results = await asyncio.gather(
            *(remote.source.identify(bearing(token)) for token in tokens), return_exceptions=True
        )
        assert {type(result) for result in results} == {Unauthenticated}
        remote.mono.pass_ms(UNKNOWN_KID_INTERVAL_MS - 1)
    assert remote.server.fetches == 2
    remote.mono.pass_ms(1)
    await remote.refuses(tokens[0])
    assert remote.server.fetches == 3


async def test_a_forged_signature_under_a_known_key_id_fetches_nothing(remote: Bench) -> None:
    for _ in range(3):
        await remote.refuses(sign(ec_key(1), claims(), "ES256", kid="e0"))
    assert remote.server.fetches == 1


async def test_while_the_jwks_server_is_away_known_keys_serve_and_then_it_is_our_trouble(remote: Bench) -> None:
    token = sign(ec_key(0), claims(exp=NOW_S + 10**6), "ES256", kid="e0")
    await remote.accepts(token)
    remote.server.error = UpstreamUnreachable()
    remote.mono.pass_ms(600_000 + STALE_MS - 1)
    await remote.accepts(token)
    await remote.accepts(sign(ec_key(0), claims(jti="new"), "ES256", kid="e0"))
    remote.mono.pass_ms(1)
    with pytest.raises(StoreUnavailable):
        await remote.accepts(token)
    remote.mono.pass_ms(1_000)
    remote.server.error = None
    await remote.accepts(token)


async def test_a_jwks_server_that_is_away_does_not_touch_tokens_of_other_keys() -> None:
    bench = Bench(Config(keys=(Key(jwks=URL), Key(secret=SECRET))))
    bench.server.error = UpstreamUnreachable()
    await bench.accepts(hs256())
    await bench.refuses(hs256() + "x")
    assert bench.server.fetches == 0
    with pytest.raises(StoreUnavailable):
        await bench.source.identify(bearing(sign(ec_key(0), claims(), "ES256")))


# The memory of verified tokens


async def test_a_token_is_verified_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    token = hs256()
    first = await bench.accepts(token)
    monkeypatch.setattr(JwtSource, "_verify", None)
    assert await bench.accepts(token) == first


async def test_a_remembered_token_expires_all_the_same(bench: Bench) -> None:
    token = hs256(exp=NOW_S + 10)
    await bench.accepts(token)
    bench.wall.pass_ms(39_999)
    await bench.accepts(token)
    bench.wall.pass_ms(1)
    assert "expired" in await bench.refuses(token)
    assert bench.source.remembered == 0


async def test_a_refused_token_is_not_remembered(bench: Bench) -> None:
    await bench.refuses(hs256(org_id=None))
    assert bench.source.remembered == 0


async def test_the_memory_is_bounded_and_keeps_what_is_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERIFIED_MAX", 3)
    tokens = [hs256(jti=str(number)) for number in range(4)]
    for token in tokens[:3]:
        await bench.accepts(token)
    await bench.accepts(tokens[0])
    await bench.accepts(tokens[3])
    assert bench.source.remembered == 3
    monkeypatch.setattr(JwtSource, "_verify", None)
    await bench.accepts(tokens[0])
    with pytest.raises(TypeError):
        await bench.accepts(tokens[1])


async def test_only_a_verified_token_is_remembered_and_only_until_it_expires(bench: Bench) -> None:
    token, other = hs256(exp=NOW_S + 10), hs256(jti="other")
    assert bench.source.remembers(bearing(token)) is False
    await bench.accepts(token)
    await bench.accepts(other)
    assert bench.source.remembers(bearing(token)) is True
    assert bench.source.remembers(bearing(token + "x")) is False
    assert bench.source.remembers(bearing("sk-upstream")) is None
    assert bench.source.remembers(facts()) is None
    both = facts(("authorization", f"Bearer {token}"), ("authorization", f"Bearer {other}"))
    assert bench.source.remembers(both) is False
    bench.wall.pass_ms(39_999)
    assert bench.source.remembers(bearing(token)) is True
    bench.wall.pass_ms(1)
    assert bench.source.remembers(bearing(token)) is False


async def test_a_token_is_remembered_over_a_change_of_keys_until_it_is_found_to_be_worthless(remote: Bench) -> None:
    token = sign(rsa_key(0), claims(), "RS256", kid="r0")
    await remote.accepts(token)
    remote.server.body = jwks(jwk(rsa_key(1), kid="r1"))
    remote.mono.pass_ms(600_000)
    assert remote.source.remembers(bearing(token)) is True
    await remote.refuses(token)
    assert remote.source.remembers(bearing(token)) is False


# Configuration


async def test_keys_that_cannot_work_are_refused_at_the_start(tmp_path: Path) -> None:
    for key, reason in (
        (Key(secret="short"), "shorter than"),
        (Key(pem_file=tmp_path / "none.pem"), "cannot be read"),
        (Key(pem_file=pem_file(tmp_path, b"text")), "no PEM public key"),
        (Key(), "one of"),
    ):
        with pytest.raises(ConfigError, match=reason):
            Bench(Config(keys=(key,)))

"""Which field values are gateway keys, and what a key proves."""

import base64
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import StoreUnavailable, Unauthenticated
from gateway.identity.api_key import ApiKey, ApiKeySource, key_sha256, new_key
from gateway.identity.key_cache import KeyRecord
from gateway.identity.source import bearer
from gateway.types import Principal
from tests.identity.given import Time, facts


@dataclass(frozen=True)
class Config:
    headers: tuple[str, ...] = ("authorization", "X-Api-Key")
    cache_ttl_ms: int = 10_000
    cache_stale_ms: int = 60_000
    cache_entries_max: int = 100


class Keys:
    """A table of keys, and who asked for what."""

    def __init__(self) -> None:
        self.rows: dict[bytes, KeyRecord] = {}
        self.asked: list[bytes] = []
        self.away = False

    def add(self, **changes: Any) -> ApiKey:
        key = new_key()
        self.rows[key.sha256] = replace(KeyRecord(key.key_id, "acme", "pro", None, None), **changes)
        return key

    async def load(self, sha256: bytes) -> KeyRecord | None:
        self.asked.append(sha256)
        if self.away:
            raise StoreUnavailable
        return self.rows.get(sha256)


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def wall() -> Time:
    return Time(1_800_000_000_000)


@pytest.fixture
async def source(keys: Keys, wall: Time) -> AsyncIterator[ApiKeySource]:
    source = ApiKeySource(Config(), keys.load, monotonic_ms=Time(), wall_ms=wall)
    yield source
    await source.close()


def test_a_new_key_has_256_random_bits_a_public_id_and_a_hash() -> None:
    key, other = new_key(), new_key()
    assert re.fullmatch(r"gw_[A-Za-z0-9_-]{43}", key.secret)
    assert len(base64.urlsafe_b64decode(key.secret[3:] + "=")) == 32
    assert re.fullmatch(r"key_[0-9a-f]{16}", key.key_id)
    assert key.sha256 == hashlib.sha256(key.secret.encode()).digest() == key_sha256(key.secret)
    assert key.secret != other.secret and key.key_id != other.key_id
    assert key.secret not in repr(key)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Authorization", "Bearer {}"),
        ("authorization", "bearer {}"),
        ("authorization", "BEARER   {}  "),
        ("authorization", "{}"),
        ("x-api-key", "{}"),
        ("X-API-Key", " {}\t"),
        ("x-api-key", "Bearer {}"),
    ],
)
async def test_a_key_is_recognised_in_every_configured_field(
    source: ApiKeySource, keys: Keys, name: str, form: str
) -> None:
    key = keys.add(user_id="ada")
    request = facts((name, form.format(key.secret)))
    assert await source.identify(request) == Principal("acme", "pro", "ada", key.key_id, "api_key")
    assert source.credential_headers(request) == {name.lower().encode()}


@pytest.mark.parametrize(
    "fields",
    [
        (),
        (("authorization", "Bearer sk-proj-abc"),),
        (("authorization", "Bearer eyJh.eyJz.c2ln"),),
        (("authorization", "Basic Z3dfeDp5"),),
        (("authorization", "Bearer"),),
        (("authorization", ""),),
        (("x-api-key", "GW_UPPER"),),
        (("x-other", "gw_" + "a" * 43),),
        (("cookie", "gw_" + "a" * 43),),
    ],
)
async def test_what_is_not_a_gateway_key_is_left_to_others(
    source: ApiKeySource, keys: Keys, fields: tuple[tuple[str, str], ...]
) -> None:
    assert await source.identify(facts(*fields)) is None
    assert source.credential_headers(facts(*fields)) == frozenset()
    assert keys.asked == []


@pytest.mark.parametrize(
    "secret",
    ["gw_", "gw_short", "gw_" + "a" * 42, "gw_" + "a" * 44, "gw_" + "a" * 42 + "!", "gw_" + "a" * 42 + "é",
     "gw_" + "a" * 43 + ", Bearer gw_" + "a" * 43, "gw_" + "a" * 20 + " " + "a" * 22],
)  # fmt: skip
async def test_a_malformed_key_is_refused_without_a_lookup(source: ApiKeySource, keys: Keys, secret: str) -> None:
    with pytest.raises(Unauthenticated, match="malformed"):
        await source.identify(facts(("x-api-key", secret)))
    assert keys.asked == []


async def test_an_unknown_key_is_refused_without_repeating_it(source: ApiKeySource) -> None:
    secret = new_key().secret
    with pytest.raises(Unauthenticated) as refused:
        await source.identify(facts(("x-api-key", secret)))
    assert secret not in str(refused.value)
    assert refused.value.status == 401


async def test_the_same_key_in_two_fields_is_one_credential_and_both_fields_carry_it(
    source: ApiKeySource, keys: Keys
) -> None:
    key = keys.add()
    request = facts(("authorization", f"Bearer {key.secret}"), ("x-api-key", key.secret))
    principal = await source.identify(request)
    assert principal is not None and principal.key_id == key.key_id
    assert source.credential_headers(request) == {b"authorization", b"x-api-key"}


@pytest.mark.parametrize("second", ["authorization", "x-api-key"])
async def test_two_different_keys_are_ambiguous(source: ApiKeySource, keys: Keys, second: str) -> None:
    one, two = keys.add(), keys.add(org_id="other")
    with pytest.raises(Unauthenticated, match="Different"):
        await source.identify(facts(("authorization", f"Bearer {one.secret}"), (second, two.secret)))
    assert keys.asked == []


async def test_an_upstream_key_beside_ours_is_no_credential_of_ours(source: ApiKeySource, keys: Keys) -> None:
    key = keys.add()
    request = facts(("authorization", "Bearer sk-live"), ("x-api-key", key.secret))
    assert await source.identify(request) is not None
    assert source.credential_headers(request) == {b"x-api-key"}


async def test_a_key_expires_at_its_moment_though_it_is_cached(source: ApiKeySource, keys: Keys, wall: Time) -> None:
    key = keys.add(expires_at_ms=wall.now_ms + 5)
    request = facts(("x-api-key", key.secret))
    wall.pass_ms(4)
    assert await source.identify(request) is not None
    wall.pass_ms(1)
    with pytest.raises(Unauthenticated, match="expired"):
        await source.identify(request)
    assert len(keys.asked) == 1


async def test_a_key_that_was_found_is_remembered_without_asking_and_one_that_was_not_is_not(
    source: ApiKeySource, keys: Keys
) -> None:
    good, other, bad = keys.add(), keys.add(), new_key()
    assert source.remembers(facts(("x-api-key", good.secret))) is False
    for key in (good, other):
        await source.identify(facts(("x-api-key", key.secret)))
    with pytest.raises(Unauthenticated):
        await source.identify(facts(("x-api-key", bad.secret)))
    asked = len(keys.asked)

    assert source.remembers(facts(("x-api-key", good.secret))) is True
    assert source.remembers(facts(("x-api-key", good.secret), ("authorization", f"Bearer {good.secret}"))) is True
    for fields in (
        [("x-api-key", bad.secret)],
        [("x-api-key", new_key().secret)],
        [("x-api-key", "gw_malformed")],
        [("x-api-key", good.secret), ("authorization", f"Bearer {other.secret}")],
    ):
        assert source.remembers(facts(*fields)) is False
    assert source.remembers(facts(("x-api-key", "sk-upstream"))) is None
    assert source.remembers(facts()) is None
    assert len(keys.asked) == asked


async def test_a_key_is_remembered_however_old_it_is_until_it_expires_or_is_revoked(keys: Keys, wall: Time) -> None:
    time = Time()
    source = ApiKeySource(Config(), keys.load, monotonic_ms=time, wall_ms=wall)
    lasting, ending = keys.add(org_id="globex"), keys.add(expires_at_ms=wall.now_ms + 1)
    for key in (lasting, ending):
        await source.identify(facts(("x-api-key", key.secret)))
    time.pass_ms(3_600_000)
    source.drop_all()
    source.on_notification("org:globex")
    assert source.remembers(facts(("x-api-key", lasting.secret))) is True
    assert source.remembers(facts(("x-api-key", ending.secret))) is True
    wall.pass_ms(1)
    assert source.remembers(facts(("x-api-key", ending.secret))) is False
    source.on_notification(lasting.sha256.hex())
    assert source.remembers(facts(("x-api-key", lasting.secret))) is False
    await source.close()


async def test_a_key_revoked_without_a_word_is_remembered_until_it_is_asked_for(
    keys: Keys, source: ApiKeySource
) -> None:
    key = keys.add()
    await source.identify(facts(("x-api-key", key.secret)))
    keys.rows.clear()
    source.drop_all()
    with pytest.raises(Unauthenticated):
        await source.identify(facts(("x-api-key", key.secret)))
    assert source.remembers(facts(("x-api-key", key.secret))) is False


async def test_an_outage_is_no_refusal(source: ApiKeySource, keys: Keys) -> None:
    key = keys.add()
    keys.away = True
    with pytest.raises(StoreUnavailable):
        await source.identify(facts(("x-api-key", key.secret)))


async def test_an_announced_revoke_takes_effect_at_once(source: ApiKeySource, keys: Keys) -> None:
    key, kept = keys.add(), keys.add()
    await source.identify(facts(("x-api-key", key.secret)))
    await source.identify(facts(("x-api-key", kept.secret)))
    del keys.rows[key.sha256]
    source.on_notification(key.sha256.hex())
    with pytest.raises(Unauthenticated, match="revoked"):
        await source.identify(facts(("x-api-key", key.secret)))
    asked = len(keys.asked)
    assert await source.identify(facts(("x-api-key", kept.secret))) is not None
    assert len(keys.asked) == asked


async def test_an_announced_change_of_plan_takes_effect_at_once(source: ApiKeySource, keys: Keys) -> None:
    key = keys.add(org_id="a:b")
    request = facts(("x-api-key", key.secret))
    await source.identify(request)
    keys.rows[key.sha256] = replace(keys.rows[key.sha256], plan="enterprise")
    source.on_notification("org:other")
    principal = await source.identify(request)
    assert principal is not None and principal.plan == "pro"
    source.on_notification("org:a:b")
    principal = await source.identify(request)
    assert principal is not None and principal.plan == "enterprise"


@pytest.mark.parametrize("payload", ["", "org", "user:1", "zz" * 32, "00" * 31, "AB" * 32])
async def test_an_announcement_nobody_understands_makes_every_key_asked_for_again(
    source: ApiKeySource, keys: Keys, payload: str
) -> None:
    key = keys.add()
    await source.identify(facts(("x-api-key", key.secret)))
    del keys.rows[key.sha256]
    with structlog.testing.capture_logs() as logged:
        source.on_notification(payload)
    assert [line["event"] for line in logged] == ["key_announcement_not_understood"]
    with pytest.raises(Unauthenticated):
        await source.identify(facts(("x-api-key", key.secret)))


@given(st.binary(max_size=80))
def test_a_bearer_token_never_carries_the_scheme_or_white_space_around_it(value: bytes) -> None:
    token = bearer(value)
    if token is not None:
        assert value[:7].lower() == b"bearer "
        assert token == token.strip(b" ") and token in value


@given(
    fields=st.lists(
        st.tuples(
            st.sampled_from(["authorization", "x-api-key", "x-other"]),
            st.sampled_from(["gw_", "Bearer gw_", "Bearer ", ""]),
            st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
        ),
        max_size=4,
    )
)
async def test_whatever_the_fields_hold_the_answer_is_a_refusal_or_nothing(fields: list[tuple[str, str, str]]) -> None:
    keys = Keys()
    source = ApiKeySource(Config(), keys.load, monotonic_ms=Time(), wall_ms=Time())
    request = facts(*((name, prefix + rest) for name, prefix, rest in fields))
    try:
        assert await source.identify(request) is None
        assert source.credential_headers(request) == frozenset()
    except Unauthenticated:
        assert source.credential_headers(request)
    assert all(len(asked) == 32 for asked in keys.asked)

"""The order of the sources, and which fields never reach the upstream."""

from collections.abc import AsyncIterator, Callable

import pytest

from gateway.config import ApiKeySource, JwtKey, JwtSource, TrustedHeaderSource
from gateway.errors import StoreUnavailable, Unauthenticated
from gateway.identity import SOURCES, Identity, Powers, open_identity
from gateway.identity.api_key import new_key
from gateway.identity.key_cache import KeyRecord
from gateway.identity.source import Source
from gateway.types import Facts, Principal
from tests.identity.given import Time, facts
from tests.identity.signing import SECRET, JwksServer, sign

KEY, REVOKED = new_key(), new_key()
NOW_S = 1_800_000_000


async def load(sha256: bytes) -> KeyRecord | None:
    return KeyRecord(KEY.key_id, "by-key", "pro", None, None) if sha256 == KEY.sha256 else None


def token(org: str = "by-token") -> str:
    return "Bearer " + sign(SECRET, {"org": org, "exp": NOW_S + 60}, "HS256")


API_KEY = ApiKeySource.model_validate({})
JWT = JwtSource.model_validate({"keys": [{"secret": SECRET}], "org": "org", "default_plan": "pro"})
TRUSTED = TrustedHeaderSource.model_validate(
    {"org": "x-org-id", "user": "x-user-id", "from": ["10.0.0.0/8"], "default_plan": "pro"}
)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Identity]]:
    made: list[Identity] = []

    def open_(*sections: object) -> Identity:
        powers = Powers(load, JwksServer().fetch, monotonic_ms=Time(), wall_ms=Time(NOW_S * 1000))
        made.append(open_identity(sections, powers))
        return made[-1]

    yield open_
    for identity in made:
        await identity.close()


def test_every_section_of_the_configuration_has_its_source() -> None:
    assert set(SOURCES) == {ApiKeySource, JwtSource, TrustedHeaderSource}
    assert JwtKey in {type(key) for key in JWT.keys}


async def test_nobody_asks_without_a_credential(opened: Callable[..., Identity]) -> None:
    for identity in (opened(API_KEY, JWT, TRUSTED), opened()):
        with pytest.raises(Unauthenticated, match="No valid credential"):
            await identity.identify(facts(("x-org-id", "acme"), ("authorization", "Bearer sk-upstream")))


async def test_the_first_source_that_recognises_a_credential_decides(opened: Callable[..., Identity]) -> None:
    both = facts(("authorization", token()), ("x-api-key", KEY.secret))
    assert (await opened(API_KEY, JWT).identify(both)).principal.org_id == "by-key"
    assert (await opened(JWT, API_KEY).identify(both)).principal.org_id == "by-token"


async def test_a_bad_credential_is_not_saved_by_a_later_good_one(opened: Callable[..., Identity]) -> None:
    with pytest.raises(Unauthenticated, match="revoked"):
        await opened(API_KEY, JWT).identify(facts(("authorization", token()), ("x-api-key", REVOKED.secret)))


async def test_a_token_in_the_field_of_the_api_key_falls_to_the_next_source(opened: Callable[..., Identity]) -> None:
    identified = await opened(API_KEY, JWT).identify(facts(("authorization", token())))
    assert identified.principal.source == "jwt"
    assert identified.credential_headers == {b"authorization"}


async def test_every_credential_of_ours_is_named_and_an_upstream_one_is_not(opened: Callable[..., Identity]) -> None:
    identity = opened(JWT, API_KEY, TRUSTED)
    both = await identity.identify(facts(("authorization", token()), ("x-api-key", KEY.secret)))
    assert both.credential_headers == {b"authorization", b"x-api-key"}
    beside = await identity.identify(facts(("authorization", "Bearer sk-upstream"), ("x-api-key", KEY.secret)))
    assert beside.credential_headers == {b"x-api-key"}


async def test_headers_that_state_an_identity_are_named_whoever_sent_them(opened: Callable[..., Identity]) -> None:
    # PostHog/posthog #50542: what the client says about itself must not reach anybody who might believe it.
    assert opened(API_KEY, TRUSTED).asserted_headers == {b"x-org-id", b"x-user-id"}
    assert opened(API_KEY).asserted_headers == frozenset()


async def test_a_stated_identity_is_ignored_beside_a_verified_one(opened: Callable[..., Identity]) -> None:
    request = facts(("x-org-id", "victim"), ("x-api-key", KEY.secret))
    assert (await opened(TRUSTED, API_KEY).identify(request)).principal.org_id == "by-key"


async def test_the_credential_that_would_decide_is_the_one_to_be_remembered(opened: Callable[..., Identity]) -> None:
    identity = opened(API_KEY, JWT)
    good = facts(("x-api-key", KEY.secret))
    behind_a_bad_one = facts(("authorization", token()), ("x-api-key", REVOKED.secret))
    assert not identity.remembers(good)
    await identity.identify(good)
    await identity.identify(facts(("authorization", token())))
    assert identity.remembers(good)
    assert identity.remembers(facts(("authorization", token())))
    assert not identity.remembers(behind_a_bad_one)
    assert opened(JWT, API_KEY).remembers(behind_a_bad_one) is False
    assert not identity.remembers(facts())
    assert opened(TRUSTED).remembers(facts(("x-org-id", "acme"), peer_ip="10.1.2.3"))


async def test_the_claims_that_limits_are_per_come_from_tokens_alone() -> None:
    powers = Powers(load, JwksServer().fetch, Time(), Time(NOW_S * 1000), claims=frozenset(("team", "x-team")))
    identity = open_identity((API_KEY, JWT, TRUSTED), powers)
    try:
        signed = "Bearer " + sign(SECRET, {"org": "acme", "team": "blue", "exp": NOW_S + 60}, "HS256")
        by_token = await identity.identify(facts(("authorization", signed)))
        assert by_token.principal.claims == {"team": "blue"}
        by_key = await identity.identify(facts(("x-api-key", KEY.secret), ("team", "blue"), ("x-team", "blue")))
        assert by_key.principal.claims == {}
        stated = facts(("x-org-id", "acme"), ("team", "blue"), ("x-team", "blue"), peer_ip="10.0.0.1")
        assert (await identity.identify(stated)).principal.claims == {}
    finally:
        await identity.close()


async def test_announcements_reach_every_source_that_remembers() -> None:
    heard: list[str] = []

    class Remembering(Source):
        async def identify(self, facts: Facts) -> Principal | None:
            raise StoreUnavailable

        def on_notification(self, payload: str) -> None:
            heard.append(payload)

        def drop_all(self) -> None:
            heard.append("all")

        async def close(self) -> None:
            heard.append("closed")

    identity = Identity([Remembering(), Remembering()])
    identity.on_notification("org:acme")
    identity.drop_all()
    await identity.close()
    assert heard == ["org:acme", "org:acme", "all", "all", "closed", "closed"]
    with pytest.raises(StoreUnavailable):
        await identity.identify(facts())


async def test_a_source_needs_nothing_but_identify() -> None:
    class Everybody(Source):
        async def identify(self, facts: Facts) -> Principal | None:
            return Principal("acme", "pro", None, None, "everybody")

    identity = Identity([Everybody()])
    identity.on_notification("x")
    identity.drop_all()
    identified = await identity.identify(facts(("authorization", "Bearer x")))
    assert not identity.remembers(facts(("authorization", "Bearer x")))
    await identity.close()
    assert (identified.principal.org_id, identified.credential_headers) == ("acme", frozenset())

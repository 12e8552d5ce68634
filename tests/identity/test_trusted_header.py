"""Who may state an identity in a header, and what it may look like."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Unauthenticated
from gateway.identity.trusted_header import TrustedHeaderSource
from gateway.types import Principal
from tests.identity.given import facts


@dataclass(frozen=True)
class Config:
    org: str = "X-Org-Id"
    user: str | None = "X-User-Id"
    plan: str | None = "X-Plan"
    from_networks: tuple[IPv4Network | IPv6Network, ...] = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    default_plan: str | None = None


ORG, USER, PLAN = ("X-Org-Id", "acme"), ("x-user-id", "ada@example.com"), ("x-plan", "pro")


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3", "fd00::1"])
async def test_a_listed_peer_is_believed(peer: str) -> None:
    principal = await TrustedHeaderSource(Config()).identify(facts(ORG, USER, PLAN, peer_ip=peer))
    assert principal == Principal("acme", "pro", "ada@example.com", None, "trusted_header")


@pytest.mark.parametrize("peer", ["203.0.113.9", "::1", "", "testclient"])
async def test_from_any_other_peer_the_headers_are_no_credential(peer: str) -> None:
    assert await TrustedHeaderSource(Config()).identify(facts(ORG, USER, PLAN, peer_ip=peer)) is None


async def test_the_forwarded_client_address_makes_nobody_a_listed_peer() -> None:
    request = facts(ORG, USER, PLAN, peer_ip="203.0.113.9", client_ip="10.1.2.3")
    assert await TrustedHeaderSource(Config()).identify(request) is None


async def test_a_listed_peer_that_names_no_org_says_nothing() -> None:
    assert await TrustedHeaderSource(Config()).identify(facts(USER, PLAN, peer_ip="10.1.2.3")) is None


@pytest.mark.parametrize("twice", [ORG, USER, PLAN])
async def test_the_same_header_twice_is_ambiguous(twice: tuple[str, str]) -> None:
    request = facts(ORG, USER, PLAN, twice, peer_ip="10.1.2.3")
    with pytest.raises(Unauthenticated, match="more than once"):
        await TrustedHeaderSource(Config()).identify(request)


@pytest.mark.parametrize("org", ["", " ", "a b", "a,b", "a/b", "{x}", "é", "a" * 129, "a\x00"])
async def test_an_org_outside_the_alphabet_is_refused_and_not_repeated(org: str) -> None:
    with pytest.raises(Unauthenticated, match="x-org-id is not a valid name") as refused:
        await TrustedHeaderSource(Config()).identify(facts(("x-org-id", org), PLAN, peer_ip="10.1.2.3"))
    assert len(org) < 2 or org not in str(refused.value)


@pytest.mark.parametrize("user", ["", "a b", "é", "a" * 257])
async def test_a_user_that_is_not_visible_ascii_is_refused(user: str) -> None:
    with pytest.raises(Unauthenticated, match="x-user-id is not a valid user id"):
        await TrustedHeaderSource(Config()).identify(facts(ORG, ("x-user-id", user), PLAN, peer_ip="10.1.2.3"))


async def test_the_plan_comes_from_the_header_then_from_the_default_else_is_missing() -> None:
    request = facts(ORG, peer_ip="10.1.2.3")
    with_default = await TrustedHeaderSource(Config(default_plan="trial")).identify(request)
    assert with_default is not None and with_default.plan == "trial" and with_default.user_id is None
    both = await TrustedHeaderSource(Config(default_plan="trial")).identify(facts(ORG, PLAN, peer_ip="10.1.2.3"))
    assert both is not None and both.plan == "pro"
    with pytest.raises(Unauthenticated, match="x-plan is missing"):
        await TrustedHeaderSource(Config()).identify(request)


async def test_headers_that_are_not_configured_are_not_read() -> None:
    source = TrustedHeaderSource(Config(user=None, plan=None, default_plan="trial"))
    principal = await source.identify(facts(ORG, USER, PLAN, peer_ip="10.1.2.3"))
    assert principal == Principal("acme", "trial", None, None, "trusted_header")
    assert source.asserted_headers == {b"x-org-id"}


@given(st.text(st.characters(max_codepoint=255), max_size=140))
async def test_no_header_value_makes_an_org_that_could_break_a_redis_key_or_a_header(value: str) -> None:
    request = facts(("x-org-id", value), PLAN, peer_ip="10.1.2.3")
    try:
        principal = await TrustedHeaderSource(Config()).identify(request)
    except Unauthenticated:
        return
    assert principal is not None
    assert principal.org_id.isascii() and principal.org_id.isprintable()
    assert not set(principal.org_id) & set("{} \t\"'/\\")


async def test_only_what_a_listed_peer_says_once_is_as_good_as_remembered() -> None:
    source = TrustedHeaderSource(Config())
    assert source.remembers(facts(ORG, PLAN, peer_ip="10.1.2.3")) is True
    assert source.remembers(facts(ORG, ORG, PLAN, peer_ip="10.1.2.3")) is False
    assert source.remembers(facts(PLAN, peer_ip="10.1.2.3")) is None
    assert source.remembers(facts(ORG, PLAN, peer_ip="203.0.113.9", client_ip="10.1.2.3")) is None

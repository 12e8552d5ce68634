"""gateway/policy.py: from plans and policies to demands."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import load_text
from gateway.policy import (
    CompiledPolicy,
    PolicySet,
    demands,
    message_demands,
    needs_peek,
    never_fits,
    price_ucredits,
    request_exceeds_limit,
    token_estimate,
    unknown_plan,
)
from gateway.types import Demand, Facts, Peek, Principal

GATEWAY = (Path(__file__).parents[1] / "policies" / "good_smallest.yaml").read_text()
FACTS = Facts(
    "req_1", "POST", "/v1/chat/completions", b"/v1/chat/completions", (), client_ip="192.0.2.7", peer_ip="192.0.2.7"
)
ALICE = Principal("org1", "trial", "alice", "key1", "api_key")
NOBODY = Principal("org1", "trial", None, None, "api_key")
EVERY_SCOPE = """
  - { name: rpm, count: requests, limit: 600, window: 1m }
  - { name: user-rpm, count: requests, limit: 60, window: 1m, per: user }
  - { name: key-rpm, count: requests, limit: 50, window: 1m, per: key }
  - { name: session-tokens, count: tokens, limit: 5000, window: 24h, per: session }
  - { name: tpm, count: tokens, limit: 1000, window: 1m }
  - { name: parallel, count: concurrent, limit: 2 }
"""


def policy_set(limits: str = " []", rest: str = "", gateway: str = GATEWAY) -> PolicySet:
    return PolicySet.compile(load_text(gateway, {"trial.yaml": f"policy: trial\nlimits:{limits}\n{rest}\n"}))


def policy(limits: str = " []", rest: str = "", gateway: str = GATEWAY) -> CompiledPolicy:
    found = policy_set(limits, rest, gateway).plan("trial")
    assert found is not None
    return found


def test_a_plan_lives_under_the_policy_it_names() -> None:
    policies = policy_set(rest="price: { per_request: 3 }")
    found = policies.plan("trial")
    assert found is not None and found.name == "trial"
    assert price_ucredits(found) == 3_000_000
    assert policies.plan("gold") is None
    refusal = unknown_plan("gold")
    assert (refusal.status, refusal.code, refusal.should_retry) == (403, "unknown_plan", False)


def test_every_limit_becomes_a_demand_in_the_order_of_the_policy() -> None:
    wanted = demands(policy(EVERY_SCOPE), ALICE, FACTS, Peek(body_bytes=41, max_output_tokens=100), "ses_1")
    assert wanted == (
        Demand("rpm", "sliding", "requests", "org", "org1", 600, 60_000, 1),
        Demand("user-rpm", "sliding", "requests", "user", "alice", 60, 60_000, 1),
        Demand("key-rpm", "sliding", "requests", "key", "key1", 50, 60_000, 1),
        Demand("session-tokens", "sliding", "tokens", "session", "ses_1", 5_000, 86_400_000, 111),
        Demand("tpm", "sliding", "tokens", "org", "org1", 1_000, 60_000, 111),
        Demand("parallel", "concurrent", "concurrent", "org", "org1", 2, 30_000, 1),
    )


def test_a_message_asks_for_requests_alone_and_has_a_price_of_its_own() -> None:
    counted = GATEWAY + "  - { path: /live, upstream: router, websocket: { count_messages: true } }\n"
    found = policy(EVERY_SCOPE, "price: { per_request: 3, per_message: 2 }", counted)
    wanted = message_demands(found, ALICE, "ses_1")
    assert [(demand.name, demand.subject, demand.cost) for demand in wanted] == [
        ("rpm", "org1", 1),
        ("user-rpm", "alice", 1),
        ("key-rpm", "key1", 1),
    ]
    assert (found.price_ucredits, found.per_message_ucredits) == (3_000_000, 2_000_000)
    assert message_demands(policy(), ALICE, None) == ()
    assert policy().per_message_ucredits == 0


def test_a_slot_in_flight_is_leased_as_long_as_the_hold() -> None:
    gateway = GATEWAY + "credits: { lease: 12s, heartbeat: 3s }\n"
    (slot,) = demands(policy("\n  - { name: p, count: concurrent, limit: 1 }", "", gateway), ALICE, FACTS, None, None)
    assert slot.window_ms == 12_000


def test_whoever_names_no_user_key_or_session_shares_one_portion_of_the_org() -> None:
    wanted = demands(policy(EVERY_SCOPE), NOBODY, FACTS, Peek(0), None)
    assert {demand.scope: demand.subject for demand in wanted} == {
        "org": "org1",
        "user": "-",
        "key": "-",
        "session": "-",
    }


def test_token_limits_are_left_out_where_the_format_is_not_read() -> None:
    wanted = demands(policy(EVERY_SCOPE), ALICE, FACTS, None, None)
    assert [demand.name for demand in wanted] == ["rpm", "user-rpm", "key-rpm", "parallel"]


def test_only_token_limits_need_the_body() -> None:
    assert needs_peek(policy(EVERY_SCOPE))
    assert not needs_peek(policy("\n  - { name: rpm, count: requests, limit: 1, window: 1s }"))
    assert not needs_peek(policy())


@pytest.mark.parametrize(
    ("peek", "tokens"),
    [
        (Peek(0, max_output_tokens=50), 50),
        (Peek(1, max_output_tokens=50), 51),
        (Peek(400, max_output_tokens=5_000), 5_100),
        (Peek(0, max_output_tokens=0), 1),
        (Peek(400), 100 + 300),
        (Peek(3_000), 750 + 250),
        (Peek(4_000), 1_000 + 1),
    ],
)
def test_tokens_are_reserved_for_the_body_and_the_output(peek: Peek, tokens: int) -> None:
    assert token_estimate(policy(EVERY_SCOPE, "tokens: { default_output: 300 }"), peek) == tokens


@given(st.integers(0, 4_000), st.integers(1, 10_000))
def test_a_client_that_names_no_maximum_is_never_refused_for_the_default(body_bytes: int, limit: int) -> None:
    tight = policy(f"\n  - {{ name: tpm, count: tokens, limit: {limit}, window: 1m }}")
    wanted = demands(tight, ALICE, FACTS, Peek(body_bytes), None)
    assert (never_fits(wanted) is None) == (-(-body_bytes // 4) + 1 <= limit)


def test_a_request_larger_than_its_limit_is_told_that_waiting_does_not_help() -> None:
    wanted = demands(policy(EVERY_SCOPE), ALICE, FACTS, Peek(0, max_output_tokens=2_000), "ses_1")
    too_large = never_fits(wanted)
    assert too_large is not None
    refusal = request_exceeds_limit(too_large)
    assert (refusal.status, refusal.code, refusal.should_retry) == (400, "request_exceeds_limit", False)
    assert refusal.retry_after_ms is None
    assert refusal.details == {"limit": "tpm", "scope": "org", "requested": 2_000, "allowed": 1_000}
    assert "tpm" in refusal.message

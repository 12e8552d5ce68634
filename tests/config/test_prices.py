"""What requests cost: from a policy's `price` to the quote of one request."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Credits, Route, effective, load_text
from gateway.config.values import format_rate
from gateway.errors import ConfigError
from gateway.policy import Asking, CompiledPolicy, PolicySet, demands, message_demands, needs_peek, never_fits, quote
from gateway.types import Facts, Peek, Price, Principal, Quote, Refusal

GATEWAY = (Path(__file__).parents[1] / "policies" / "good_smallest.yaml").read_text()
CHAT = Route(path="/v1/chat/completions", method=("POST",), upstream="router", dialect="openai", usage="openai_chat")
OPEN = Route(path="/open", upstream="router")
OPEN_TOO = GATEWAY + "  - { path: /open, upstream: router }\n"
ALICE = Principal("org1", "trial", "alice", "key1", "api_key")
FACTS = Facts("req-1", "POST", CHAT.path, CHAT.path.encode(), (), "203.0.113.7", "203.0.113.7")

#: 1 credit, 2 for a million tokens of input, 8 of output.
PRICED = "price: { per_request: 1, per_million_input_tokens: 2, per_million_output_tokens: 8 }"
BY_MODEL = """
price:
  per_request: 3
  per_million_input_tokens: 1
  models:
    - { model: ["small-*", tiny], per_million_input_tokens: 0.15, per_million_output_tokens: 0.6 }
    - { model: "small-no", per_request: 9 }
    - { model: "gpt-[45]*", per_request: 2 }
    - { model: gift }
  unknown_model: UNKNOWN
"""


def policy(rest: str, limits: str = "[]", gateway: str = OPEN_TOO) -> CompiledPolicy:
    found = PolicySet.compile(load_text(gateway, {"trial.yaml": f"policy: trial\nlimits: {limits}\n{rest}\n"}))
    plan = found.plan("trial")
    assert plan is not None
    return plan


def quoted(rest: str, peek: Peek | None, hold: Any = "clamp", route: Route = CHAT) -> Quote:
    found = quote(policy(rest), route, peek, Credits(hold=hold))
    assert isinstance(found, Quote)
    return found


def price_of(unknown: str, peek: Peek | None, route: Route = CHAT) -> Price:
    return quoted(BY_MODEL.replace("UNKNOWN", unknown), peek, route=route).price


def asked(limits: str, rest: str, peek: Peek | None, route: Route = CHAT) -> dict[str, int]:
    found = demands(policy(rest, limits), Asking(ALICE, FACTS, route, peek))
    return {demand.limit.name: demand.cost for demand in found}


# Rates


@pytest.mark.parametrize(
    ("written", "ucredits"),
    [
        ("0", 0),
        ("3", 3_000_000),
        ("0.25", 250_000),
        ("0.000001", 1),
        ('"2.50"', 2_500_000),
        ("1.0e-5", 10),
        ("15.0", 15_000_000),
    ],
)
def test_a_rate_has_up_to_six_decimals(written: str, ucredits: int) -> None:
    loaded = load_text(GATEWAY, {"trial.yaml": f"policy: trial\nprice: {{ per_million_input_tokens: {written} }}"})
    assert loaded.policies["trial"].price.input_rate == ucredits


@pytest.mark.parametrize("written", ["-1", "0.0000001", "1.0e-7", ".nan", ".inf", "1000000000", "many", "true", "[1]"])
def test_what_is_no_rate_is_a_mistake(written: str) -> None:
    with pytest.raises(ConfigError, match="six decimals"):
        load_text(GATEWAY, {"trial.yaml": f"policy: trial\nprice: {{ per_million_input_tokens: {written} }}"})


@given(st.integers(0, 10**15 - 1))
def test_a_rate_survives_being_written_and_read(rate: int) -> None:
    text = f'policy: trial\nprice: {{ per_million_output_tokens: "{format_rate(rate)}" }}'
    assert load_text(GATEWAY, {"trial.yaml": text}).policies["trial"].price.output_rate == rate


# Which price


def test_the_first_model_that_fits_counts() -> None:
    assert price_of("flat", Peek(1, "small-no")) == price_of("flat", Peek(1, "tiny")) == Price(0, 150_000, 600_000)
    assert price_of("flat", Peek(1, "gpt-4o")) == Price(2_000_000)
    assert price_of("flat", Peek(1, "gift")) == Price()


@pytest.mark.parametrize("model", ["gpt-3", "TINY", "tiny2", None])
def test_a_model_that_none_fits_is_charged_as_the_policy_says(model: str | None) -> None:
    assert price_of("flat", Peek(1, model)) == Price(3_000_000, 1_000_000)
    assert price_of("free", Peek(1, model)) == Price()
    refusal = quote(policy(BY_MODEL.replace("UNKNOWN", "deny")), CHAT, Peek(1, model), Credits())
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.code, refusal.should_retry) == (403, "unknown_model_price", False)
    assert refusal.retry_after_ms is None
    assert refusal.details == {"model": model, "param": "model"}
    assert (model or "names no model") in refusal.message


def test_where_nobody_reads_the_body_the_flat_part_is_charged_whatever_the_model() -> None:
    for unknown in ("flat", "free", "deny"):
        assert price_of(unknown, None) == Price(3_000_000)
        assert price_of(unknown, Peek(10), OPEN) == Price(3_000_000)
    assert quoted(PRICED, None) == Quote.flat(1_000_000)


def test_a_body_is_read_for_its_price_where_it_can_be() -> None:
    for rest in (PRICED, BY_MODEL.replace("UNKNOWN", "flat")):
        assert needs_peek(policy(rest), CHAT) and not needs_peek(policy(rest), OPEN)
    assert not needs_peek(policy("price: { per_request: 5 }"), CHAT)


# How much is held

#: 100 tokens of input, 4000 of output allowed.
ASKING = Peek(400, "m", stream=True, max_output_tokens=4000)
INPUT, ESTIMATE = 1_000_200, 1_032_200


@pytest.mark.parametrize(
    ("hold", "peek", "expected"),
    [
        ("full", ASKING, (ESTIMATE, ESTIMATE, ESTIMATE, 0)),
        ("clamp", ASKING, (ESTIMATE, INPUT + 16 * 8, ESTIMATE, 1024 * 8)),
        ("incremental", ASKING, (INPUT + 512 * 8, INPUT + 16 * 8, ESTIMATE, 1024 * 8)),
        # What is short needs no less than all of it.
        ("clamp", Peek(400, "m", True, 5), (INPUT + 40, INPUT + 40, INPUT + 40, 1024 * 8)),
        ("incremental", Peek(400, "m", True, 100), (INPUT + 800, INPUT + 128, INPUT + 800, 1024 * 8)),
        # A plain answer cannot ask for more on its way.
        ("incremental", Peek(400, "m", False, 4000), (ESTIMATE, INPUT + 128, ESTIMATE, 1024 * 8)),
        # Nobody named a maximum: the policy's default.
        ("clamp", Peek(400, "m", True), (INPUT + 1024 * 8, INPUT + 128, INPUT + 1024 * 8, 1024 * 8)),
        ("clamp", Peek(0, "m", True, 1), (1_000_010, 1_000_010, 1_000_010, 1024 * 8)),
    ],
)
def test_how_much_is_held(hold: str, peek: Peek, expected: tuple[int, int, int, int]) -> None:
    found = quoted(PRICED, peek, hold)
    assert (found.want_ucredits, found.least_ucredits, found.estimate_ucredits, found.step_ucredits) == expected


@given(st.integers(0, 1 << 24), st.none() | st.integers(1, 1 << 41), st.booleans())
def test_every_quote_is_in_order_and_can_be_counted_exactly(size: int, most: int | None, stream: bool) -> None:
    dear = PRICED.replace("output_tokens: 8", "output_tokens: 999999999")
    for hold in ("full", "clamp", "incremental"):
        for rest in (PRICED, dear):
            found = quoted(rest, Peek(size, "m", stream, most), hold)
            assert 0 < found.least_ucredits <= found.want_ucredits <= found.estimate_ucredits < 1 << 53
            assert 0 <= found.step_ucredits < 1 << 53


def test_a_flat_price_is_held_in_full_or_not_at_all() -> None:
    for hold in ("full", "clamp", "incremental"):
        assert quoted("price: { per_request: 5 }", ASKING, hold) == Quote.flat(5_000_000)
        assert quoted(BY_MODEL.replace("UNKNOWN", "free"), Peek(1, "gift"), hold) == Quote.flat(0)


# Limits on credits

SPEND = "[{ name: spend, count: credits, limit: 2, window: 1m }, { name: rpm, count: requests, limit: 9, window: 1m }]"


def test_a_limit_on_credits_takes_the_estimate() -> None:
    assert asked(SPEND, PRICED, ASKING) == {"spend": ESTIMATE, "rpm": 1}
    assert asked(SPEND, PRICED, None) == asked(SPEND, PRICED, Peek(9), OPEN) == {"spend": 1_000_000, "rpm": 1}
    assert asked(SPEND, BY_MODEL.replace("UNKNOWN", "free"), Peek(1, "gift")) == {"rpm": 1}
    assert asked(SPEND, BY_MODEL.replace("UNKNOWN", "flat"), Peek(1, "gpt-4")) == {"spend": 2_000_000, "rpm": 1}


def test_nobody_is_refused_by_a_limit_on_credits_for_a_maximum_that_he_never_named() -> None:
    dear = "price: { per_million_input_tokens: 10000, per_million_output_tokens: 10000 }"
    unnamed, named = Peek(40, "m", True), Peek(40, "m", True, 1024)
    assert asked(SPEND, dear, unnamed) == {"spend": 2_000_000, "rpm": 1}
    found = policy(dear, SPEND)
    oversized = never_fits(demands(found, Asking(ALICE, FACTS, CHAT, named)))
    assert oversized is not None and oversized.limit.name == "spend"
    # But the input alone is too much.
    assert asked(SPEND, dear, Peek(4000, "m", True))["spend"] == 10_010_000


def test_a_message_of_a_websocket_is_flat() -> None:
    live = Route(path="/live", upstream="router", usage="openai_chat")
    counted = OPEN_TOO + "  - { path: /live, upstream: router, websocket: { count_messages: true } }\n"
    found = policy(PRICED.replace("{ ", "{ per_message: 2, "), SPEND, counted)
    messages = message_demands(found, Asking(ALICE, FACTS, live))
    assert [(demand.limit.name, demand.cost) for demand in messages] == [("spend", 2_000_000), ("rpm", 1)]


# What `gateway check` says


def rows(rest: str) -> dict[str, Any]:
    found = effective(load_text(OPEN_TOO, {"trial.yaml": f"policy: trial\n{rest}\n"}))
    return {row.path: row for row in found}


def test_prices_are_shown_for_each_route() -> None:
    found = rows(PRICED)
    assert found[CHAT.path].spoken_prices == "1 + 2 per 1M input tokens + 8 per 1M output tokens"
    assert found["/open"].spoken_prices == "1 (flat: the route has no usage reader)"
    assert (found["/open"].flat_only, found[CHAT.path].flat_only) == (True, False)
    assert {row.spoken_prices for row in rows("price: { per_request: 2 }").values()} == {"2"}
    assert {row.spoken_prices for row in rows("").values()} == {"0"}


@pytest.mark.parametrize(
    ("unknown", "last"),
    [
        ("flat", "other models: 3 + 1 per 1M input tokens"),
        ("free", "other models: free"),
        ("deny", "other models: refused"),
    ],
)
def test_prices_of_models_are_shown_in_their_order(unknown: str, last: str) -> None:
    found = rows(BY_MODEL.replace("UNKNOWN", unknown))
    assert found[CHAT.path].spoken_prices.splitlines() == [
        "small-* tiny: 0.15 per 1M input tokens + 0.6 per 1M output tokens",
        "small-no: 9",
        "gpt-[45]*: 2",
        "gift: 0",
        last,
    ]
    assert found["/open"].spoken_prices == "3 (flat: the route has no usage reader)"


def test_a_price_by_the_token_needs_a_route_that_reads_tokens() -> None:
    unread = GATEWAY.replace(", usage: openai_chat", "")
    for rest, problem in (
        (PRICED, "price.per_million_input_tokens: charges nothing: no route"),
        ("price: { models: [{ model: a, per_request: 1 }] }", "price.models: nobody knows the model: no route"),
        (BY_MODEL, r"price.models\[0\].per_million_output_tokens: charges nothing: no route"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_text(unread, {"trial.yaml": f"policy: trial\n{rest.replace('UNKNOWN', 'flat')}\n"})


def test_a_limit_on_credits_is_content_with_a_price_by_the_token() -> None:
    for rest in ("price: { per_million_output_tokens: 0.1 }", "price: { models: [{ model: a, per_request: 1 }] }"):
        policy(rest, SPEND)
    with pytest.raises(ConfigError, match="its policy charges none"):
        policy("price: { models: [{ model: a }] }", SPEND)

"""Limits as configured: what the keys become, what between them and the rest is a mistake, and what a row shows."""

import zoneinfo
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Limit, SharedLimit, effective, load_text
from gateway.config.limit_values import format_anchor, parse_anchor
from gateway.errors import ConfigError
from gateway.policy import PolicySet

GATEWAY = """\
upstreams:
  router: { targets: [demo] }
identity:
  - api_key: { headers: [X-Secret] }
  - jwt: { keys: [{ secret: 0123456789abcdef0123456789abcdef }], header: X-Token, org: o, default_plan: trial }
plans:
  trial: { credits: 100, policy: trial }
  pro: { credits: 1000, policy: pro }
routes:
  - { path: /v1/chat/completions, method: POST, upstream: router, dialect: openai, usage: openai_chat }
  - { path: /v1/*, method: [GET, POST], upstream: router, dialect: anthropic }
  - { path: /files/*, upstream: router }
"""
PRO = "policy: pro\n"
_MINUTES = {"hour": 60, "day": 1_440, "week": 7 * 1_440, "month": 28 * 1_440}


def policies(*limits: str, rest: str = "") -> dict[str, str]:
    written = "".join(f"  - {{ {limit} }}\n" for limit in limits)
    listed = f"limits:\n{written}" if limits else ""
    return {"trial.yaml": f"policy: trial\n{listed}{rest}", "pro.yaml": PRO}


def only(limit: str, rest: str = "") -> Limit:
    (found,) = load_text(GATEWAY, policies(limit, rest=rest)).policies["trial"].limits
    return found


def problems_of(limit: str, *, gateway: str = GATEWAY, rest: str = "") -> list[str]:
    """Without the place, which is the only limit of the policy `trial`."""
    with pytest.raises(ConfigError) as caught:
        load_text(gateway, policies(limit, rest=rest))
    return [problem.removeprefix("policies/trial.yaml:3: limits[0]") for problem in caught.value.problems]


def shown(*limits: str, gateway: str = GATEWAY, rest: str = "") -> dict[str, list[str]]:
    """Path -> the limits in words, for the plan `trial`."""
    rows = effective(load_text(gateway, policies(*limits, rest=rest)))
    return {row.path: [str(limit) for limit in row.limits] for row in rows if row.plan == "trial"}


# -- what the keys become


def test_a_limit_left_as_it_is_is_the_orgs_own_in_a_sliding_window() -> None:
    limit = only("name: rpm, count: requests, limit: 5, window: 1m")
    assert (limit.algorithm, limit.window_ms, limit.per, limit.cardinality) == ("sliding", 60_000, ("org",), 16_384)
    assert (limit.burst, limit.period, limit.shadow, limit.warn_at) == (None, None, False, None)
    assert limit.when.model_dump(exclude_none=True) == {}


def test_one_word_stands_for_a_list_of_it_and_header_names_are_lower_case() -> None:
    limit = only(
        "name: rpm, count: requests, limit: 5, window: 1m, per: 'header:X-Team',"
        " when: { route: /v1/*, method: post, model: 'GPT-*', plan: trial, stream: false, header: X-Dry-Run }"
    )
    assert limit.per == ("header:x-team",)
    assert limit.when.model_dump() == {
        "route": ("/v1/*",),
        "method": ("POST",),
        "model": ("GPT-*",),
        "plan": ("trial",),
        "stream": False,
        "header": ("x-dry-run",),
    }


def test_a_shared_limit_is_for_everybody_unless_it_says_otherwise() -> None:
    shared = "shared_limits:\n  - { name: all, count: requests, limit: 5, window: 1m, per: [%s] }\n"
    assert load_text(GATEWAY + shared % "", policies()).shared_limits[0].per == ()
    assert load_text(GATEWAY + shared % "upstream, model", policies()).shared_limits[0].per == ("upstream", "model")
    assert SharedLimit.model_validate({"name": "all", "count": "requests", "limit": 5, "window": "1m"}).per == ()


@pytest.mark.parametrize(
    ("period", "anchor", "minutes"),
    [
        ("hour", '":15"', 15),
        ("day", '"06:00"', 360),
        ("day", "23:59", 1_439),
        ("week", "mon", 0),
        ("week", "wed 06:30", 2 * 1_440 + 390),
        ("month", "1", 0),
        ("month", "'05'", 4 * 1_440),
        ("month", "15 06:00", 14 * 1_440 + 360),
        ("month", "28", 27 * 1_440),
    ],
)
def test_an_anchor_is_minutes_after_the_natural_beginning(period: str, anchor: str, minutes: int) -> None:
    limit = only(f"name: q, count: requests, limit: 5, algorithm: calendar, period: {period}, anchor: {anchor}")
    assert limit.anchor_minutes == minutes


@given(st.sampled_from(sorted(_MINUTES)), st.data())
def test_an_anchor_survives_being_written_and_read(period: str, data: st.DataObject) -> None:
    minutes = data.draw(st.integers(0, _MINUTES[period] - 1))
    assert parse_anchor(period, format_anchor(period, minutes)) == minutes


@given(st.sampled_from(sorted(_MINUTES)), st.text(alphabet="0123456789: monsu", max_size=9))
def test_whatever_else_is_written_as_anchor_is_refused_or_lies_within_the_period(period: str, text: str) -> None:
    try:
        assert 0 <= parse_anchor(period, text) < _MINUTES[period]
    except ValueError as exc:
        assert "write it as" in str(exc)


def test_the_key_that_is_blamed_is_the_one_that_is_wrong() -> None:
    """An anchor without a period it could fit is not blamed beside the period."""
    wrong = problems_of("name: q, count: requests, limit: 5, algorithm: calendar, period: dayly, anchor: mon")
    assert wrong == [".period: expected 'hour', 'day', 'week' or 'month', got 'dayly', did you mean 'day'?"]
    assert problems_of("name: q, count: requests, limit: 5, period: day, anchor: '06:00'") == [
        ".anchor: only a limit with algorithm: calendar has an anchor",
        ".period: only a limit with algorithm: calendar has a period",
    ]


@pytest.fixture
def without_system_zones() -> Iterator[None]:
    zoneinfo.ZoneInfo.clear_cache()
    zoneinfo.reset_tzpath(to=())
    yield
    zoneinfo.reset_tzpath()
    zoneinfo.ZoneInfo.clear_cache()


@pytest.mark.usefixtures("without_system_zones")
def test_zones_are_known_on_a_machine_that_has_none() -> None:
    daily = "name: q, count: requests, limit: 5, algorithm: calendar, period: day, zone: "
    assert only(daily + "Pacific/Chatham").zone == "Pacific/Chatham"
    assert "did you mean 'Pacific/Chatham'?" in problems_of(daily + "chatham")[0]


@pytest.mark.parametrize("zone", ["localtime", "posix/Europe/Berlin", "right/Europe/Berlin", "Europe", "/etc", "''"])
def test_what_is_a_zone_on_some_machines_only_is_none(zone: str) -> None:
    daily = "name: q, count: requests, limit: 5, algorithm: calendar, period: day, zone: "
    assert "is not a time zone of the IANA list" in problems_of(daily + zone)[0]


@pytest.mark.parametrize(
    ("zone", "meant"), [("utc", "UTC"), ("europe/berlin", "Europe/Berlin"), ("Tokio", "Asia/Tokyo")]
)
def test_a_zone_in_other_words_is_guessed(zone: str, meant: str) -> None:
    daily = "name: q, count: requests, limit: 5, algorithm: calendar, period: day, zone: "
    assert f"did you mean '{meant}'?" in problems_of(daily + zone)[0]


# -- between keys, sections and files


def test_a_burst_is_bounded_by_what_is_counted_exactly() -> None:
    most = ((1 << 53) - 1) // 60_000
    bucket = "name: rps, count: requests, limit: 5, algorithm: gcra, window: 1m, burst: "
    assert only(bucket + str(most)).burst == most
    assert f"at most {most} with a window of 1m" in problems_of(bucket + str(most + 1))[0]
    assert f"at most {most} with a window of 1m" in problems_of(bucket + f"'{most + 1}'")[0]


def test_a_number_beyond_every_bound_is_one_mistake() -> None:
    bucket = "name: rps, count: credits, limit: 5, algorithm: gcra, window: 1m, burst: 9999999999999"
    assert problems_of(bucket, rest="price: { per_request: 1 }") == [
        ".burst: must be at most 1000000000000, got 9999999999999"
    ]


@pytest.mark.parametrize("name", ["x-secret", "X-Token", "Authorization", "cookie"])
def test_no_field_that_carries_a_credential_is_counted_by(name: str) -> None:
    wrong = problems_of(f"name: rpm, count: requests, limit: 5, window: 1m, per: 'header:{name}'")
    assert wrong == [f".per: '{name}' carries a credential: to count each of them on its own, write 'key'"]


def test_a_credential_field_is_one_that_some_source_reads() -> None:
    other = GATEWAY.replace("headers: [X-Secret]", "headers: [X-Other]")
    per_secret = policies("name: rpm, count: requests, limit: 5, window: 1m, per: 'header:x-secret'")
    assert load_text(other, per_secret).policies["trial"].limits[0].per == ("header:x-secret",)


@pytest.mark.parametrize("name", ["team", "https://issuer.example/team", "urn:team@2"])
def test_claims_are_counted_by_where_tokens_are_accepted(name: str) -> None:
    limit = f"name: rpm, count: requests, limit: 5, window: 1m, per: ['claim:{name}']"
    assert only(limit).per == (f"claim:{name}",)
    without = GATEWAY.replace("  - jwt: {", "  - api_key: {}\n#")
    assert problems_of(limit, gateway=without) == [
        ".per[0]: nobody has claims: no source in gateway.yaml is a jwt",
    ]


def test_a_part_of_a_prefix_route_can_be_meant() -> None:
    limit = "name: rpm, count: requests, limit: 5, window: 1m, when: { route: /V1/embeddings }"
    assert shown(limit) == {
        "/v1/chat/completions": [],
        "/v1/*": ["rpm: 5 requests in 1m per org, when route /V1/embeddings"],
        "/files/*": [],
    }


def test_what_needs_a_body_needs_a_route_that_it_can_meet_whose_body_is_read() -> None:
    limit = "name: tpm, count: tokens, limit: 5, window: 1m, when: { route: /v1/*, method: GET }"
    assert problems_of(limit) == [
        ": counts tokens, but no route that this limit could meet says how to read them (usage: openai_chat)"
    ]
    assert only(limit.replace("GET", "POST")).when.method == ("POST",)


def test_a_route_that_cannot_be_read_could_be_any() -> None:
    """What is wrong with a limit because of it is not worth a second problem."""
    limit = "name: rpm, count: requests, limit: 5, window: 1m, when: { route: /other }"
    assert problems_of(limit) == [".when.route: unknown route '/other' (known: /files/*, /v1/*, /v1/chat/completions)"]
    unreadable = GATEWAY.replace("path: /files/*", "path: ${OTHER}")
    assert [text for text in problems_of(limit, gateway=unreadable) if "when" in text] == []
    tokens = "name: tpm, count: tokens, limit: 5, window: 1m"
    (problem,) = problems_of(tokens, gateway=GATEWAY.replace("usage: openai_chat", "usage: '${USAGE}'"))
    assert "USAGE is not set" in problem


def test_a_credit_limit_is_held_against_the_cheapest_of_the_prices() -> None:
    limit = "name: spend, count: credits, limit: 2, window: 1m"
    counted = GATEWAY + "  - { path: /live, upstream: router, websocket: { count_messages: true } }\n"
    assert "the cheapest request costs 3 credits" in problems_of(limit, rest="price: { per_request: 3 }")[0]
    text = policies(limit, rest="price: { per_request: 3, per_message: 2 }")
    assert load_text(counted, text).policies["trial"].limits[0].limit == 2


def test_an_unreadable_key_is_not_missing() -> None:
    (problem,) = problems_of("name: rpm, count: requests, limit: 5, window: '${UNSET}'")
    assert "UNSET is not set" in problem
    (problem,) = problems_of("name: rpm, count: requests, limit: 5, window: 1m, per: '${UNSET}', cardinality: 5")
    assert "UNSET is not set" in problem


# -- rows


def test_a_row_says_each_kind_of_limit_in_words() -> None:
    gateway = GATEWAY + (
        "shared_limits:\n"
        "  - { name: everybody, count: requests, limit: 9, window: 1s }\n"
        "  - { name: bear, count: concurrent, limit: 9, per: [upstream, model] }\n"
    )
    quota = "algorithm: calendar, zone: Europe/Berlin, period"
    limits = shown(
        "name: rpm, count: requests, limit: 600, window: 1m, per: [org, model]",
        "name: rps, count: requests, limit: 100, window: 1m, algorithm: gcra, burst: 20, shadow: true",
        f"name: month, count: input_tokens, limit: 1000, {quota}: month, anchor: 15 06:00, per: user, warn_at: 0.85",
        f"name: billing, count: credits, limit: 1000, {quota}: month, anchor: 2",
        f"name: week, count: requests, limit: 1000, {quota}: week",
        f"name: day, count: requests, limit: 1000, {quota}: day, per: key",
        "name: hour, count: requests, limit: 1000, algorithm: calendar, period: hour, anchor: ':05'",
        "name: new, count: sessions, limit: 7, window: 1h",
        "name: parallel, count: concurrent, limit: 2, per: client_ip",
        "name: fast, count: requests, limit: 2, window: 1s,"
        " when: { method: [GET, POST], model: ['a*', b], stream: true, header: [x-a, x-b] }",
        "name: slow, count: requests, limit: 2, window: 1s, when: { plan: trial, stream: false }",
        "name: named, count: requests, limit: 2, window: 1s, when: { model: a }",
        "name: any, count: requests, limit: 2, window: 1s, when: { model: '*' }",
        rest="price: { per_request: 1 }",
        gateway=gateway,
    )
    assert limits["/v1/chat/completions"] == [
        "rpm: 600 requests in 1m per org+model",
        "rps: 100 requests per 1m, burst 20, per org (shadow: never refuses)",
        "month: 1000 input tokens per month from the 15th 06:00 Europe/Berlin, per user, warns from 85 %",
        "billing: 1000 credits per month from the 2nd Europe/Berlin, per org",
        "week: 1000 requests per week from mon Europe/Berlin, per org",
        "day: 1000 requests per day from 00:00 Europe/Berlin, per key",
        "hour: 1000 requests per hour from :05 UTC, per org",
        "new: 7 new sessions in 1h per org",
        "parallel: 2 concurrent per client_ip",
        "fast: 2 requests in 1s per org, when method GET or POST and model a* or b and streaming and with x-a and x-b",
        "slow: 2 requests in 1s per org, when plan trial and not streaming",
        "named: 2 requests in 1s per org, when model a",
        "any: 2 requests in 1s per org, when model *",
        "everybody: 9 requests in 1s for everybody together (shared by all orgs)",
        "bear: 9 concurrent per upstream+model (shared by all orgs)",
    ]
    unread = [text for text in limits["/files/*"] if "no usage reader" in text]
    assert [text.partition(":")[0] for text in unread] == ["month", "fast", "named"]


def test_a_row_leaves_out_what_its_route_method_or_plan_never_meets() -> None:
    limit = "name: %s, count: requests, limit: 5, window: 1m, when: { %s }"
    named = {
        path: [text.partition(":")[0] for text in limits]
        for path, limits in shown(
            limit % ("chat", "route: /v1/chat/*"),
            limit % ("below", "route: [/v1/*, /files/*]"),
            limit % ("get", "method: GET"),
            limit % ("put", "method: put"),
            limit % ("mine", "plan: trial"),
            gateway=GATEWAY
            + "shared_limits:\n  - { "
            + limit % ("theirs", "plan: [pro]")
            + " }\n  - { "
            + limit % ("ours", "plan: [pro, trial]")
            + " }\n",
        ).items()
    }
    assert named == {
        "/v1/chat/completions": ["chat", "below", "mine", "ours"],
        "/v1/*": ["chat", "below", "get", "mine", "ours"],
        "/files/*": ["below", "get", "put", "mine", "ours"],
    }


def test_the_policies_we_ship_keep_their_names_and_numbers() -> None:
    folder = Path(__file__).parents[2] / "policies"
    loaded = load_text(GATEWAY, {file.name: file.read_text() for file in folder.glob("*.yaml")})
    assert {name: [limit.limit for limit in policy.limits] for name, policy in loaded.policies.items()} == {
        "trial": [30, 120, 20_000, 2],
        "pro": [600, 60, 200_000, 20],
        "enterprise": [6_000, 600, 2_000_000, 200],
    }


def test_a_row_shows_what_the_policy_really_asks_there() -> None:
    """`gateway check` would be worse than nothing if requests met other limits than it prints."""
    gateway = GATEWAY + (
        "shared_limits:\n"
        "  - { name: everybody, count: requests, limit: 9, window: 1s, when: { plan: pro } }\n"
        "  - { name: chat, count: tokens, limit: 9, window: 1s, per: model, when: { route: [/v1/chat/completions] } }\n"
    )
    window = "limit: 5, window: 1m"
    limits = policies(
        f"name: all, count: requests, {window}",
        f"name: part, count: requests, {window}, when: {{ route: [/v1/embeddings, /files/x/*] }}",
        f"name: upper, count: requests, {window}, when: {{ route: /V1/* }}",
        f"name: put, count: requests, {window}, when: {{ method: [PUT, GET] }}",
        "name: posts, count: concurrent, limit: 1, when: { method: POST, plan: trial }",
        f"name: model, count: requests, {window}, when: {{ model: gpt* }}",
        f"name: spend, count: credits, {window}, when: {{ route: /v1/* }}",
        f"name: output, count: output_tokens, {window}",
        f"name: conversations, count: sessions, {window}",
        rest="price: { per_request: 1 }",
    )
    settings = load_text(gateway, limits)
    compiled = PolicySet.compile(settings)
    for row in effective(settings):
        route = next(route for route in settings.routes if route.path == row.path)
        plan = compiled.plan(row.plan)
        assert plan is not None
        asked = [applied.rule.limit for applied in plan.on(route).request.applied]
        assert [limit.name for limit in row.limits] == [limit.name for limit in asked]
        assert [limit.shared for limit in row.limits] == [limit.shared for limit in asked]

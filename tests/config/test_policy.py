"""gateway/policy: from plans and policies to what a request asks of which limit."""

import json
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import keys
from gateway.config import Credits, Route, Settings, When, load_text
from gateway.policy import (
    Asking,
    CompiledPolicy,
    PolicySet,
    claims_needed,
    demands,
    headers_needed,
    message_demands,
    needs_peek,
    never_fits,
    quote,
    request_exceeds_limit,
    token_estimate,
    unknown_plan,
)
from gateway.policy.compile import OVERRIDDEN_MAX
from gateway.policy.conditions import compile_when
from gateway.policy.subjects import framed, slot
from gateway.types import Calendar, Demand, Facts, Limit, Peek, Principal, Quote
from tests.identity.signing import SECRET
from tests.limits.given import demand, limit

GATEWAY = (
    (Path(__file__).parents[1] / "policies" / "good_smallest.yaml")
    .read_text()
    .replace(
        "identity:\n", f"identity:\n  - jwt: {{ keys: [{{ secret: {SECRET} }}], org: org, default_plan: trial }}\n"
    )
)
ALICE = Principal("org1", "trial", "alice", "key1", "jwt", {"team": "blue"})
BOB = Principal("org1", "trial", "bob", "key2", "jwt", {"team": "red"})
NOBODY = Principal("org1", "trial", None, None, "api_key")
COUNTED = GATEWAY + "  - { path: /live, upstream: router, websocket: { count_messages: true } }\n"
CHAT = Route(path="/v1/chat/completions", method=("POST",), upstream="router", dialect="openai", usage="openai_chat")
EVERYTHING = Route(path="/v1/*", upstream="router", usage="openai_chat")
PATH = "/v1/chat/completions"
EVERY_SCOPE = """
  - { name: rpm, count: requests, limit: 600, window: 1m }
  - { name: user-rpm, count: requests, limit: 60, window: 1m, per: user }
  - { name: key-rpm, count: requests, limit: 50, window: 1m, per: key }
  - { name: session-tokens, count: tokens, limit: 5000, window: 24h, per: session }
  - { name: tpm, count: tokens, limit: 1000, window: 1m }
  - { name: parallel, count: concurrent, limit: 2 }
"""


def loaded(limits: str = " []", rest: str = "", gateway: str = GATEWAY) -> Settings:
    return load_text(gateway, {"trial.yaml": f"policy: trial\nlimits:{limits}\n{rest}\n"})


def policy(limits: str = " []", rest: str = "", gateway: str = GATEWAY) -> CompiledPolicy:
    found = PolicySet.compile(loaded(limits, rest, gateway)).plan("trial")
    assert found is not None
    return found


def one(text: str, rest: str = "", gateway: str = GATEWAY) -> CompiledPolicy:
    """The policy with this single limit, whose name is `it`."""
    return policy(f"\n  - {{ name: it, {text} }}", rest, gateway)


def sharing(*limits: str) -> str:
    """gateway.yaml with these shared limits."""
    return GATEWAY + "shared_limits:\n" + "".join(f"  - {{ {text} }}\n" for text in limits)


def facts(
    path: str = PATH, method: str = "POST", client_ip: str = "192.0.2.7", headers: tuple[tuple[str, str], ...] = ()
) -> Facts:
    fields = tuple((name.encode(), value.encode("latin-1")) for name, value in headers)
    return Facts("req_1", method, path, path.encode(), fields, client_ip=client_ip, peer_ip="198.51.100.1")


def asking(
    principal: Principal = ALICE,
    seen: Facts | None = None,
    route: Route = CHAT,
    peek: Peek | None = None,
    session_id: str | None = None,
    overrides: Mapping[str, int] | None = None,
) -> Asking:
    session = None if session_id is None else keys.digest(session_id)
    return Asking(principal, facts() if seen is None else seen, route, peek, session, overrides or {})


def subject(found: CompiledPolicy, request: Asking) -> str:
    """Of its only limit."""
    (only,) = demands(found, request)
    return only.subject


def names(wanted: tuple[Demand, ...]) -> list[str]:
    return [each.limit.name for each in wanted]


# Plans, policies and limits


def test_a_plan_lives_under_the_policy_it_names() -> None:
    policies = PolicySet.compile(loaded(rest="price: { per_request: 3 }"))
    found = policies.plan("trial")
    assert found is not None and found.name == "trial"
    assert quote(found, CHAT, None, Credits()) == Quote.flat(3_000_000)
    assert policies.plan("gold") is None
    refusal = unknown_plan("gold")
    assert (refusal.status, refusal.code, refusal.should_retry) == (403, "unknown_plan", False)


def test_every_limit_becomes_a_demand_in_the_order_of_the_policy() -> None:
    wanted = demands(policy(EVERY_SCOPE), asking(peek=Peek(41, max_output_tokens=100), session_id="ses_1"))
    user, key, session = (each.subject for each in wanted[1:4])
    assert wanted == (
        demand("rpm", "sliding", "requests", "org", "org1", 600, 60_000, 1),
        demand("user-rpm", "sliding", "requests", "user", user, 60, 60_000, 1),
        demand("key-rpm", "sliding", "requests", "key", key, 50, 60_000, 1),
        demand("session-tokens", "sliding", "tokens", "session", session, 5_000, 86_400_000, 111),
        demand("tpm", "sliding", "tokens", "org", "org1", 1_000, 60_000, 111),
        demand("parallel", "concurrent", "concurrent", "org", "org1", 2, 30_000, 1),
    )
    assert len({user, key, session, ""}) == 4


@pytest.mark.parametrize(
    ("text", "compiled"),
    [
        (
            "count: requests, limit: 10, algorithm: gcra, window: 1s, burst: 50, warn_at: 0.8",
            limit("it", "gcra", "requests", "org", 10, 1_000, burst=50, warn_at=0.8),
        ),
        (
            "count: credits, limit: 7, window: 24h, shadow: true",
            limit("it", "sliding", "ucredits", "org", 7_000_000, 86_400_000, shadow=True),
        ),
        (
            "count: credits, limit: 7, algorithm: gcra, window: 1h, burst: 2",
            limit("it", "gcra", "ucredits", "org", 7_000_000, 3_600_000, burst=2_000_000),
        ),
        (
            'count: requests, limit: 9, algorithm: calendar, period: month, zone: Europe/Berlin, anchor: "15 06:00"',
            limit(
                "it",
                "calendar",
                most=9,
                window_ms=31 * 86_400_000,
                calendar=Calendar("month", "Europe/Berlin", 14 * 1440 + 360),
            ),
        ),
        (
            "count: requests, limit: 9, algorithm: calendar, period: hour",
            limit("it", "calendar", most=9, window_ms=3_600_000, calendar=Calendar("hour")),
        ),
        ("count: concurrent, limit: 4", limit("it", "concurrent", "concurrent", "org", 4, 30_000)),
        (
            "count: sessions, limit: 4, window: 1h, per: [org, user, 'claim:team']",
            limit("it", "sliding", "sessions", "user+claim:team", 4, 3_600_000),
        ),
    ],
)
def test_a_limit_is_compiled_with_its_unit_kind_and_scope(text: str, compiled: Limit) -> None:
    (rule,) = one(text, "price: { per_request: 1 }").rules
    assert rule.limit == compiled


def test_a_slot_in_flight_is_leased_as_long_as_the_hold() -> None:
    (slot_,) = demands(
        one("count: concurrent, limit: 1", "", GATEWAY + "credits: { lease: 12s, heartbeat: 3s }\n"), asking()
    )
    assert slot_.limit.window_ms == 12_000


def test_shared_limits_follow_those_of_every_policy_in_the_order_of_the_file() -> None:
    gateway = sharing(
        "name: all, count: requests, limit: 9, window: 1s",
        "name: by-upstream, count: concurrent, limit: 5, per: upstream",
        "name: by-model, count: requests, limit: 5, window: 1m, per: [model, client_ip]",
    ).replace("plans:\n", "plans:\n  gold: { credits: 1, policy: trial }\n")
    policies = PolicySet.compile(loaded("\n  - { name: own, count: requests, limit: 1, window: 1s }", "", gateway))
    for plan in ("trial", "gold"):
        found = policies.plan(plan)
        assert found is not None
        wanted = demands(found, asking())
        assert [(each.limit.name, each.limit.scope, each.limit.shared) for each in wanted] == [
            ("own", "org", False),
            ("all", "everybody", True),
            ("by-upstream", "upstream", True),
            ("by-model", "model+client_ip", True),
        ]
        assert wanted[1].subject == ""
        other = Principal("org2", "trial", "eve", None, "jwt")
        assert demands(found, asking(other)) == wanted


def test_what_costs_nothing_asks_nothing_of_a_limit_on_credits() -> None:
    text = "count: credits, limit: 7, window: 24h"
    assert demands(one(text, "price: { per_message: 3 }", COUNTED), asking()) == ()
    priced = one(text, "price: { per_request: 3 }")
    (wanted,) = demands(priced, asking())
    assert (wanted.cost, wanted.limit.limit) == (3_000_000, 7_000_000)
    assert message_demands(priced, asking()) == ()


def test_a_message_asks_for_requests_and_its_own_price_alone() -> None:
    live = Route(path="/live", upstream="router")
    more = (
        EVERY_SCOPE
        + "  - { name: money, count: credits, limit: 9, window: 1h }\n"
        + "  - { name: talks, count: sessions, limit: 9, window: 1h }\n"
        + "  - { name: elsewhere, count: requests, limit: 9, window: 1h, when: { route: /v1/* } }\n"
    )
    found = policy(more, "price: { per_request: 3, per_message: 2 }", COUNTED)
    connection = asking(route=live, seen=facts("/live", "GET"), session_id="ses_1")
    assert [(each.limit.name, each.cost) for each in message_demands(found, connection)] == [
        ("rpm", 1),
        ("user-rpm", 1),
        ("key-rpm", 1),
        ("money", 2_000_000),
    ]
    assert [(each.limit.name, each.cost) for each in demands(found, connection)] == [
        ("rpm", 1),
        ("user-rpm", 1),
        ("key-rpm", 1),
        ("parallel", 1),
        ("money", 3_000_000),
        ("talks", 1),
    ]
    assert (found.price_ucredits, found.per_message_ucredits) == (3_000_000, 2_000_000)
    assert message_demands(policy(), connection) == ()
    assert policy().per_message_ucredits == 0


def test_limits_in_which_no_two_requests_differ_cost_no_work_per_request() -> None:
    found = policy(
        "\n  - { name: rpm, count: requests, limit: 600, window: 1m, when: { route: /v1/*, method: POST } }"
        "\n  - { name: parallel, count: concurrent, limit: 2, per: route }"
    )
    assert demands(found, asking(ALICE)) is demands(found, asking(BOB, facts(client_ip="192.0.2.8"), peek=Peek(9, "m")))


# Whose portion: `per`


def test_whoever_names_no_user_key_or_session_shares_one_portion_of_the_org() -> None:
    found = policy(EVERY_SCOPE)
    someone, nobody = (
        {each.limit.name: each.subject for each in demands(found, asking(who, peek=Peek(0), session_id=session))}
        for who, session in ((ALICE, "ses_1"), (NOBODY, None))
    )
    assert nobody == {
        each.limit.name: each.subject
        for each in demands(found, asking(Principal("org1", "trial", "", "", "jwt"), peek=Peek(0)))
    }
    assert {name for name in someone if someone[name] != nobody[name]} == {"user-rpm", "key-rpm", "session-tokens"}


@pytest.mark.parametrize(
    ("per", "same", "other"),
    [
        ("user", asking(ALICE, facts(client_ip="192.0.2.8")), asking(BOB)),
        ("key", asking(Principal("org1", "trial", "bob", "key1", "api_key")), asking(BOB)),
        ("client_ip", asking(BOB), asking(seen=facts(client_ip="192.0.2.8"))),
        ("model", asking(BOB), asking(peek=Peek(1, "gpt-4"))),
        ("session", asking(BOB), asking(session_id="ses_1")),
        ("claim:team", asking(Principal("org1", "trial", "eve", None, "jwt", {"team": "blue", "a": "b"})), asking(BOB)),
        ("claim:team", asking(ALICE), asking(NOBODY)),
        ("header:x-tenant", asking(BOB), asking(seen=facts(headers=(("x-tenant", "t1"),)))),
        (
            "header:x-tenant",
            asking(seen=facts(headers=(("x-tenant", ""),))),
            asking(seen=facts(headers=(("x-tenant", "\xe4"),))),
        ),
        ("[user, model]", asking(ALICE), asking(peek=Peek(1, "gpt-4"))),
        ("[user, model]", asking(ALICE), asking(BOB)),
        ("[model, route]", asking(BOB), asking(route=EVERYTHING)),
        ("route", asking(BOB, peek=Peek(1, "gpt-4")), asking(route=EVERYTHING)),
    ],
)
def test_a_portion_belongs_to_whoever_is_alike_in_what_the_limit_is_per(per: str, same: Asking, other: Asking) -> None:
    found = one(f"count: requests, limit: 9, window: 1m, per: {per}")
    assert subject(found, asking()) == subject(found, same) != subject(found, other)
    assert len(subject(found, asking())) == len(subject(found, other))


def test_of_a_field_sent_twice_the_first_value_counts() -> None:
    found = one("count: requests, limit: 9, window: 1m, per: 'header:X-Tenant'")
    first, second = ("x-tenant", "t1"), ("x-tenant", "t2")
    assert subject(found, asking(seen=facts(headers=(first, second)))) == subject(
        found, asking(seen=facts(headers=(first,)))
    )


def test_all_addresses_of_one_ipv6_network_are_one_client() -> None:
    found = one("count: requests, limit: 9, window: 1m, per: client_ip")
    ours, same, other = ("2001:db8:1:2::7", "2001:db8:1:2:ffff::1", "2001:db8:1:3::7")
    subjects = [subject(found, asking(seen=facts(client_ip=address))) for address in (ours, same, other)]
    assert subjects[0] == subjects[1] != subjects[2]
    assert subject(found, asking(seen=facts(client_ip="::ffff:192.0.2.7"))) == subject(found, asking())


def test_each_upstream_has_its_portion_of_a_limit_that_all_orgs_share() -> None:
    found = policy(gateway=sharing("name: up, count: concurrent, limit: 5, per: upstream"))
    elsewhere = Route(path="/x", upstream="other")
    assert (
        subject(found, asking()) == subject(found, asking(route=EVERYTHING)) != subject(found, asking(route=elsewhere))
    )


def test_those_who_meet_in_a_slot_of_one_limit_do_not_meet_in_every_limit() -> None:
    found = policy(
        "".join(
            f"\n  - {{ name: l{number}, count: requests, limit: 9, window: 1m, per: user, cardinality: 4 }}"
            for number in range(16)
        )
    )
    ours = [each.subject for each in demands(found, asking(ALICE))]
    theirs = [each.subject for each in demands(found, asking(BOB))]
    assert 0 < sum(a == b for a, b in zip(ours, theirs, strict=True)) < 16


def test_a_limit_has_the_same_portions_whatever_stands_beside_it() -> None:
    lines = [
        f"\n  - {{ name: l{number}, count: requests, limit: 9, window: 1m, per: {per} }}"
        for number, per in enumerate(("user", "key", "[user, key]", "user", "client_ip", "[route, user]"))
    ]
    together = demands(policy("".join(lines)), asking())
    assert [each.subject for each in together] == [subject(policy(line), asking()) for line in lines]


@pytest.mark.parametrize("cardinality", [7, 16_384, 1_000_000])
def test_a_hundred_thousand_subjects_stay_within_the_slots_and_spread_over_them(cardinality: int) -> None:
    found = one(f"count: requests, limit: 9, window: 1m, per: session, cardinality: {cardinality}")
    subjects = [subject(found, asking(session_id=f"ses {number}")) for number in range(100_000)]
    slots = {int(text[1:], 16) for text in subjects}
    assert max(slots) < cardinality and {len(text) for text in subjects} == {6}
    # As many as throwing that many dice would leave.
    expected = cardinality * (1 - (1 - 1 / cardinality) ** 100_000)
    assert len(slots) == pytest.approx(expected, rel=0.01)


def test_a_subject_has_the_same_slot_in_every_process() -> None:
    script = (
        "from gateway.policy.subjects import framed, slot;"
        "print([slot(framed(['it', str(number)]), 16384) for number in range(50)])"
    )
    environment = {"PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout.strip() == str([slot(framed(["it", str(number)]), 16_384) for number in range(50)])


TEXTS = st.lists(st.text(st.characters(), max_size=6), max_size=4)


@given(TEXTS, TEXTS)
@example(["a", "bc"], ["ab", "c"])
@example(["a", ""], ["a"])
@example(["\ud800"], ["?"])
def test_no_two_lists_of_values_are_taken_for_each_other(ours: list[str], theirs: list[str]) -> None:
    assert (framed(ours) == framed(theirs)) == (ours == theirs)


# Sessions


def test_a_session_is_counted_once_by_its_digest_and_nothing_is_counted_without_one() -> None:
    found = one("count: sessions, limit: 9, window: 1h, per: user")
    (wanted,) = demands(found, asking(session_id="ses_1"))
    assert (wanted.cost, wanted.member) == (1, keys.digest("ses_1"))
    assert demands(found, asking()) == ()
    (request,) = demands(one("count: requests, limit: 9, window: 1h, per: session"), asking(session_id="ses_1"))
    assert request.member == ""


# Conditions: `when`

MODELS = ("gpt-4", "gpt-4o-mini", "GPT-4", "claude-3", "[x]", "")
GLOBS = ("*", "**", "gpt-4*", "gpt-?", "[!g]*", "*mini", "claude-3", "[[]x]")
PATHS = ("/v1/chat/completions", "/v1/embeddings", "/v1/chat/x", "/v2/y")
PATTERNS = ("/v1/*", "/v1/chat/*", "/v1/embeddings", "/v2/*", "/v1/chat/completions", "/other")
ROUTES = (
    CHAT,
    EVERYTHING,
    Route(path="/*", upstream="router"),
    Route(path="/v1/chat/*", method=("GET", "POST"), upstream="router", usage="openai_chat"),
)


def _lists(values: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2)


def covered(pattern: str, path: str) -> bool:
    return path.startswith(pattern[:-1]) if pattern.endswith("/*") else path == pattern


def counts(when: Mapping[str, Any], plan: str, request: Asking) -> bool:
    """`when` as its documentation reads, word for word."""
    seen, peek = request.facts, request.peek
    model = None if peek is None else peek.model
    header_names = {name.decode() for name, _ in seen.headers}
    patterns, globs = when.get("route"), when.get("model")
    return all(
        (
            patterns is None or any(covered(p, request.route.path) or covered(p, seen.path) for p in patterns),
            when.get("method") is None or seen.method in when["method"],
            globs is None or "*" in globs or (model is not None and any(fnmatchcase(model, glob) for glob in globs)),
            when.get("plan") is None or plan in when["plan"],
            when.get("stream") is None or when["stream"] is (peek is not None and peek.stream),
            when.get("header") is None or set(when["header"]) <= header_names,
        )
    )


@st.composite
def requests(draw: st.DrawFn) -> Asking:
    route = draw(st.sampled_from(ROUTES))
    path = draw(st.sampled_from([path for path in PATHS if covered(route.path, path)]))
    method = draw(st.sampled_from(route.method or ("GET", "POST", "DELETE")))
    headers = draw(st.lists(st.sampled_from((("x-a", "1"), ("x-b", ""), ("x-c", "3"))), max_size=3))
    peek = draw(st.none() | st.builds(Peek, st.just(9), st.none() | st.sampled_from(MODELS), st.booleans()))
    return asking(seen=facts(path, method, headers=tuple(headers)), route=route, peek=peek)


WHENS = st.fixed_dictionaries(
    {},
    optional={
        "route": _lists(PATTERNS),
        "method": _lists(("GET", "POST", "DELETE")),
        "model": _lists(GLOBS),
        "plan": _lists(("trial", "pro")),
        "stream": st.booleans(),
        "header": _lists(("x-a", "x-b")),
    },
)


@settings(max_examples=600)
@given(WHENS, st.sampled_from(("trial", "pro")), requests())
def test_a_limit_counts_a_request_for_which_all_its_conditions_hold(
    when: dict[str, Any], plan: str, request: Asking
) -> None:
    checks = compile_when(When.model_validate(when), plan, request.route)
    compiled = checks is not None and all(check(request) for check in checks)
    assert compiled == counts(when, plan, request)


def test_conditions_choose_the_limits_of_a_request() -> None:
    plans, routes = (
        "  pro: { credits: 1, policy: trial }\n",
        "  - { path: /v1/*, upstream: router, usage: openai_chat }\n",
    )
    gateway = GATEWAY.replace("plans:\n", "plans:\n" + plans) + routes + "shared_limits:\n"
    gateway += "  - { name: trials, count: requests, limit: 9, window: 1s, when: { plan: trial } }\n"
    gateway += "  - { name: pros, count: requests, limit: 9, window: 1s, when: { plan: [pro] } }\n"
    policies = PolicySet.compile(
        loaded(
            """
  - { name: posts, count: requests, limit: 9, window: 1s, when: { method: post } }
  - { name: gets, count: requests, limit: 9, window: 1s, when: { method: [get, head] } }
  - { name: big, count: requests, limit: 9, window: 1s, when: { model: ["gpt-4*", "o*"] } }
  - { name: streams, count: requests, limit: 9, window: 1s, when: { stream: true } }
  - { name: beta, count: requests, limit: 9, window: 1s, when: { header: [X-Beta, x-user] } }
  - { name: chat, count: requests, limit: 9, window: 1s, when: { route: /v1/chat/*, model: "*" } }
""",
            "",
            gateway,
        )
    )
    found, pro = policies.plans["trial"], policies.plans["pro"]
    assert names(demands(pro, asking())) == ["posts", "chat", "pros"]
    assert names(demands(found, asking())) == ["posts", "chat", "trials"]
    for model in ("gpt-4o", "o3-mini"):
        wanted = demands(found, asking(peek=Peek(9, model, True)))
        assert names(wanted) == ["posts", "big", "streams", "chat", "trials"]
    sent = facts(headers=(("x-user", ""), ("x-beta", "1")))
    assert names(demands(found, asking(seen=sent, peek=Peek(9, "GPT-4o")))) == ["posts", "beta", "chat", "trials"]
    read = asking(seen=facts(method="GET"), route=EVERYTHING)
    assert names(demands(found, read)) == ["gets", "chat", "trials"]
    read = asking(seen=facts("/v1/models", "GET"), route=EVERYTHING)
    assert names(demands(found, read)) == ["gets", "trials"]


@pytest.mark.parametrize(
    "written",
    [
        "/v1/embeddings",
        "/v1/Embeddings",
        "/v1//embeddings",
        "/v1/embeddings/",
        "/v1/%65mbeddings",
        "/v1/%2565mbeddings",
        "/v1/x/../embeddings",
        "/v1/embeddings;a=b",
        "/v1/embeddings?a=b",
        "/v1/embeddings?next=/../../../a%0a",
        "/v1/embeddings%3Fa=b",
    ],
)
def test_no_way_of_writing_a_path_escapes_a_limit_on_a_part_of_a_route(written: str) -> None:
    found = one(
        "count: requests, limit: 9, window: 1m, when: { route: /v1/embeddings }", "", GATEWAY.replace(PATH, "/v1/*")
    )
    request = Facts("req_1", "POST", written, written.encode(), (), client_ip="192.0.2.7", peer_ip="192.0.2.7")
    assert names(demands(found, asking(seen=request, route=EVERYTHING))) == ["it"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("count: requests, limit: 1, window: 1s", False),
        ("count: concurrent, limit: 1", False),
        ("count: sessions, limit: 1, window: 1s", False),
        ("count: tokens, limit: 1, window: 1s", True),
        ("count: input_tokens, limit: 1, window: 1s, shadow: true", True),
        ("count: output_tokens, limit: 1, window: 1s", True),
        ("count: tokens, limit: 1, window: 1s, when: { route: /elsewhere }", False),
        ("count: tokens, limit: 1, window: 1s, when: { method: GET }", False),
        ("count: requests, limit: 1, window: 1s, per: [user, model]", True),
        ("count: requests, limit: 1, window: 1s, when: { model: gpt-4 }", True),
        ("count: requests, limit: 1, window: 1s, when: { model: [gpt-4, '*'] }", False),
        ("count: requests, limit: 1, window: 1s, when: { stream: false }", True),
        ("count: requests, limit: 1, window: 1s, when: { header: x-a, route: /v1/* }", False),
    ],
)
def test_the_body_is_read_where_a_limit_depends_on_what_it_says(text: str, read: bool) -> None:
    elsewhere = "  - { path: /elsewhere, upstream: router, usage: openai_chat }\n"
    assert needs_peek(one(text, "", GATEWAY + elsewhere), CHAT) is read


def test_a_shared_limit_may_need_the_body_of_a_plan_that_has_no_limits() -> None:
    assert needs_peek(policy(gateway=sharing("name: it, count: requests, limit: 1, window: 1s, per: model")), CHAT)
    assert not needs_peek(policy(), CHAT)


def test_claims_and_fields_that_limits_look_at_are_known_beforehand() -> None:
    settings = loaded(
        """
  - { name: a, count: requests, limit: 1, window: 1s, per: [user, "claim:team"] }
  - { name: b, count: requests, limit: 1, window: 1s, per: ["header:X-Tenant", "claim:https://x.example/dept"] }
  - { name: c, count: requests, limit: 1, window: 1s, when: { header: [x-beta] } }
""",
        "",
        sharing("name: d, count: requests, limit: 1, window: 1s, when: { header: X-Batch }"),
    )
    assert claims_needed(settings) == {"team", "https://x.example/dept"}
    assert headers_needed(settings) == {"x-tenant", "x-beta", "x-batch"}
    assert claims_needed(loaded()) == headers_needed(loaded()) == frozenset()


# Overrides


def test_an_org_can_have_other_values_than_its_policy() -> None:
    found = policy(
        """
  - { name: rpm, count: requests, limit: 600, window: 1m }
  - { name: rate, count: requests, limit: 10, algorithm: gcra, window: 1s, burst: 50, per: user }
  - { name: money, count: credits, limit: 5, window: 24h }
  - { name: tpm, count: tokens, limit: 100, window: 1m }
""",
        "price: { per_request: 1 }",
        sharing("name: all, count: requests, limit: 900, window: 1s"),
    )
    plain = demands(found, asking(peek=Peek(0)))
    changed = {"rate": 20, "money": 9, "tpm": 300, "all": 5, "unheard-of": 5}
    wanted = demands(found, asking(peek=Peek(0), overrides=changed))
    assert [(each.limit.limit, each.limit.burst) for each in plain] == [
        (600, 0),
        (10, 50),
        (5_000_000, 0),
        (100, 0),
        (900, 0),
    ]
    assert [(each.limit.limit, each.limit.burst) for each in wanted] == [
        (600, 0),
        (20, 50),
        (9_000_000, 0),
        (300, 0),
        (900, 0),
    ]
    assert [each.subject for each in wanted] == [each.subject for each in plain]
    assert (plain[3].cost, wanted[3].cost) == (100, 300)
    again = demands(found, asking(peek=Peek(0), overrides=dict(changed)))
    assert all(ours.limit is theirs.limit for ours, theirs in zip(wanted, again, strict=True))
    assert message_demands(found, asking(overrides={"rpm": 7}))[0].limit.limit == 7


def test_any_number_of_different_values_takes_bounded_memory() -> None:
    found = one("count: requests, limit: 600, window: 1m")
    for value in range(1, 3 * OVERRIDDEN_MAX):
        (wanted,) = demands(found, asking(overrides={"it": value}))
        assert wanted.limit.limit == value
    assert len(found.rules[0]._overridden) <= OVERRIDDEN_MAX


# Tokens


def test_token_limits_are_left_out_where_the_format_is_not_read() -> None:
    assert names(demands(policy(EVERY_SCOPE), asking())) == ["rpm", "user-rpm", "key-rpm", "parallel"]


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
    wanted = demands(policy(EVERY_SCOPE, "tokens: { default_output: 300 }"), asking(peek=peek))
    assert {each.cost for each in wanted if each.limit.unit == "tokens"} == {tokens}


def test_input_and_output_are_reserved_apart() -> None:
    found = policy(
        """
  - { name: both, count: tokens, limit: 10000, window: 1m }
  - { name: in, count: input_tokens, limit: 10000, window: 1m }
  - { name: out, count: output_tokens, limit: 10000, window: 1m }
"""
    )
    assert [each.cost for each in demands(found, asking(peek=Peek(41, max_output_tokens=7)))] == [18, 11, 7]
    assert [each.cost for each in demands(found, asking(peek=Peek(0, max_output_tokens=0)))] == [1, 1, 1]


def test_only_limits_that_would_refuse_the_request_cut_what_is_reserved_for_it() -> None:
    peek = Peek(400, "small")
    shadow = limit(unit="tokens", most=50, shadow=True)
    assert token_estimate(peek, 1_024, [shadow, limit(unit="input_tokens", most=1)])["output_tokens"] == 1_024
    assert token_estimate(peek, 1_024, [limit(unit="tokens", most=150)])["output_tokens"] == 50
    assert token_estimate(peek, 1_024, [limit(unit="output_tokens", most=150)])["output_tokens"] == 150
    assert token_estimate(peek, 1_024, [limit("it", "gcra", "tokens", most=9_000, burst=150)])["output_tokens"] == 50
    found = policy(
        """
  - { name: tight, count: tokens, limit: 150, window: 1m, when: { model: large } }
  - { name: wide, count: tokens, limit: 9000, window: 1m }
"""
    )
    assert [each.cost for each in demands(found, asking(peek=peek))] == [100 + 1_024]
    assert [each.cost for each in demands(found, asking(peek=Peek(400, "large")))] == [150, 150]


@st.composite
def token_limits(draw: st.DrawFn) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 4))):
        text: dict[str, Any] = {
            "name": f"l{number}",
            "count": draw(st.sampled_from(("tokens", "input_tokens", "output_tokens"))),
            "limit": draw(st.integers(1, 3_000)),
            "window": "1m",
            "shadow": draw(st.booleans()),
        }
        if draw(st.booleans()):
            text |= {"algorithm": "gcra", "burst": draw(st.integers(1, 3_000))}
        if draw(st.booleans()):
            text["when"] = {"model": "large"}
        found.append(text)
    return found


@given(
    token_limits(),
    st.integers(0, 9_000),
    st.integers(1, 10_000),
    st.sampled_from(("large", "small", None)),
    st.dictionaries(st.sampled_from(("l0", "l1", "l2", "l3")), st.integers(1, 3_000)),
)
def test_a_client_that_names_no_maximum_is_refused_only_for_an_input_that_is_itself_too_large(
    limits: list[dict[str, Any]], body_bytes: int, default: int, model: str | None, overrides: dict[str, int]
) -> None:
    found = policy(" " + json.dumps(limits), f"tokens: {{ default_output: {default} }}")
    wanted = demands(found, asking(peek=Peek(body_bytes, model), overrides=overrides))
    input_tokens = -(-body_bytes // 4)
    least = {"tokens": input_tokens + 1, "input_tokens": max(1, input_tokens), "output_tokens": 1}
    capacities = [
        (text["count"], text.get("burst") or overrides.get(text["name"], text["limit"]))
        for text in limits
        if not text["shadow"] and (model == "large" or "when" not in text)
    ]
    assert (never_fits(wanted) is not None) == any(least[count] > capacity for count, capacity in capacities)
    assert all(each.cost >= 1 for each in wanted)


def test_a_request_larger_than_its_limit_is_told_that_waiting_does_not_help() -> None:
    wanted = demands(policy(EVERY_SCOPE), asking(peek=Peek(0, max_output_tokens=2_000), session_id="ses_1"))
    too_large = never_fits(wanted)
    assert too_large is not None
    refusal = request_exceeds_limit(too_large)
    assert (refusal.status, refusal.code, refusal.should_retry) == (400, "request_exceeds_limit", False)
    assert refusal.retry_after_ms is None
    assert refusal.details == {"limit": "tpm", "scope": "org", "requested": 2_000, "allowed": 1_000}
    assert "tpm" in refusal.message and "fewer output tokens" in refusal.message


def test_a_price_above_a_limit_on_credits_is_told_in_credits() -> None:
    found = one("count: credits, limit: 2, window: 1h", "price: { per_request: 1234567, per_message: 1 }", COUNTED)
    too_dear = never_fits(demands(found, asking()))
    assert too_dear is not None
    refusal = request_exceeds_limit(too_dear)
    assert refusal.details == {"limit": "it", "scope": "org", "requested": 1_234_567, "allowed": 2}
    assert "1234567 credits" in refusal.message and "tokens" not in refusal.message


def test_a_shadow_limit_refuses_nobody() -> None:
    large = asking(peek=Peek(0, max_output_tokens=2_000))
    assert never_fits(demands(one("count: tokens, limit: 9, window: 1m, shadow: true"), large)) is None
    assert never_fits(demands(one("count: tokens, limit: 9, window: 1m"), large)) is not None


def test_what_fits_at_once_is_the_burst_where_there_is_one() -> None:
    found = one("count: tokens, limit: 10, algorithm: gcra, window: 1s, burst: 500")
    assert never_fits(demands(found, asking(peek=Peek(0, max_output_tokens=500)))) is None
    assert never_fits(demands(found, asking(peek=Peek(0, max_output_tokens=501)))) is not None

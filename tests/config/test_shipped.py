"""The files we ship: gateway.yaml, policies/, and their documentation cannot drift from the models."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from gateway.config import (
    REFUSED_PATHS_NOTE,
    ApiKeySource,
    Credits,
    JwtKey,
    JwtSource,
    Limit,
    LimitsRules,
    Listen,
    Log,
    Plan,
    Policy,
    Price,
    Route,
    Sessions,
    Settings,
    SharedLimit,
    Stores,
    Timeouts,
    Tokens,
    TrustedHeaderSource,
    Unauthenticated,
    Upstream,
    WebSocket,
    When,
    effective,
    json_schema,
    load,
    load_text,
)

ROOT = Path(__file__).parents[2]
GATEWAY_YAML = ROOT / "gateway.yaml"
SECTIONS: list[type[BaseModel]] = [
    *(ApiKeySource, Credits, JwtKey, JwtSource, Listen, Log, Plan, Route, Sessions, Settings, Stores, Timeouts),
    *(TrustedHeaderSource, Upstream, WebSocket, LimitsRules, Unauthenticated),
]


def aliases(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def test_gateway_yaml_needs_nothing_from_the_environment_and_says_the_defaults() -> None:
    loaded = load(GATEWAY_YAML, {})
    assert loaded.stores == Stores()
    assert loaded.upstreams == {"ai_router": Upstream.model_validate({"targets": ["demo"]})}
    assert loaded.identity == (ApiKeySource(),)
    for written, default in [
        (loaded.listen, Listen()),
        (loaded.sessions, Sessions()),
        (loaded.credits, Credits()),
        (loaded.limits, LimitsRules()),
        (loaded.unauthenticated, Unauthenticated()),
        (loaded.shared_limits, ()),
        (loaded.log, Log()),
    ]:
        assert written == default
    assert sorted(loaded.plans) == sorted(loaded.policies) == ["enterprise", "pro", "trial"]
    assert loaded.plans["trial"].credits == 100


@pytest.mark.parametrize("model", SECTIONS, ids=lambda model: model.__name__)
def test_gateway_yaml_shows_every_key(model: type[BaseModel]) -> None:
    text = GATEWAY_YAML.read_text()
    assert [key for key in aliases(model) if not re.search(rf"\b{key}:", text)] == []


def test_the_commented_identity_examples_work() -> None:
    text = GATEWAY_YAML.read_text()
    uncommented = re.sub(r"(?m)^  # (- (?:jwt|trusted_header):| {4})", r"  \1", text)
    policies = {file.name: file.read_text() for file in (ROOT / "policies").glob("*.yaml")}
    loaded = load_text(uncommented, policies)
    assert [type(source) for source in loaded.identity] == [ApiKeySource, JwtSource, TrustedHeaderSource]


def test_the_commented_shared_limits_work() -> None:
    text = GATEWAY_YAML.read_text()
    start, end = text.index("shared_limits: []"), text.index("\nlimits:")
    uncommented = re.sub(r"(?m)^  # ", "  ", text[start:end]).replace("shared_limits: []", "shared_limits:")
    policies = {file.name: file.read_text() for file in (ROOT / "policies").glob("*.yaml")}
    loaded = load_text(text[:start] + uncommented + text[end:], policies)
    assert [limit.name for limit in loaded.shared_limits] == ["router", "trials"]


def test_stores_and_router_come_from_the_environment() -> None:
    environ = {
        "REDIS_URL": "redis://cache:6379/0",
        "DATABASE_URL": "postgres://db/app",
        "AI_ROUTER_URL": "http://router:3000",
        "AI_CREDITS_TRIAL": "5",
    }
    loaded = load(GATEWAY_YAML, environ)
    assert (loaded.stores.redis, loaded.stores.postgres) == ("redis://cache:6379/0", "postgres://db/app")
    assert loaded.upstreams["ai_router"].targets == ("http://router:3000",)
    assert loaded.plans["trial"].credits == 5


def test_the_policy_readme_explains_every_key_with_an_example_that_loads() -> None:
    readme = (ROOT / "policies" / "README.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    gateway = (Path(__file__).parents[1] / "policies" / "good_smallest.yaml").read_text()
    gateway += "  - { path: /realtime, upstream: router, websocket: { count_messages: true } }\n"
    gateway = gateway.replace("policy: trial", "policy: pro")
    for number, example in enumerate(examples):
        if example.startswith("shared_limits:"):
            assert load_text(gateway + example, {"pro.yaml": "policy: pro"}).shared_limits
        else:
            load_text(gateway, {f"example{number}.yaml": example})
    written = "".join(examples)
    assert "shared_limits:" in written
    for model in (Policy, Limit, When, Price, Tokens):
        assert [key for key in aliases(model) if f"`{key}" not in readme or f"{key}:" not in written] == []


def test_the_effective_policy_has_a_row_per_route_and_plan() -> None:
    loaded = load(GATEWAY_YAML, {})
    rows = effective(loaded)
    assert [(row.route, row.plan) for row in rows] == [(r.name, plan) for r in loaded.routes for plan in loaded.plans]
    chat, trpc = rows[0], next(row for row in rows if row.path == "/trpc/*")
    assert [str(limit) for limit in chat.limits] == [
        "burst: 30 requests in 5s per org",
        "rpm: 120 requests in 1m per org",
        "tpm: 20000 tokens in 1m per org",
        "parallel: 2 concurrent per org",
    ]
    assert (chat.methods, chat.upstream, chat.dialect, chat.price, chat.credits) == (
        ("POST",),
        "ai_router",
        "openai",
        1,
        100,
    )
    assert [limit.applies for limit in trpc.limits] == [True, True, False, True]
    assert "no usage reader" in str(trpc.limits[2])
    assert "404" in REFUSED_PATHS_NOTE


def test_the_json_schema_knows_every_key_and_speaks_yaml() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(aliases(Settings))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["policies"]["type"] == "string"
    assert schema["$defs"]["Timeouts"]["properties"]["connect"]["default"] == "2s"
    assert schema["$defs"]["Route"]["properties"]["body_bytes_max"]["default"] == "10MiB"
    assert {"from", "org"} <= set(schema["$defs"]["TrustedHeaderSource"]["required"])
    kinds = [arm["required"] for arm in schema["properties"]["identity"]["items"]["oneOf"]]
    assert kinds == [["api_key"], ["jwt"], ["trusted_header"]]
    policy = json_schema("policy")
    assert set(policy["properties"]) == set(aliases(Policy))
    limit = policy["$defs"]["Limit"]["properties"]
    assert set(limit) == set(aliases(Limit))
    assert "default" not in limit["anchor"]
    assert set(policy["$defs"]["When"]["properties"]) == set(aliases(When))
    assert set(schema["$defs"]["SharedLimit"]["properties"]) == set(aliases(SharedLimit))
    per, shared_per = limit["per"]["anyOf"][0]["pattern"], schema["$defs"]["SharedLimit"]["properties"]["per"]
    assert re.search(per, "claim:team") and re.search(per, "${PER}") and not re.search(per, "upstream")
    assert re.search(shared_per["anyOf"][1]["items"]["pattern"], "upstream")
    assert schema["$defs"]["LimitsRules"]["properties"]["deny_cache"]["default"] == "1s"

"""`gateway check`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from tests.cli.conftest import CommandLine


def test_check_shows_what_each_plan_meets_on_each_route(gateway: CommandLine) -> None:
    said = gateway.do("check")
    assert "POST /v1/chat/completions → router" in said.out
    assert "/files/* → router" in said.out
    assert said.out.count("rpm: 20 requests in 1m per org") == 4
    assert said.out.count("tpm: 20000 tokens in 1m per org (not here") == 2
    assert "404 unknown_route" in said.out


def test_check_speaks_json(gateway: CommandLine) -> None:
    answer = gateway.do("check", "--json").json()
    assert answer["ok"] is True
    assert [(row["route"], row["plan"], row["price"]) for row in answer["rows"]] == [
        ("POST /v1/chat/completions", "trial", 2),
        ("POST /v1/chat/completions", "pro", 2),
        ("/files/*", "trial", 2),
        ("/files/*", "pro", 2),
    ]


PLANS = """\
  trial: { credits: 100, policy: trial }
  nothing: { credits: 0, policy: trial, grant: none }
  team: { credits: 50, policy: trial, grant: reset, zone: Europe/Berlin, anchor: "15 06:00" }
  tank: { credits: 9, policy: trial, grant: top_up, period: hour }
  more: { credits: 7, policy: trial, grant: add, period: week, anchor: created }
"""


def test_check_shows_what_each_plan_brings_and_when(gateway: CommandLine) -> None:
    gateway.configure("  trial: { credits: 100, policy: trial }\n", PLANS)
    said = gateway.do("check")
    for line in (
        "100 once, to a new org",
        "nothing",
        "50 in place of what is left, each month from the 15th 06:00 Europe/Berlin",
        "what is missing to 9, each hour from :00 UTC",
        "7 on top, each week from its creation, UTC",
    ):
        assert line in said.out
    told = {one["plan"]: one for one in gateway.do("check", "--json").json()["plans"]}
    assert told["trial"]["period"] is None and told["more"]["anchor_minutes"] is None
    assert told["team"] == {
        "plan": "team",
        "credits": 50,
        "grant": "reset",
        "period": "month",
        "zone": "Europe/Berlin",
        "anchor_minutes": 14 * 1440 + 360,
    }


def test_check_names_every_mistake_at_once(gateway: CommandLine) -> None:
    gateway.configure("upstream: router, dialect", "upstream: ruter, dialect")
    gateway.configure("credits: 100,", "credits: -1,")
    said = gateway("check")
    assert said.exit_code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert any("did you mean 'router'?" in line for line in lines)
    assert all(line.startswith(f"{gateway.config}:") for line in lines)


def test_check_speaks_json_of_mistakes_too(gateway: CommandLine) -> None:
    gateway.configure("credits: 100,", "credits: -1,")
    said = gateway("check", "--json")
    assert said.exit_code == 2
    assert said.json() == {"ok": False, "problems": said.err.splitlines()}


@pytest.mark.parametrize(("option", "key"), [("--schema", "upstreams"), ("--policy-schema", "limits")])
def test_a_schema_needs_no_configuration(gateway: CommandLine, option: str, key: str) -> None:
    gateway.config.unlink()
    schema = gateway.do("check", option).json()
    assert schema["$schema"].endswith("2020-12/schema")
    assert key in schema["properties"]


def test_two_schemas_at_once_are_refused(gateway: CommandLine) -> None:
    assert gateway("check", "--schema", "--policy-schema").exit_code == 2


def test_a_missing_file_is_a_configuration_error(gateway: CommandLine) -> None:
    gateway.config.unlink()
    said = gateway("check")
    assert (said.exit_code, said.err) == (2, f"{gateway.config}:1: no such file\n")


def test_the_file_may_be_named_by_the_environment(gateway: CommandLine, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check"], env={"GATEWAY_CONFIG": str(gateway.config)})
    assert result.exit_code == 0
    assert f"{gateway.config} is valid" in result.stderr


SHARED = """\
shared_limits:
  - { name: everybody, count: requests, limit: 9, algorithm: gcra, window: 1s, burst: 3, shadow: true }
  - { name: addresses, count: requests, limit: 9, window: 1s, per: [upstream, client_ip], cardinality: 50 }
"""


def with_limits(gateway: CommandLine, *limits: str) -> None:
    written = "".join(f"  - {{ {limit} }}\n" for limit in limits)
    (gateway.directory / "policies" / "trial.yaml").write_text(f"policy: trial\nlimits:\n{written}")
    gateway.config.write_text(gateway.config.read_text() + SHARED)


def test_check_shows_what_is_shared_and_only_what_a_route_can_meet(gateway: CommandLine) -> None:
    with_limits(gateway, "name: files, count: requests, limit: 5, window: 1m, per: route, when: { route: /files/* }")
    said = gateway.do("check").out
    assert said.count("files: 5 requests in 1m per route, when route /files/*") == 2
    assert said.count("everybody: 9 requests per 1s, burst 3, for everybody together (shared by all orgs; shadow") == 4


def test_check_prints_how_much_memory_counters_can_take(gateway: CommandLine) -> None:
    with_limits(
        gateway,
        "name: rpm, count: requests, limit: 5, window: 1m",
        "name: each-route, count: requests, limit: 5, window: 1m, per: route",
        "name: users, count: tokens, limit: 500, window: 1m, per: [route, user], cardinality: 100",
    )
    memory = gateway.do("check", "--json").json()["memory"]
    counted = {one["limit"]: one["counters_max"] for one in memory["policies"]["trial"]["limits"]}
    # Tokens are only counted on the one route that reads them, and slots take in what a route is.
    assert counted == {"rpm": 1, "each-route": 2, "users": 100}
    assert {one["limit"]: one["counters_max"] for one in memory["shared_limits"]["limits"]} == {
        "everybody": 1,
        "addresses": 50,
    }
    for part in (memory["policies"]["trial"], memory["shared_limits"]):
        each = [one["counters_max"] * one["counter_bytes_max"] for one in part["limits"]]
        assert part["bytes_max"] == sum(each) > 0
    said = gateway.do("check").out
    assert "users: 100 of" in said
    assert "shared_limits" in said


def test_a_policy_without_limits_takes_no_memory(gateway: CommandLine) -> None:
    (gateway.directory / "policies" / "trial.yaml").write_text("policy: trial\n")
    answer = gateway.do("check", "--json").json()
    assert answer["memory"] == {
        "policies": {"trial": {"bytes_max": 0, "limits": []}},
        "shared_limits": {"bytes_max": 0, "limits": []},
    }
    assert "none" in gateway.do("check").out


def test_the_json_of_a_limit_says_everything_that_it_is(gateway: CommandLine) -> None:
    with_limits(
        gateway,
        "name: q, count: requests, limit: 5, algorithm: calendar, period: month, anchor: 2, warn_at: 0.5,"
        " per: [user, model], when: { method: POST, stream: true }",
    )
    (limit, everybody, _) = gateway.do("check", "--json").json()["rows"][0]["limits"]
    assert limit == {
        "name": "q",
        "count": "requests",
        "limit": 5,
        "algorithm": "calendar",
        "window_ms": None,
        "burst": None,
        "period": "month",
        "zone": "UTC",
        "anchor_minutes": 1440,
        "per": ["user", "model"],
        "when": {"method": ["POST"], "stream": True},
        "shadow": False,
        "warn_at": 0.5,
        "shared": False,
        "applies": True,
    }
    assert (everybody["burst"], everybody["shadow"], everybody["shared"], everybody["zone"]) == (3, True, True, None)

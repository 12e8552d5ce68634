"""`gateway limits show`."""

import json
from typing import Any

import pytest
import redis

from tests.cli.conftest import CommandLine
from tests.cli.using import use

LIMITS = """\
policy: trial
limits:
  - { name: rpm, count: requests, limit: 20, window: 1h }
  - { name: user-rpm, count: requests, limit: 5, window: 1h, per: user }
  - { name: tokens, count: tokens, algorithm: calendar, period: month, limit: 20000 }
  - { name: rps, count: requests, algorithm: gcra, limit: 1, window: 1h, burst: 30, per: client_ip }
  - { name: files, count: requests, limit: 7, window: 1h, per: route, when: { route: "/files/*" } }
  - { name: gpt, count: requests, limit: 3, window: 1h, when: { model: "gpt-*" } }
  - { name: talks, count: sessions, limit: 4, window: 1h }
  - { name: parallel, count: concurrent, limit: 2, shadow: true }
"""


@pytest.fixture
def busy(acme: CommandLine) -> CommandLine:
    """Org acme with limits of every kind."""
    (acme.directory / "policies" / "trial.yaml").write_text(LIMITS)
    acme.configure("routes:\n", "shared_limits: [{ name: all, count: requests, limit: 99, window: 1h }]\nroutes:\n")
    return acme


def shown(gateway: CommandLine, *args: str) -> dict[str, dict[str, Any]]:
    said = gateway.do("limits", "show", "acme", *args, "--json").json()
    return {limit["name"]: limit for limit in said["limits"]}


def test_what_is_used_and_what_remains_of_every_limit_is_shown(busy: CommandLine) -> None:
    use(busy, 3, user="ann")
    found = shown(busy)
    assert (found["rpm"]["used"], found["rpm"]["limit"], found["rpm"]["remaining"]) == (3, 20, 17)
    assert (found["tokens"]["used"], found["all"]["used"], found["parallel"]["used"]) == (3 * 100, 3, 0)
    assert found["rpm"]["fits_in_ms"] == 0
    assert 0 < found["rpm"]["resets_in_ms"] <= 3_600_000 and found["parallel"]["resets_in_ms"] is None
    assert (found["all"]["shared"], found["parallel"]["shadow"]) == (True, True)


def test_a_limit_that_is_used_up_says_when_it_fits_again(busy: CommandLine) -> None:
    use(busy, 5, user="ann")
    full = shown(busy, "--user", "ann")["user-rpm"]
    assert (full["used"], full["remaining"]) == (5, 0)
    assert 3_500_000 < full["fits_in_ms"] <= 3_600_000
    assert shown(busy, "--user", "bob")["user-rpm"]["used"] == 0
    assert "in 5" in busy.do("limits", "show", "acme", "--user", "ann").out


def test_looking_takes_nothing(busy: CommandLine) -> None:
    use(busy, 4, user="ann")
    with redis.Redis.from_url(busy.env["REDIS_URL"]) as server:
        before = {key: server.dump(key) for key in server.scan_iter()}
        for _ in range(3):
            shown(busy, "--user", "ann", "--client-ip", "192.0.2.1", "--all")
        assert {key: server.dump(key) for key in server.scan_iter()} == before


def test_a_limit_per_something_asks_of_what(busy: CommandLine) -> None:
    use(busy, 2, user="ann", client_ip="192.0.2.7")
    found = shown(busy)
    assert found["user-rpm"]["used"] is None and found["user-rpm"]["not_shown"] == "per user: say --user"
    assert "say --client-ip" in found["rps"]["not_shown"]
    assert "say --route" in found["files"]["not_shown"]
    assert shown(busy, "--client-ip", "192.0.2.7")["rps"]["used"] == 2


def test_conditions_that_the_options_decide_are_judged_and_others_told(busy: CommandLine) -> None:
    use(busy, 1, path="/files/*")
    found = shown(busy, "--route", "/files/*")
    assert (found["files"]["used"], found["files"]["per"]) == (1, {"route": "/files/*"})
    elsewhere = shown(busy, "--route", "POST /v1/chat/completions")["files"]
    assert elsewhere["used"] is None and elsewhere["not_shown"].startswith("only on /files/*, and the path is")
    assert shown(busy)["gpt"]["when"] == "for models gpt-*"
    assert "its model is demo" in shown(busy, "--model", "demo")["gpt"]["not_shown"]
    assert shown(busy, "--model", "gpt-4")["gpt"]["used"] == 0


def test_an_override_is_in_force_and_said(busy: CommandLine) -> None:
    busy.do("limits", "set", "acme", "rpm", "4")
    use(busy, 3)
    rpm = shown(busy)["rpm"]
    assert (rpm["limit"], rpm["remaining"], rpm["overridden"]) == (4, 1, True)
    assert "override, the policy says 20" in busy.do("limits", "show", "acme").out


def test_all_counts_the_live_counters_and_names_the_fullest(busy: CommandLine) -> None:
    for count, user in ((1, "ann"), (4, "bob"), (2, "eve")):
        use(busy, count, user=user)
    use(busy, 1, org="acme-2", user="ann")
    said = busy.do("limits", "show", "acme", "--all", "--json").json()
    live = {limit["name"]: limit["live"] for limit in said["limits"]}
    assert said["all_keys_seen"] is True
    assert live["user-rpm"]["counters"] == 3
    assert [one["used"] for one in live["user-rpm"]["fullest"]] == [4, 2, 1]
    assert (live["rpm"]["counters"], live["all"]["fullest"][0]["used"], live["talks"]["counters"]) == (1, 8, 0)
    assert "4 of 5" in busy.do("limits", "show", "acme", "--all").out


def test_an_org_that_tokens_name_is_shown_under_a_plan_that_is_said(busy: CommandLine) -> None:
    said = busy("limits", "show", "nobody")
    assert (said.exit_code, said.out) == (2, "") and "--plan" in said.err
    found = busy.do("limits", "show", "nobody", "--plan", "pro", "--json").json()
    assert (found["plan"], found["policy"], found["limits"][0]["used"]) == ("pro", "trial", 0)


def test_a_slip_is_answered_with_a_guess(busy: CommandLine) -> None:
    assert "did you mean 'pro'?" in busy("limits", "show", "acme", "--plan", "prp").err
    assert (
        "unknown route '/file/*', did you mean '/files/*'?" in busy("limits", "show", "acme", "--route", "/file/*").err
    )
    assert busy("limits", "show", "a b").exit_code == 2


def test_a_redis_that_is_away_is_said(busy: CommandLine) -> None:
    busy.env["REDIS_URL"] = "redis://127.0.0.1:1/0"
    said = busy("limits", "show", "acme")
    assert (said.exit_code, said.out) == (1, "")
    assert "127.0.0.1:1" in said.err


def test_the_json_is_whole_json(busy: CommandLine) -> None:
    assert json.loads(busy.do("limits", "show", "acme", "--json").out)["org"] == "acme"

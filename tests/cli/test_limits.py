"""`gateway limits`."""

import asyncio

import pytest

from gateway.overrides import CHANNEL, Overrides
from gateway.stores import Postgres
from tests.cli.conftest import CommandLine
from tests.waiting import until

SPEND_YAML = """\
policy: spend
limits:
  - { name: daily, count: credits, limit: 50, window: 1d }
  - { name: parallel, count: concurrent, limit: 5 }
price: { per_request: 1 }
"""


@pytest.fixture
def two_policies(acme: CommandLine) -> CommandLine:
    """Plan `money` has a policy of its own."""
    (acme.directory / "policies" / "spend.yaml").write_text(SPEND_YAML)
    acme.configure("plans:\n", "plans:\n  money: { credits: 1, policy: spend }\n")
    return acme


def listed(gateway: CommandLine, *args: str) -> list[tuple[str, str, int]]:
    rows = gateway.do("limits", "list", *args, "--json").json()
    return [(row["org_id"], row["limit_name"], row["value"]) for row in rows]


def test_an_override_is_set_changed_and_taken_away(acme: CommandLine) -> None:
    said = acme.do("limits", "set", "acme", "rpm", "1200", "--note", "until friday")
    assert (said.out, said.err) == ("acme has rpm = 1200\n", "")
    assert acme.do("limits", "set", "acme", "rpm", "900").out == "acme has rpm = 900, before 1200\n"
    assert listed(acme, "acme") == [("acme", "rpm", 900)]
    assert acme.do("limits", "unset", "acme", "rpm").out == "acme no longer has rpm = 900: the policy's 20 again\n"
    assert listed(acme) == []
    assert "limits are those of the policies" in acme.do("limits", "list", "acme").err


def test_programs_get_all_of_it_as_json(acme: CommandLine) -> None:
    acme.do("limits", "set", "acme", "rpm", "7")
    done = acme.do("limits", "set", "acme", "rpm", "9", "--note", "ticket 12", "--json").json()
    assert {key: done[key] for key in ("org_id", "limit_name", "value", "was", "note", "plan")} == {
        "org_id": "acme", "limit_name": "rpm", "value": 9, "was": 7, "note": "ticket 12", "plan": "trial",
    }  # fmt: skip
    row = acme.do("limits", "list", "--json").json()[0]
    assert (row["policy_value"], row["set_at"]) == (20, done["set_at"])
    assert acme.do("limits", "unset", "acme", "rpm", "--json").json()["value"] == 9


def test_a_change_takes_effect_in_a_gateway_that_runs(acme: CommandLine) -> None:
    async def change_while_running() -> None:
        postgres = Postgres(acme.env["DATABASE_URL"], timeout_ms=5_000, pool_max=1)
        await postgres.open()
        overrides = Overrides(postgres, entries_max=10)
        postgres.listen({CHANNEL: overrides.on_notification}, overrides.refresh_all)
        running = asyncio.create_task(overrides.run())
        try:
            await until(lambda: overrides.known)
            await asyncio.to_thread(acme.do, "limits", "set", "acme", "rpm", "1200")
            await until(lambda: overrides.of("acme") == {"rpm": 1200})
            await asyncio.to_thread(acme.do, "limits", "unset", "acme", "rpm")
            await until(lambda: overrides.of("acme") == {})
        finally:
            running.cancel()
            await asyncio.wait({running})
            await postgres.close()

    asyncio.run(change_while_running())


def test_an_unknown_limit_is_refused_with_a_guess(acme: CommandLine) -> None:
    said = acme("limits", "set", "acme", "rmp", "5")
    assert (said.exit_code, said.out) == (2, "")
    assert "unknown limit 'rmp', did you mean 'rpm'?" in said.err
    assert "(known: rpm, tpm)" in acme("limits", "set", "acme", "weekly", "5").err
    assert listed(acme) == []


def test_a_shared_limit_belongs_to_no_org(acme: CommandLine) -> None:
    acme.configure("routes:\n", "shared_limits: [{ name: all, count: requests, limit: 9, window: 1m }]\nroutes:\n")
    said = acme("limits", "set", "acme", "all", "5")
    assert said.exit_code == 2
    assert "share" in said.err


def test_only_values_that_the_policy_could_write_are_taken(two_policies: CommandLine) -> None:
    two_policies.do("orgs", "add", "rich", "--plan", "money")
    for limit, values in {
        "rpm": ("0", "-5", "1.5", "five", "", "1e3", "1000000000001"),
        "daily": ("0", "9000000001"),
    }.items():
        for value in values:
            said = two_policies("limits", "set", "rich", limit, "--", value)
            assert (said.exit_code, said.out) == (2, ""), value
    assert listed(two_policies) == []
    two_policies.do("limits", "set", "rich", "daily", "9000000000")
    assert listed(two_policies) == [("rich", "daily", 9_000_000_000)]


def test_a_limit_that_the_orgs_policy_lacks_is_set_with_a_warning(two_policies: CommandLine) -> None:
    said = two_policies.do("limits", "set", "acme", "daily", "5")
    assert said.err == "warning: policy trial of plan trial has no limit daily: nothing changes for acme yet\n"
    assert two_policies.do("limits", "list", "--json").json()[0]["policy_value"] is None


def test_an_org_of_tokens_may_have_overrides_and_a_slip_is_pointed_out(acme: CommandLine) -> None:
    said = acme.do("limits", "set", "acne", "rpm", "5")
    assert said.err.startswith("warning: there is no org acne here, did you mean 'acme'?")
    said = acme.do("limits", "set", "org_of_tokens", "rpm", "5")
    assert "if tokens or headers name it" in said.err
    assert listed(acme) == [("acne", "rpm", 5), ("org_of_tokens", "rpm", 5)]
    assert acme.do("limits", "unset", "acne", "rpm").out == "acne no longer has rpm = 5\n"


def test_an_org_whose_plan_is_gone_is_pointed_out(acme: CommandLine) -> None:
    acme.configure("  trial: { credits: 100, policy: trial }\n", "")
    assert "plan trial of acme is not in the configuration" in acme.do("limits", "set", "acme", "rpm", "5").err


def test_what_is_not_there_cannot_be_taken_away(acme: CommandLine) -> None:
    acme.do("limits", "set", "acme", "rpm", "5")
    said = acme("limits", "unset", "acme", "rmp")
    assert (said.exit_code, said.out) == (1, "")
    assert said.err == "error: org 'acme' has no override of 'rmp', did you mean 'rpm'?\n"
    assert acme("limits", "unset", "nobody", "rpm").exit_code == 1
    assert listed(acme) == [("acme", "rpm", 5)]


def test_an_override_of_a_limit_that_has_left_the_policies_can_be_taken_away(acme: CommandLine) -> None:
    acme.do("limits", "set", "acme", "rpm", "5")
    policy = acme.directory / "policies" / "trial.yaml"
    policy.write_text(policy.read_text().replace("name: rpm", "name: rph"))
    acme.do("limits", "unset", "acme", "rpm")
    assert listed(acme) == []


def test_overrides_are_listed_in_order_beside_what_the_policy_writes(acme: CommandLine) -> None:
    for org, limit in (("zeta", "rpm"), ("acme", "tpm"), ("acme", "rpm")):
        acme.do("limits", "set", org, limit, "5", "--note", f"[red]{org}[/nothing]")
    assert listed(acme) == [("acme", "rpm", 5), ("acme", "tpm", 5), ("zeta", "rpm", 5)]
    lines = acme.do("limits", "list").out.splitlines()
    assert lines[1].split()[:5] == ["acme", "rpm", "5", "20", "[red]acme[/nothing]"]
    assert lines[3].split()[:4] == ["zeta", "rpm", "5", "-"]
    assert "there may be more than these 2" in acme.do("limits", "list", "--limit", "2").err


def test_a_bad_org_limit_or_note_is_a_usage_error(acme: CommandLine) -> None:
    for args in (
        ("set", "a b", "rpm", "5"),
        ("set", "x" * 129, "rpm", "5"),
        ("set", "acme", "a\nb", "5"),
        ("set", "acme", "", "5"),
        ("set", "acme", "rpm", "5", "--note", "two\nlines"),
        ("set", "acme", "rpm", "5", "--note", "x" * 201),
        ("set", "acme", "rpm"),
        ("unset", "a b", "rpm"),
        ("unset", "acme", "a\nb"),
        ("list", "a b"),
    ):
        said = acme("limits", *args)
        assert (said.exit_code, said.out) == (2, ""), args
    assert listed(acme) == []


def test_a_database_without_the_table_is_explained(empty: CommandLine) -> None:
    said = empty("limits", "list")
    assert said.exit_code == 1
    assert "0002 limit_overrides" in said.err

"""`gateway orgs` and `gateway migrate`."""

import asyncio

from gateway.config import Plan
from gateway.ledger.grants import is_due, look, period
from gateway.stores import Postgres
from tests.cli.conftest import CommandLine

PERIODIC = """\
  trial: { credits: 100, policy: trial }
  nothing: { credits: 5, policy: trial, grant: none }
  team: { credits: 50, policy: trial, grant: reset, zone: Europe/Berlin, anchor: "15 06:00" }
  tank: { credits: 9, policy: trial, grant: top_up, period: hour }
  own: { credits: 7, policy: trial, grant: add, anchor: created }
"""


def test_migrate_says_what_it_did_and_may_be_repeated(empty: CommandLine) -> None:
    assert empty.do("migrate", "--json").json()["applied"] > 0
    assert empty.do("migrate", "--json").json() == {"applied": 0}
    assert "nothing to do" in empty.do("migrate").out


def test_a_database_without_the_schema_is_not_touched_but_explained(empty: CommandLine) -> None:
    for command in (("orgs", "list"), ("orgs", "add", "acme", "--plan", "trial"), ("credits", "balance", "acme")):
        said = empty(*command)
        assert (said.exit_code, said.out) == (1, "")
        assert "start the gateway once, or run `gateway migrate`" in said.err


def test_an_added_org_has_the_credits_of_its_plan(migrated: CommandLine) -> None:
    added = migrated.do("orgs", "add", "acme", "--plan", "pro", "--name", "Acme, Inc.", "--json").json()
    assert (added["org_id"], added["plan"], added["name"]) == ("acme", "pro", "Acme, Inc.")
    assert added["balance_ucredits"] == 10_000_000_000
    entries = migrated.do("credits", "ledger", "acme", "--json").json()
    assert [(entry["request_id"], entry["kind"]) for entry in entries] == [("grant:pro:initial", "grant")]


def test_an_added_org_has_what_its_plan_brings_in_this_period(migrated: CommandLine) -> None:
    migrated.configure("  trial: { credits: 100, policy: trial }\n", PERIODIC)
    for plan, ucredits, kinds in (
        ("nothing", 0, []),
        ("team", 50_000_000, ["grant"]),
        ("tank", 9_000_000, ["grant"]),
        ("own", 7_000_000, ["grant"]),
    ):
        assert migrated.do("orgs", "add", plan, "--plan", plan, "--json").json()["balance_ucredits"] == ucredits
        entries = migrated.do("credits", "ledger", plan, "--json").json()
        assert [entry["kind"] for entry in entries] == kinds
        assert all(entry["request_id"].startswith(f"grant:{plan}:20") for entry in entries)


async def test_an_org_whose_periods_begin_with_it_was_created_in_the_first(migrated: CommandLine) -> None:
    migrated.configure("  trial: { credits: 100, policy: trial }\n", PERIODIC)
    await asyncio.to_thread(migrated.do, "orgs", "add", "acme", "--plan", "own")
    postgres = Postgres(migrated.env["DATABASE_URL"], timeout_ms=5_000, pool_max=1)
    await postgres.open()
    try:
        facts = await look(postgres, "acme")
        own = Plan.model_validate({"credits": 7, "policy": "trial", "grant": "add", "anchor": "created"})
        assert facts.period is not None and facts.created_ms is not None
        assert 0 <= facts.created_ms - facts.period.starts_ms < 60_000
        # What the gateway works out for it is the same.
        assert period(own, facts) == facts.period
        assert not is_due("own", own, facts)
    finally:
        await postgres.close()


def test_an_org_is_added_once(acme: CommandLine) -> None:
    said = acme("orgs", "add", "acme", "--plan", "pro")
    assert (said.exit_code, said.err) == (1, "error: org 'acme' exists already, with plan 'trial'\n")
    assert acme.do("credits", "balance", "acme", "--json").json()["posted_ucredits"] == 100_000_000


def test_an_unknown_plan_is_refused_with_a_guess(migrated: CommandLine) -> None:
    said = migrated("orgs", "add", "acme", "--plan", "trail")
    assert (said.exit_code, said.err) == (2, "error: unknown plan 'trail', did you mean 'trial'?\n")
    assert migrated.do("orgs", "list", "--json").json() == []


def test_a_bad_org_id_is_a_usage_error(migrated: CommandLine) -> None:
    for org in ("", "a b", "a/b", "org\n", "ünï", "x" * 129, "{acme}", "a\x00"):
        said = migrated("orgs", "add", org, "--plan", "trial")
        assert said.exit_code == 2, org
        assert "is not an org id" in said.err
    for command in (
        ("orgs", "show", "a b"),
        ("keys", "add", "a b"),
        ("keys", "list", "a b"),
        ("credits", "ledger", "a b"),
    ):
        assert migrated(*command).exit_code == 2, command
    assert migrated.do("orgs", "list", "--json").json() == []


def test_a_bad_name_is_a_usage_error(migrated: CommandLine) -> None:
    for name in ("two\nlines", "\x1b[31mred", "x" * 201):
        assert migrated("orgs", "add", "acme", "--plan", "trial", "--name", name).exit_code == 2, name
    assert migrated.do("orgs", "list", "--json").json() == []


def test_orgs_are_listed_in_order_of_their_id(acme: CommandLine) -> None:
    acme.do("orgs", "add", "aaa", "--plan", "pro")
    assert [row["org_id"] for row in acme.do("orgs", "list", "--json").json()] == ["aaa", "acme"]
    shown = acme.do("orgs", "list").out
    assert shown.index("aaa") < shown.index("acme")
    assert "there may be more than these 1" in acme.do("orgs", "list", "--limit", "1").err


def test_markup_in_a_name_is_only_text(migrated: CommandLine) -> None:
    migrated.do("orgs", "add", "acme", "--plan", "trial", "--name", "[red]Acme[/nothing]")
    assert "[red]Acme[/nothing]" in migrated.do("orgs", "list").out


def test_an_org_is_shown_with_keys_and_entries_but_without_secrets(acme: CommandLine) -> None:
    secret = acme.do("keys", "add", "acme", "--name", "laptop").out.strip()
    for flags in ((), ("--json",)):
        shown = acme.do("orgs", "show", "acme", *flags).out
        assert "laptop" in shown
        assert "grant:trial:initial" in shown
        assert secret not in shown


def test_an_unknown_org_is_told_with_a_guess(acme: CommandLine) -> None:
    said = acme("orgs", "show", "acne")
    assert (said.exit_code, said.err) == (1, "error: there is no org 'acne', did you mean 'acme'?\n")


def test_an_org_whose_plan_is_gone_is_shown_with_a_warning(acme: CommandLine) -> None:
    acme.configure("  trial: { credits: 100, policy: trial }\n", "")
    said = acme.do("orgs", "show", "acme")
    assert "plan 'trial' is not in the configuration" in said.err
    assert acme.do("orgs", "show", "acme", "--json").json()["plan_configured"] is False

"""`gateway credits`."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import redis

from gateway import keys
from gateway.cli.output import format_credits
from gateway.ledger import post
from gateway.stores import Postgres
from gateway.types import Entry
from tests import servers
from tests.cli.conftest import CommandLine


def posted(gateway: CommandLine, org: str = "acme") -> int:
    ucredits: int = gateway.do("credits", "balance", org, "--json").json()["posted_ucredits"]
    return ucredits


def test_granted_credits_are_in_the_balance_and_the_ledger(acme: CommandLine) -> None:
    assert "granted 5 credits to acme: posted balance 105" in acme.do("credits", "grant", "acme", "5").out
    acme.do("credits", "grant", "acme", "5", "--note", "sorry for the outage")
    assert posted(acme) == 110_000_000
    newest = acme.do("credits", "ledger", "acme", "--limit", "1", "--json").json()
    assert [(entry["kind"], entry["amount_ucredits"], entry["meta"]["note"]) for entry in newest] == [
        ("grant", 5_000_000, "sorry for the outage")
    ]


def test_a_named_grant_counts_once(acme: CommandLine) -> None:
    first = acme.do("credits", "grant", "acme", "5", "--id", "invoice-7", "--json").json()
    again = acme.do("credits", "grant", "acme", "5", "--id", "invoice-7", "--json").json()
    assert (first["new"], again["new"]) == (True, False)
    assert first["balance_ucredits"] == again["balance_ucredits"] == posted(acme) == 105_000_000


def test_a_grant_id_stands_for_one_amount(acme: CommandLine) -> None:
    acme.do("credits", "grant", "acme", "5", "--id", "invoice-7")
    said = acme("credits", "grant", "acme", "6", "--id", "invoice-7")
    assert said.exit_code == 1
    assert "used before, for another amount" in said.err
    assert posted(acme) == 105_000_000


def test_only_whole_positive_amounts_can_be_granted(acme: CommandLine) -> None:
    for amount in ("0", "-5", "1.5", "five", "", "1e3", "9000000001", "9" * 30):
        assert acme("credits", "grant", "acme", "--", amount).exit_code == 2, amount
    assert posted(acme) == 100_000_000


def test_a_bad_id_or_note_is_a_usage_error(acme: CommandLine) -> None:
    for option in (("--id", ""), ("--id", "two words"), ("--note", "a\nb"), ("--note", "x" * 201)):
        assert acme("credits", "grant", "acme", "5", *option).exit_code == 2, option
    assert posted(acme) == 100_000_000


def test_a_balance_stays_within_what_scripts_can_count(acme: CommandLine) -> None:
    said = acme("credits", "grant", "acme", "8999999901")
    assert said.exit_code == 2
    acme.do("credits", "grant", "acme", "8999999900", "--id", "all")
    assert acme.do("credits", "grant", "acme", "8999999900", "--id", "all", "--json").json()["new"] is False


def test_an_org_never_seen_gets_credits_only_when_that_is_meant(acme: CommandLine) -> None:
    said = acme("credits", "grant", "acne", "5")
    assert (said.exit_code, said.err) == (1, "error: there is no org 'acne', did you mean 'acme'?\n")
    acme.do("credits", "grant", "org_of_tokens", "5", "--create")
    acme.do("credits", "grant", "org_of_tokens", "5")
    assert posted(acme, "org_of_tokens") == 10_000_000
    assert "its plan and users come from tokens" in acme("orgs", "show", "org_of_tokens").err


def test_a_balance_tells_what_redis_holds(acme: CommandLine) -> None:
    with redis.Redis.from_url(acme.env["REDIS_URL"]) as client:
        client.hset(keys.account("acme"), mapping={"p": 100_000_000, "v": 1, "u": 2_500_000, "h": 1_000_000})
    report = acme.do("credits", "balance", "acme", "--json").json()
    assert report["in_redis"] == {
        "held_ucredits": 1_000_000,
        "unposted_ucredits": 2_500_000,
        "set_aside_ucredits": 0,
        "available_ucredits": 96_500_000,
    }
    shown = {
        line.rpartition("  ")[0].strip(): line.split()[-1]
        for line in acme.do("credits", "balance", "acme").out.splitlines()
    }
    assert (shown["posted"], shown["unposted charges"], shown["held in flight"]) == ("100", "2.5", "1")
    assert shown["available"] == "96.5"


def test_a_balance_tells_what_the_plan_brought_and_until_when(acme: CommandLine) -> None:
    acme.configure("  pro: { credits: 10000,", "  pro: { credits: 50, grant: reset, period: hour,")
    acme.do("orgs", "add", "team", "--plan", "pro")
    acme.do("credits", "grant", "team", "7")
    report = acme.do("credits", "balance", "team", "--json").json()
    assert (report["plan_ucredits"], report["purchased_ucredits"]) == (50_000_000, 7_000_000)
    assert (report["posted_ucredits"], report["plan"]) == (57_000_000, "pro")
    now = datetime.now(UTC)
    assert now < datetime.fromisoformat(report["period_ends"]) <= now + timedelta(hours=1)
    assert "the period of plan pro ends " in acme.do("credits", "balance", "team").out
    without = acme.do("credits", "balance", "acme", "--json").json()
    assert (without["plan_ucredits"], without["plan"], without["period_ends"]) == (100_000_000, "trial", None)


async def test_a_period_that_is_over_is_said_to_be(acme: CommandLine) -> None:
    acme.configure("  pro: { credits: 10000,", "  pro: { credits: 50, grant: reset, period: hour,")
    await asyncio.to_thread(acme.do, "orgs", "add", "team", "--plan", "pro")
    await servers.execute(
        acme.env["DATABASE_URL"], "UPDATE gateway.account SET period_ends = now() - interval '1 minute'"
    )
    said = await asyncio.to_thread(acme.do, "credits", "balance", "team")
    assert "the period of plan pro is over since" in said.out
    assert "the next request brings the credits of the current one" in said.out


def test_an_org_redis_does_not_know_has_all_of_its_balance(acme: CommandLine) -> None:
    report = acme.do("credits", "balance", "acme", "--json").json()
    assert report["in_redis"]["available_ucredits"] == 100_000_000


def test_without_redis_the_posted_balance_is_still_told(acme: CommandLine) -> None:
    acme.env["REDIS_URL"] = "redis://127.0.0.1:1/0"
    report = acme.do("credits", "balance", "acme", "--json").json()
    assert (report["posted_ucredits"], report["in_redis"]) == (100_000_000, None)
    said = acme.do("credits", "balance", "acme")
    assert "are not known: redis 127.0.0.1:1/0" in said.err


def test_charges_are_listed_newest_first_and_cannot_move_the_terminal(acme: CommandLine) -> None:
    async def charge() -> None:
        postgres = Postgres(acme.env["DATABASE_URL"], timeout_ms=5_000, pool_max=1)
        await postgres.open()
        try:
            await post(postgres, [Entry("acme", "r1", "settle", -1_250_000, {"model": "\x1b]0;evil\x07", "n": 3})])
        finally:
            await postgres.close()

    asyncio.run(charge())
    lines = acme.do("credits", "ledger", "acme").out.splitlines()
    assert "-1.25" in lines[1] and "settle" in lines[1] and "n=3" in lines[1]
    assert "grant:trial:initial" in lines[2]
    assert "\x1b" not in "".join(lines) and "\x07" not in "".join(lines)


def test_an_unknown_org_has_no_credits_to_show(migrated: CommandLine) -> None:
    for command in ("balance", "ledger"):
        said = migrated("credits", command, "nobody")
        assert (said.exit_code, said.out) == (1, "")


async def test_an_org_without_a_row_in_ai_credits_has_zero(acme: CommandLine) -> None:
    await servers.execute(acme.env["DATABASE_URL"], "DELETE FROM ai_credits")
    said = await asyncio.to_thread(acme.do, "credits", "balance", "acme", "--json")
    assert said.json()["posted_ucredits"] == 0


@pytest.mark.parametrize(
    ("ucredits", "shown"),
    [
        (0, "0"),
        (1, "0.000001"),
        (1_500_000, "1.5"),
        (-1_250_000, "-1.25"),
        (-1, "-0.000001"),
        (10**16, "10000000000"),
        (None, "-"),
    ],
)
def test_micro_credits_are_shown_exactly(ucredits: int | None, shown: str) -> None:
    assert format_credits(ucredits) == shown

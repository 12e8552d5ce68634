"""`gateway credits audit` and `gateway credits reconcile`."""

import asyncio
from pathlib import Path

import pytest
import redis

from gateway import keys
from gateway.ledger import post
from gateway.stores import Postgres
from gateway.types import Entry
from tests import servers
from tests.cli.conftest import CommandLine

CREDIT = 1_000_000


def sql(gateway: CommandLine, statement: str) -> None:
    asyncio.run(servers.execute(gateway.env["DATABASE_URL"], statement))


def charge(gateway: CommandLine, **ucredits: int) -> None:
    async def work() -> None:
        postgres = Postgres(gateway.env["DATABASE_URL"], timeout_ms=5_000, pool_max=1)
        await postgres.open()
        await post(postgres, [Entry("acme", name, "settle", -amount) for name, amount in ucredits.items()])
        await postgres.close()

    asyncio.run(work())


def write(gateway: CommandLine, *lines: str, name: str = "usage.jsonl") -> str:
    path: Path = gateway.directory / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def line(request_id: str, credits: str, more: str = "") -> str:
    return f'{{"request_id": "{request_id}", "credits": {credits}{more}}}'


def test_books_that_are_right_are_said_to_be(acme: CommandLine) -> None:
    acme.do("orgs", "add", "globex", "--plan", "pro")
    said = acme.do("credits", "audit")
    assert said.out == (
        "2 orgs: 2 ledger entries come to 10100 credits, the balances to 10100; "
        "0 wait to be posted, 0 are held in flight\nevery credit is accounted for\n"
    )
    report = acme.do("credits", "audit", "--json").json()
    assert (report["ok"], report["wrong"], report["remarks"], report["trouble"]) == (True, [], [], None)
    assert report["orgs"][0] == {
        "org_id": "acme",
        "entries": 1,
        "ledger_ucredits": 100 * CREDIT,
        "balance_ucredits": 100 * CREDIT,
        "set_aside_ucredits": 0,
        "unposted_ucredits": 0,
        "held_ucredits": 0,
    }


def test_one_orgs_books_are_shown(acme: CommandLine) -> None:
    with redis.Redis.from_url(acme.env["REDIS_URL"]) as client:
        client.hset(keys.holds("acme"), "r1", "1500000:0")
        client.zadd(keys.deadlines("acme"), {"r1": 9e15})
        client.set(keys.tombstone("acme", "r1"), "admitted:1")
    said = acme.do("credits", "audit", "acme")
    assert [row.split() for row in said.out.splitlines()[:6]] == [
        ["acme", "credits"],
        ["ledger,", "1", "entries", "100"],
        ["balance", "100"],
        ["unposted", "charges", "0"],
        ["held", "in", "flight", "1.5"],
        ["set", "aside", "0"],
    ]
    assert "Redis has lost its account; 1 holds and 0 charges are there" in said.out
    assert said.out.endswith("every credit is accounted for\n")


def test_books_that_are_wrong_are_shown_and_fail(acme: CommandLine) -> None:
    sql(acme, "UPDATE gateway.account SET micro = 5")
    said = acme("credits", "audit")
    assert said.exit_code == 1
    assert "its ledger comes to 100000000 micro-credits, its account has 100000005" in said.out
    assert "every credit is accounted for" not in said.out
    found = acme("credits", "audit", "acme", "--json")
    assert found.exit_code == 1
    assert [(one["org_id"], one["code"]) for one in found.json()["wrong"]] == [("acme", "balance")]
    assert found.json()["ok"] is False


def test_what_could_not_be_looked_at_is_not_right(acme: CommandLine, unused_tcp_port: int) -> None:
    acme.env["REDIS_URL"] = f"redis://127.0.0.1:{unused_tcp_port}"
    said = acme("credits", "audit")
    assert said.exit_code == 1
    assert said.err.startswith("error: Redis was not asked, so nobody knows what is held and unposted there: redis 127")
    assert "every credit is accounted for" not in said.out
    del acme.env["REDIS_URL"]
    assert "there is no Redis to ask" in acme("credits", "audit").err


def test_an_org_that_is_not_there_cannot_be_audited(acme: CommandLine) -> None:
    assert acme("credits", "audit", "acne").err == "error: there is no org 'acne', did you mean 'acme'?\n"


def test_nothing_is_posted_before_somebody_says_so(acme: CommandLine) -> None:
    charge(acme, dear=3 * CREDIT, right=CREDIT)
    log = write(acme, line("dear", "1.5"), line("right", "1"))
    shown = acme.do("credits", "reconcile", "--from", log)
    assert shown.out.splitlines()[-1] == "2 requests: 1 corrected, 1 right; 0 credits charged, 1.5 given back"
    assert shown.err == "nothing was posted: --apply does that\n"
    assert acme.do("credits", "balance", "acme", "--json").json()["posted_ucredits"] == 96 * CREDIT

    done = acme.do("credits", "reconcile", "--from", log, "--apply", "--json").json()
    assert done == {
        "applied": True,
        "counts": {"corrected": 1, "right": 1},
        "requests": [
            {
                "place": "usage.jsonl:1",
                "verdict": "corrected",
                "org_id": "acme",
                "request_id": "dear",
                "was_ucredits": 3 * CREDIT,
                "ucredits": 3 * CREDIT // 2,
            }
        ],
    }
    assert acme.do("credits", "balance", "acme", "--json").json()["posted_ucredits"] == 97_500_000
    again = acme.do("credits", "reconcile", "--from", log, "--apply")
    assert (again.out, again.err) == ("2 requests: 2 right; 0 credits charged, 0 given back\n", "")
    assert acme.do("credits", "audit").exit_code == 0


def test_a_request_that_nobody_knows_is_left_for_a_person(acme: CommandLine) -> None:
    log = write(acme, line("lost", "2", ', "org": "acme"'), line("nobodys", "2"))
    said = acme("credits", "reconcile", "--from", log, "--apply")
    assert said.exit_code == 1
    assert said.out.splitlines()[-1] == "2 requests: 2 unknown; 0 credits charged, 0 given back"
    said = acme("credits", "reconcile", "--from", log, "--apply", "--unknown")
    assert said.exit_code == 1
    assert said.out.splitlines()[-1] == "2 requests: 1 posted, 1 unknown; 2 credits charged, 0 given back"
    rows = [row.split() for row in said.out.splitlines()[1:-1]]
    assert rows == [
        ["-", "nobodys", "-", "2", "unknown", "usage.jsonl:2"],
        ["acme", "lost", "-", "2", "posted", "usage.jsonl:1"],
    ]


def test_a_bad_line_is_named_and_nothing_is_posted(acme: CommandLine) -> None:
    charge(acme, dear=3 * CREDIT)
    log = write(acme, line("dear", "1"), line("worse", "-1"), "{", name="bad.jsonl")
    said = acme("credits", "reconcile", "--from", log, "--apply")
    assert said.exit_code == 2
    assert said.err.splitlines() == [
        "bad.jsonl:2: `credits` must be a number from 0 to 9000000000 credits, with at most six decimals",
        "bad.jsonl:3: is not JSON: Expecting property name enclosed in double quotes at column 2",
        f"error: nothing was compared: 2 lines of {log} are wrong",
    ]
    assert acme.do("credits", "balance", "acme", "--json").json()["posted_ucredits"] == 97 * CREDIT


def test_a_log_may_come_from_a_pipe_or_as_csv(acme: CommandLine) -> None:
    charge(acme, dear=3 * CREDIT, cheap=CREDIT)
    piped = acme("credits", "reconcile", "--from", "-", "--apply", stdin=line("dear", "1").encode())
    assert piped.out.splitlines()[-1] == "1 requests: 1 corrected; 0 credits charged, 2 given back"
    log = write(acme, "org,request_id,credits", "acme,cheap,2", name="usage.csv")
    assert "1 corrected; 1 credits charged" in acme.do("credits", "reconcile", "--from", log, "--apply").out


@pytest.mark.parametrize(("log", "why"), [("none.jsonl", "No such file or directory"), (".", "Is a directory")])
def test_a_log_that_cannot_be_read_is_an_error(acme: CommandLine, log: str, why: str) -> None:
    path = acme.directory / log
    said = acme("credits", "reconcile", "--from", str(path))
    assert (said.exit_code, said.err) == (1, f"error: {path}: {why}\n")

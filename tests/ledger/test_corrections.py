"""Corrections from an upstream's log: requests cost what it says, said once or often, early or late."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway import keys
from gateway.ledger import post, query
from gateway.ledger.audit import Auditor
from gateway.ledger.corrections import Correction, reconcile
from gateway.ledger.upstream_log import Said, UnreadableLog, read_log
from gateway.types import Entry
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ORG, House
from tests.ledger.running import Request, pay
from tests.waiting import until

CREDIT = 1_000_000
HALF = CREDIT // 2


def said(request_id: str, ucredits: int, org_id: str | None = ORG) -> Said:
    return Said(f"log:{request_id}", request_id, org_id, ucredits)


async def say(house: House, *lines: Said, unknown_too: bool = False, dry: bool = False) -> dict[str, str]:
    """What came of each request."""
    found = await reconcile(house.postgres, lines, unknown_too=unknown_too, dry=dry)
    await books_are_right(house.postgres)
    return {one.request_id: one.verdict for one in found}


async def costs(house: House, request_id: str, org_id: str = ORG) -> int:
    """What the request was charged, all in all."""
    return -sum(amount for name, _, amount in await house.ledger(org_id) if name.partition("#")[0] == request_id)


async def charged(house: House, *requests: tuple[str, int]) -> None:
    await house.credits(100)
    await post(house.postgres, [Entry(ORG, request_id, "settle", -ucredits) for request_id, ucredits in requests])


async def test_a_request_costs_what_the_log_says_and_is_right_from_then_on(house: House) -> None:
    await charged(house, ("dear", 3 * CREDIT), ("cheap", CREDIT), ("right", CREDIT), ("free", 0))
    lines = [said("dear", HALF), said("cheap", 2 * CREDIT), said("right", CREDIT), said("free", 7)]
    verdicts = {"dear": "corrected", "cheap": "corrected", "right": "right", "free": "corrected"}
    before = await house.ledger()
    assert await say(house, *lines, dry=True) == verdicts
    assert await house.ledger() == before
    assert await say(house, *lines) == verdicts
    assert (await house.ledger())[len(before) :] == [
        ("cheap#1", "correction", -CREDIT),
        ("dear#1", "correction", 5 * HALF),
        ("free#1", "correction", -7),
    ]
    after = await house.ledger()
    for dry in (True, False):
        assert set((await say(house, *lines, dry=dry)).values()) == {"right"}
    assert await house.ledger() == after
    row = await house.postgres.row("SELECT credits FROM ai_credits")
    assert row is not None and row["credits"] == 96


async def test_a_later_log_corrects_an_earlier_one(house: House) -> None:
    await charged(house, ("r1", CREDIT))
    for ucredits in (2 * CREDIT, 0, 5, CREDIT):
        assert await say(house, said("r1", ucredits)) == {"r1": "corrected"}
        assert await costs(house, "r1") == ucredits
    names = [name for name, kind, _ in await house.ledger() if kind == "correction"]
    assert names == ["r1#1", "r1#2", "r1#3", "r1#4"]
    row = await house.postgres.row("SELECT meta FROM gateway.ledger WHERE request_id = 'r1#2'")
    assert row is not None
    assert row["meta"] == '{"was": 2000000, "from": "log:r1", "basis": "reconciled", "corrects": "r1"}'


async def test_what_the_ledger_does_not_know_is_charged_only_when_that_is_meant(house: House) -> None:
    await charged(house)
    lines = [said("lost", CREDIT), said("nobodys", CREDIT, None), said("free", 0)]
    before = await house.ledger()
    assert await say(house, *lines) == {"lost": "unknown", "nobodys": "unknown", "free": "unknown"}
    verdicts = {"lost": "posted", "nobodys": "unknown", "free": "right"}
    assert await say(house, *lines, unknown_too=True, dry=True) == verdicts
    assert await house.ledger() == before
    assert await say(house, *lines, unknown_too=True) == verdicts
    assert (await house.ledger())[len(before) :] == [("lost", "settle", -CREDIT)]
    assert (await say(house, *lines, unknown_too=True))["lost"] == "right"
    assert (await say(house, said("lost", HALF)))["lost"] == "corrected"
    assert await costs(house, "lost") == HALF


async def test_an_org_without_a_row_is_left_alone(house: House) -> None:
    await charged(house, ("r1", CREDIT))
    await house.postgres.rows("DELETE FROM ai_credits")
    assert await say(house, said("r1", 2 * CREDIT), said("r2", 5, "globex"), unknown_too=True) == {
        "r1": "without",
        "r2": "without",
    }
    assert await costs(house, "r1") == CREDIT
    assert await house.postgres.rows("SELECT * FROM gateway.dead_letter") == []


@pytest.mark.parametrize("known", ["orphan", "nothing"])
async def test_a_gateway_that_wakes_up_after_the_correction_charges_nothing_more(house: House, known: str) -> None:
    """It was stopped past its lease, and settles in the end: what the log said is what counts."""
    await house.credits(10)
    request = Request(house, "r1")
    await request.begin()
    if known == "orphan":
        await house.redis.call("ZADD", keys.deadlines(ORG), "XX", 1, "r1")
        assert await house.sweeper.sweep() == 1
        await house.outbox.flush()
        assert await costs(house, "r1") == CREDIT
    assert await say(house, said("r1", 3 * CREDIT), unknown_too=True) == {
        "r1": "corrected" if known == "orphan" else "posted"
    }
    await request.end(2 * CREDIT)
    await house.outbox.flush()
    assert await costs(house, "r1") == 3 * CREDIT
    await books_are_right(house.postgres)
    assert (await Auditor(house.postgres, house.redis).audit()).wrong == ()
    account = await house.account()
    assert (account["p"], account["u"], account["h"]) == (7 * CREDIT, 0, 0)
    assert await say(house, said("r1", 3 * CREDIT)) == {"r1": "right"}
    assert await say(house, said("r1", CREDIT)) == {"r1": "corrected"}
    assert await costs(house, "r1") == CREDIT


async def test_a_request_that_holds_in_postgres_has_ended_when_it_is_corrected(house: House) -> None:
    await house.credits(10)
    await house.money.holds.take(ORG, "r1", CREDIT, CREDIT, 0)
    assert await say(house, said("r1", 2 * CREDIT), unknown_too=True) == {"r1": "posted"}
    assert await house.postgres.rows("SELECT * FROM gateway.hold") == []
    await post(house.postgres, [Entry(ORG, "r1", "settle", -CREDIT)])
    assert await costs(house, "r1") == 2 * CREDIT


async def test_gateways_know_the_new_balance_within_a_second(house: House) -> None:
    await house.credits(10)
    await pay(house, "r1")
    await house.outbox.flush()
    listens = asyncio.Event()
    house.postgres.listen(house.money.channels, on_connect=listens.set)
    await listens.wait()
    await say(house, said("r1", 4 * CREDIT))

    async def is_known() -> bool:
        return (await house.account())["p"] == 6 * CREDIT

    await until(is_known, 5)


async def test_a_correction_waits_for_who_posts_and_counts_what_that_was(house: House) -> None:
    await house.credits(10)
    async with house.postgres._connection(None) as gateways, gateways.transaction():
        await gateways.fetch(query("post"), [ORG], ["r1"], ["settle"], [-CREDIT], ["{}"])
        saying = asyncio.create_task(say(house, said("r1", 3 * CREDIT), unknown_too=True))

        async def waits() -> bool:
            row = await house.postgres.row("SELECT count(*) AS n FROM pg_locks WHERE NOT granted")
            return row is not None and row["n"] == 1

        await until(waits)
    assert await saying == {"r1": "corrected"}
    assert await costs(house, "r1") == 3 * CREDIT


async def test_a_request_is_found_by_the_name_that_a_trusted_proxy_gave_it(house: House) -> None:
    await house.credits(10)
    names = [("h1", "proxy-1"), ("h2", "proxy-2"), ("h3", "proxy-2"), ("h4", "h4")]
    await post(house.postgres, [Entry(ORG, hold, "settle", -CREDIT, {"request_id": named}) for hold, named in names])
    assert await say(house, said("proxy-1", 2 * CREDIT), said("proxy-2", 2 * CREDIT, None), said("h4", 7, None)) == {
        "h1": "corrected",
        "proxy-2": "ambiguous",
        "h4": "corrected",
    }
    assert [await costs(house, hold) for hold, _ in names] == [2 * CREDIT, CREDIT, CREDIT, 7]
    assert await say(house, said("h2", 5), said("h1", 2 * CREDIT), said("proxy-1", 2 * CREDIT)) == {
        "h2": "corrected",
        "h1": "right",
    }
    # Two lines that mean one request and differ
    assert await say(house, said("h1", 1), said("proxy-1", 2)) == {"h1": "ambiguous"}
    assert await costs(house, "h1") == 2 * CREDIT


async def test_an_org_that_is_named_tells_requests_of_one_name_apart(house: House) -> None:
    await house.credits(5)
    await house.credits(5, "globex", "grant:globex")
    await post(house.postgres, [Entry(org, "r1", "settle", -CREDIT) for org in (ORG, "globex")])
    assert await say(house, said("r1", 5, None)) == {"r1": "ambiguous"}
    assert await say(house, said("r1", 5, "globex")) == {"r1": "corrected"}
    assert (await costs(house, "r1"), await costs(house, "r1", "globex")) == (CREDIT, 5)
    assert await say(house, said("r1", 5, "initech")) == {"r1": "without"}


async def test_grants_are_not_requests(house: House) -> None:
    await house.credits(5)
    assert await say(house, said("grant:test", 5)) == {"grant:test": "unknown"}


async def test_the_same_log_twice_at_once_beside_gateways_that_post_is_one_correction_each(house: House) -> None:
    await house.credits(10_000)
    dice = random.Random(3)
    names = [f"r{number}" for number in range(300)]
    entries = [Entry(ORG, name, "settle", -dice.randint(0, CREDIT)) for name in names]
    await post(house.postgres, entries[:200])
    lines = [said(name, dice.randint(0, CREDIT)) for name in names]

    async def settle_the_rest() -> None:
        for entry in entries[200:]:
            await post(house.postgres, [entry])

    async def speak() -> Sequence[Correction]:
        return await reconcile(house.postgres, dice.sample(lines, len(lines)), unknown_too=True, dry=False)

    await asyncio.gather(speak(), settle_the_rest(), speak(), speak())
    assert set((await say(house, *lines)).values()) == {"right"}
    ledger = await house.ledger()
    assert len([name for name, kind, _ in ledger if kind == "settle"]) == 300
    assert len([name for name, kind, _ in ledger if kind == "correction"]) <= 300
    assert {name: await costs(house, name) for name in names[::60]} == {
        line.request_id: line.ucredits for line in lines[::60]
    }


# Reading


def write(directory: Path, name: str, text: str | bytes) -> str:
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_json_lines_are_read(tmp_path: Path) -> None:
    text = """\
{"request_id": "a", "credits": 1.25, "org": "acme", "model": "demo", "at": [1]}

{"request_id": "b", "credits": "0.000001", "org": null}\r
{"ucredits": 7, "request_id": "c"}
{"request_id": "d", "credits": 1e3}
{"request_id": "a", "credits": 1.250000000, "org": "acme"}"""
    assert read_log(write(tmp_path, "usage.jsonl", "\ufeff" + text)) == (
        [
            Said("usage.jsonl:1", "a", "acme", 1_250_000),
            Said("usage.jsonl:3", "b", None, 1),
            Said("usage.jsonl:4", "c", None, 7),
            Said("usage.jsonl:5", "d", None, 1_000_000_000),
        ],
        [],
    )


def test_csv_is_read(tmp_path: Path) -> None:
    text = 'at,request_id,credits,org\r\n"two\nlines",a,1.25,acme\r\n,b,2,\r\n'
    assert read_log(write(tmp_path, "usage.csv", text)) == (
        [Said("usage.csv:3", "a", "acme", 1_250_000), Said("usage.csv:4", "b", None, 2_000_000)],
        [],
    )


EXACT = "`credits` must be a number from 0 to 9000000000 credits, with at most six decimals"
AMOUNT = "one of `credits` and `ucredits` says what it cost"
NAME = "`request_id` must be 1 to 200 visible ASCII characters"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"request_id": "a"', "is not JSON: Expecting ',' delimiter at column 19"),
        ("[" * 100_000, "is JSON that nobody can read"),
        ("7", "is not a JSON object"),
        ('{"credits": 1}', NAME),
        ('{"request_id": 7, "credits": 1}', NAME),
        ('{"request_id": "two words", "credits": 1}', NAME),
        ('{"request_id": "a"}', AMOUNT),
        ('{"request_id": "a", "credits": 1, "ucredits": 1000000}', AMOUNT),
        ('{"request_id": "a", "credits": 1, "org": "a b"}', "`org` is not an org id"),
        ('{"request_id": "a", "credits": 1, "org": 7}', "`org` is not an org id"),
        *(
            (f'{{"request_id": "a", "credits": {amount}}}', EXACT)
            for amount in ("-1", "0.0000001", "1.00000000000000000000000000000000001", "9000000001", "1e400", "true",
                           "null", "NaN", "Infinity", '"1,5"', '"1_000"', '" 1"', '""', "[1]")
        ),
        ('{"request_id": "a", "ucredits": 1.5}', "`ucredits` must be a number from 0 to 9000000000 credits, with none"),
    ],
)  # fmt: skip
def test_a_line_that_means_nothing_is_named(tmp_path: Path, line: str, problem: str) -> None:
    good = '{"request_id": "good", "credits": 1}'
    found, problems = read_log(write(tmp_path, "usage.jsonl", f"{good}\n{line}\n"))
    assert [one.request_id for one in found] == ["good"]
    assert problems == [f"usage.jsonl:2: {problem}"]


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    _, problems = read_log(write(tmp_path, "usage.jsonl", b'{"request_id": "\xff\xfe", "credits": 1}\n'))
    assert problems == [f"usage.jsonl:1: {NAME}"]


def test_two_costs_of_one_request_are_a_problem(tmp_path: Path) -> None:
    text = '{"request_id": "a", "credits": 1}\n{"request_id": "a", "credits": 2}\n'
    _, problems = read_log(write(tmp_path, "usage.jsonl", text))
    assert problems == ["usage.jsonl:2: request a has another cost at usage.jsonl:1"]


def test_csv_without_a_head_or_with_too_many_columns_is_a_problem(tmp_path: Path) -> None:
    _, problems = read_log(write(tmp_path, "usage.csv", "a,1.25\n"))
    assert problems == ["usage.csv:1: is no head: the first line names the columns, and one of them is `request_id`"]
    _, problems = read_log(write(tmp_path, "usage.csv", "request_id,credits\na,1,2\nb\n"))
    assert problems == ["usage.csv:2: has more columns than the head", f"usage.csv:3: {AMOUNT}"]


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableLog, match="No such file"):
        read_log(str(tmp_path / "none.jsonl"))
    with pytest.raises(UnreadableLog, match="unexpected end of data"):
        read_log(write(tmp_path, "usage.csv", 'request_id,credits\n"a,1'))
    monkeypatch.setattr("gateway.ledger.upstream_log.LINES_MAX", 1)
    with pytest.raises(UnreadableLog, match="split it"):
        read_log(write(tmp_path, "usage.csv", "request_id,credits\na,1\nb,1\n"))

"""What dead processes left: posted once, whatever else has posted it, and gone from the disk afterwards."""

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway import keys
from gateway.errors import StoreUnavailable
from gateway.journal import Journal, Recovered, files
from gateway.ledger import migrate, post
from gateway.money import Money
from gateway.stores import Postgres, Redis
from gateway.types import Entry
from tests.journal.disk import ORG, Posted, charge, dies, left, recovered, terms
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import House, every_script, settings
from tests.ledger.running import CREDIT, Request, gateway, pay, state
from tests.waiting import until

_PROCESS = """
import asyncio, sys
from pathlib import Path
from gateway.journal import Journal, Terms
from gateway.types import Entry

async def main():
    journal = Journal(Path(sys.argv[1]), Terms("checkpoint", 0, 4096))
    await journal.open()

    async def requests(worker):
        for number in range(1_000_000):
            name = f"w{worker}.{number}"
            await journal.held(name, "acme", 5, 1)
            print("held", name, flush=True)
            if number % 3:
                await journal.settled(Entry("acme", name, "settle", -3))
                print("settled", name, flush=True)

    await asyncio.gather(*(requests(worker) for worker in range(4)))

asyncio.run(main())
"""


@asynccontextmanager
async def doomed(redis_url: str, database_url: str, directory: Path, **credits: object) -> AsyncIterator[House]:
    """A gateway with a journal, without background work, that is dead after the block and has told nobody."""
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = Postgres(database_url, timeout_ms=2_000, pool_max=8)
    redis.start()
    await postgres.open()
    await migrate(postgres)
    money = Money(settings(journal=directory, **credits), redis, redis, postgres)
    await money.open()
    try:
        yield House(redis, postgres, money)
    finally:
        assert money.journal is not None
        dies(money.journal)
        for part in (money.losses, money.freshness, money.accounts):
            await part.close()
        await redis.close()
        await postgres.close()


async def recover(house: House, directory: Path, on_expiry: str = "checkpoint") -> Recovered:
    """The next process, once the leases of the dead one are over."""
    return await Journal(directory, terms(on_expiry=on_expiry)).recover(lambda entries: post(house.postgres, entries))


async def charges(house: House) -> dict[str, list[tuple[str, int]]]:
    """Kind and amount of every entry of each request."""
    found: dict[str, list[tuple[str, int]]] = {}
    for request_id, kind, amount in await house.ledger():
        if kind in ("settle", "orphan"):
            found.setdefault(request_id, []).append((kind, -amount))
    return found


async def test_a_process_that_is_killed_has_what_it_acknowledged_on_the_disk(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROCESS, str(tmp_path), stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert process.stdout is not None
    told = [(await process.stdout.readline()).split() for _ in range(300)]
    assert left(tmp_path) == []
    process.send_signal(signal.SIGKILL)
    rest = await process.stdout.read()
    await process.wait()
    told += [line.split() for line in rest.splitlines() if line.count(b" ") == 1]
    _, posted = await recovered(tmp_path)
    settled = {line[1].decode() for line in told if line[0] == b"settled"}
    held = {line[1].decode() for line in told if line[0] == b"held"} - settled
    kinds = posted.kinds()
    assert {name: kinds[name] for name in settled} == dict.fromkeys(settled, ("settle", 3))
    # What was on its way when it died may be there as well.
    assert {kinds[name] for name in held} <= {("orphan", 1), ("settle", 3)}
    assert len(kinds) <= len(settled | held) + 4
    assert list(tmp_path.iterdir()) == []


async def test_a_gateway_that_dies_while_redis_loses_everything_owes_what_it_was_owed(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with doomed(redis_url, database_url, tmp_path) as house:
        await house.credits(20)
        assert [await pay(house, f"paid{number}", 2 * CREDIT) for number in range(3)] == ["paid"] * 3
        assert await Request(house, "open", 3 * CREDIT).begin()
        released = Request(house, "released")
        assert await released.begin()
        await released._context.__aexit__(None, None, None)
        assert await charges(house) == {}
    async with gateway(redis_url, database_url, works=False) as house:
        await house.redis.call("FLUSHALL")
        found = await recover(house, tmp_path)
        assert found == Recovered(processes=1, charges=3, orphans=1)
        assert await charges(house) == {
            "paid0": [("settle", 2 * CREDIT)],
            "paid1": [("settle", 2 * CREDIT)],
            "paid2": [("settle", 2 * CREDIT)],
            "released": [("settle", 0)],
            "open": [("orphan", 3 * CREDIT)],
        }
        assert (await state(house))["credits"] == 20 - 3 * 2 - 3
        await books_are_right(house.postgres)
        assert await recover(house, tmp_path) == Recovered()


async def test_what_others_have_posted_is_not_posted_again(redis_url: str, database_url: str, tmp_path: Path) -> None:
    """Redis has lost nothing: another gateway carries the outbox and sweeps the holds of the dead one."""
    async with doomed(redis_url, database_url, tmp_path) as house:
        house.obey(lease_ms=1)
        await house.credits(20)
        assert await pay(house, "paid", 2 * CREDIT) == "paid"
        assert await Request(house, "open", 3 * CREDIT).begin()
    async with gateway(redis_url, database_url) as other:
        await until(lambda: charges_are(other, {"paid": [("settle", 2 * CREDIT)], "open": [("orphan", 3 * CREDIT)]}))
        await recover(other, tmp_path)
        assert await charges(other) == {"paid": [("settle", 2 * CREDIT)], "open": [("orphan", 3 * CREDIT)]}
        assert (await state(other))["credits"] == 15
        await books_are_right(other.postgres)


async def test_others_that_come_later_post_nothing_again(redis_url: str, database_url: str, tmp_path: Path) -> None:
    async with doomed(redis_url, database_url, tmp_path) as house:
        house.obey(lease_ms=1)
        await house.credits(20)
        assert await pay(house, "paid", 2 * CREDIT) == "paid"
        assert await Request(house, "open", 3 * CREDIT).begin()
    async with gateway(redis_url, database_url, works=False) as other:
        await recover(other, tmp_path)
        await until(other.sweeper.sweep)
        other.outbox.mark(ORG)
        assert await other.outbox.flush() == 2
        assert await charges(other) == {"paid": [("settle", 2 * CREDIT)], "open": [("orphan", 3 * CREDIT)]}
        account = await other.account()
        assert (account["p"], account["u"], account["h"]) == (15 * CREDIT, 0, 0)


async def charges_are(house: House, expected: dict[str, list[tuple[str, int]]]) -> bool:
    return await charges(house) == expected


async def test_a_request_that_was_released_on_the_disk_alone_costs_nothing(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    """Its gateway died before it told Redis, where the sweeper finds a hold whose lease is over."""
    async with doomed(redis_url, database_url, tmp_path) as house:
        house.obey(lease_ms=1)
        await house.credits(5)
        assert await Request(house, "released").begin()
        assert house.money.journal is not None
        await house.money.journal.settled(charge("released", 0))
    async with gateway(redis_url, database_url, works=False) as other:
        await until(other.sweeper.sweep)
        other.outbox.mark(ORG)
        await other.outbox.flush()
        assert (await state(other))["credits"] == 4
        await recover(other, tmp_path)
        assert (await state(other))["credits"] == 5
        await books_are_right(other.postgres)


@pytest.mark.parametrize(("on_expiry", "charged"), [("checkpoint", 1), ("hold", 5), ("release", 0)])
async def test_an_open_hold_costs_what_is_configured(tmp_path: Path, on_expiry: str, charged: int) -> None:
    journal = Journal(tmp_path, terms())
    await journal.open()
    await journal.held("r1", ORG, 5, 1)
    dies(journal)
    found, posted = await recovered(tmp_path, on_expiry)
    assert found.orphans == 1
    assert posted.kinds() == ({"r1": ("orphan", charged)} if charged else {})


async def test_a_gateway_that_starts_recovers_by_itself_and_tells_redis(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    """The dead one had not told Redis yet, so no outbox brings it the new balance."""
    async with doomed(redis_url, database_url, tmp_path) as house:
        await house.credits(20)
        assert await Request(house, "r1").begin()
        assert house.money.journal is not None
        await house.money.journal.settled(charge("r1", 2 * CREDIT))
    async with gateway(redis_url, database_url, journal=tmp_path) as other:

        async def shown() -> bool:
            return (await other.account())["p"] == 18 * CREDIT

        await until(shown)
        assert await charges(other) == {"r1": [("settle", 2 * CREDIT)]}
        await until(lambda: not list(tmp_path.iterdir()))


async def test_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    """Also one that has just begun, and the one that recovers itself."""
    living, dead = Journal(tmp_path, terms()), Journal(tmp_path, terms())
    for number, journal in enumerate((living, dead)):
        await journal.open()
        await journal.settled(charge(f"r{number}"))
    dies(dead)
    posted = Posted()
    assert (await living.recover(posted)).processes == 1
    assert posted.kinds() == {"r1": ("settle", 1)}
    await living.settled(charge("r2"))
    await living.close()
    _, posted = await recovered(tmp_path)
    assert posted.kinds() == {"r0": ("settle", 1), "r2": ("settle", 1)}


async def test_many_who_recover_at_once_share_the_work(tmp_path: Path) -> None:
    for number in range(20):
        journal = Journal(tmp_path, terms())
        await journal.open()
        await journal.settled(charge(f"r{number}"))
        dies(journal)
    results = await asyncio.gather(*(recovered(tmp_path) for _ in range(5)))
    assert sum(found.processes for found, _ in results) == 20
    assert sorted(entry.request_id for _, posted in results for entry in posted) == sorted(f"r{n}" for n in range(20))
    assert list(tmp_path.iterdir()) == []


async def test_a_journal_that_another_has_just_removed_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, terms())
    await journal.open()
    await journal.settled(charge("r1"))
    dies(journal)
    (home,) = tmp_path.iterdir()
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        files.remove(home)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert await recovered(tmp_path) == (Recovered(), [])


async def test_a_directory_that_cannot_be_read_keeps_no_journal_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        journal = Journal(tmp_path, terms())
        await journal.open()
        await journal.settled(charge(f"r{number}"))
        dies(journal)
    flock, asked = fcntl.flock, []

    def fails_the_second_time(fd: int, operation: int) -> None:
        asked.append(fd)
        if len(asked) == 2:
            raise PermissionError("not this one")
        flock(fd, operation)

    with monkeypatch.context() as spoiled:
        spoiled.setattr(fcntl, "flock", fails_the_second_time)
        with pytest.raises(PermissionError):
            await recovered(tmp_path)
    found, _ = await recovered(tmp_path)
    assert found.processes == 2


async def test_a_journal_stays_until_postgres_has_taken_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.journal.recovery.RETRY_PAUSE_S", 0.01)
    journal = Journal(tmp_path, terms())
    await journal.open()
    await journal.settled(charge("r1"))
    dies(journal)
    posted, failures = Posted(), 3

    async def post_at_last(entries: Sequence[Entry]) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailable(detail="away")
        await posted(entries)

    recovery = asyncio.create_task(Journal(tmp_path, terms()).recover(post_at_last))
    await recovery
    assert posted.kinds() == {"r1": ("settle", 1)}
    assert list(tmp_path.iterdir()) == []


async def test_a_recovery_that_is_broken_off_is_done_again_by_the_next(tmp_path: Path) -> None:
    journal = Journal(tmp_path, terms())
    await journal.open()
    await journal.settled(charge("r1"))
    dies(journal)
    reached = asyncio.Event()

    async def never(entries: Sequence[Entry]) -> None:
        reached.set()
        await asyncio.Event().wait()

    recovery = asyncio.create_task(Journal(tmp_path, terms()).recover(never))
    await reached.wait()
    assert left(tmp_path) == []
    recovery.cancel()
    await asyncio.wait({recovery})
    _, posted = await recovered(tmp_path)
    assert posted.kinds() == {"r1": ("settle", 1)}


async def test_a_line_that_the_ledger_refuses_holds_up_nobody_else(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    journal = Journal(tmp_path, terms())
    await journal.open()
    for name in ("r1", "nul\0", "r2"):
        await journal.settled(charge(name, CREDIT))
    dies(journal)
    async with gateway(redis_url, database_url, works=False) as house:
        await house.credits(5)
        with capture_logs() as lines:
            await recover(house, tmp_path)
        assert await charges(house) == {"r1": [("settle", CREDIT)], "r2": [("settle", CREDIT)]}
        told = [line for line in lines if line["event"] == "a charge from a journal cannot be posted"]
        assert len(told) == 1 and "nul" in told[0]["entry"]


async def test_what_is_written_in_postgres_itself_is_in_the_journal_only_until_it_is(
    redis_url: str, database_url: str, tmp_path: Path
) -> None:
    async with gateway(redis_url, database_url, works=False, write="through", journal=tmp_path) as house:
        await house.credits(5)
        assert await pay(house, "r1") == "paid"
        assert house.money.journal is not None and house.money.journal.needed_count == 0
        assert await house.redis.call("EXISTS", keys.outbox(ORG)) == 0
    assert list(tmp_path.iterdir()) == []

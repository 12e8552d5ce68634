"""Writing: what is acknowledged is on the disk, who waits shares a sync, and nothing grows without bound."""

import asyncio
import random
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.errors import StoreUnavailable
from gateway.journal import Journal
from gateway.journal.needed import SEGMENTS_MAX
from tests.journal.disk import ORG, Disk, charge, dies, left, recovered, terms
from tests.waiting import until


async def test_what_is_acknowledged_is_on_the_disk(disk: Disk, journal: Journal) -> None:
    await journal.held("r1", ORG, 5, 1)
    assert disk.synced.count(b'"r1"') == 1
    await journal.settled(charge("r1"))
    assert disk.synced.count(b'"r1"') == 2


async def test_nothing_is_acknowledged_before_it_is_synced(disk: Disk, journal: Journal) -> None:
    disk.open.clear()
    waiting = asyncio.create_task(journal.held("r1", ORG, 5, 1))
    await until(lambda: disk.size)  # written, but not for good
    assert not waiting.done()
    disk.open.set()
    await waiting
    assert b'"r1"' in disk.synced


async def test_all_who_wait_at_the_same_time_share_one_sync(disk: Disk, journal: Journal) -> None:
    disk.open.clear()
    first = asyncio.create_task(journal.held("first", ORG, 5, 1))
    await until(lambda: disk.size)
    others = [asyncio.create_task(journal.held(f"r{number}", ORG, 5, 1)) for number in range(100)]
    await asyncio.sleep(0)
    disk.open.set()
    await asyncio.gather(first, *others)
    assert disk.syncs == 2
    assert journal.needed_count == 101


async def test_a_request_that_gives_up_waiting_is_not_held(disk: Disk, journal: Journal) -> None:
    """Its line comes to be on the disk all the same; the next one that is written undoes it."""
    disk.open.clear()
    waiting = asyncio.create_task(journal.held("r1", ORG, 5, 1))
    await until(lambda: disk.size)
    waiting.cancel()
    await asyncio.wait({waiting})
    disk.open.set()
    await journal.held("r2", ORG, 5, 1)
    dies(journal)
    _, posted = await recovered(disk.directory)
    assert posted.kinds() == {"r1": ("settle", 0), "r2": ("orphan", 1)}


async def test_a_line_that_cannot_be_put_in_words_fails_for_itself_alone(journal: Journal) -> None:
    good = asyncio.create_task(journal.settled(charge("r1")))
    with pytest.raises(UnicodeEncodeError):
        await journal.settled(charge("\ud800"))
    await good
    assert journal.needed_count == 1


async def test_a_journal_that_is_closed_takes_nothing(journal: Journal) -> None:
    await journal.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await journal.held("r1", ORG, 5, 1)
    journal.confirmed(ORG, ["r1"])


# Disks that fail


async def test_a_full_disk_refuses_holds_and_leaves_nothing_behind(disk: Disk, journal: Journal) -> None:
    await journal.held("before", ORG, 5, 1)
    disk.room = 30
    with capture_logs() as lines:
        for number in range(50):
            with pytest.raises(StoreUnavailable, match="No space left"):
                await journal.held(f"r{number}", ORG, 5, 1)
    assert len(disk.segments) == 1
    assert [line["event"] for line in lines] == ["journal cannot be written"]
    disk.room = None
    await journal.held("after", ORG, 5, 1)
    assert journal.trouble is None
    dies(journal)
    found, posted = await recovered(disk.directory)
    charged = {name: entry for name, entry in posted.kinds().items() if entry != ("settle", 0)}
    assert charged == {"before": ("orphan", 1), "after": ("orphan", 1)}
    assert found.broken_lines <= 1


async def test_an_end_that_a_full_disk_did_not_take_is_written_with_the_next_line(disk: Disk, journal: Journal) -> None:
    await journal.held("r1", ORG, 5, 1)
    disk.room = 0
    with pytest.raises(StoreUnavailable):
        await journal.settled(charge("r1", 3))
    disk.room = None
    await journal.held("r2", ORG, 5, 1)
    dies(journal)
    _, posted = await recovered(disk.directory)
    assert posted.kinds() == {"r1": ("settle", 3), "r2": ("orphan", 1)}


async def test_an_end_that_a_full_disk_did_not_take_is_written_at_the_end_at_last(disk: Disk, journal: Journal) -> None:
    await journal.held("r1", ORG, 5, 1)
    disk.room = 0
    with pytest.raises(StoreUnavailable):
        await journal.settled(charge("r1", 3))
    disk.room = None
    await journal.close()
    _, posted = await recovered(disk.directory)
    assert posted.kinds() == {"r1": ("settle", 3)}


async def test_what_is_confirmed_while_the_disk_is_full_is_needed_no_more(disk: Disk, journal: Journal) -> None:
    """Also when a write that was to carry it fails at that moment."""
    await journal.held("r1", ORG, 5, 1)
    disk.room = 0
    with pytest.raises(StoreUnavailable):
        await journal.settled(charge("r1", 3))
    disk.open.clear()
    failing = asyncio.create_task(journal.held("r2", ORG, 5, 1))
    await until(lambda: journal._under_way is not None)
    journal.confirmed(ORG, ["r1"])
    disk.open.set()
    with pytest.raises(StoreUnavailable):
        await failing
    disk.room = None
    await journal.settled(charge("r3"))
    journal.confirmed(ORG, ["r3"])
    assert journal.needed_count == 0
    await journal.close()
    assert disk.files == []


async def test_a_charge_that_is_confirmed_before_it_is_written_is_not_needed(disk: Disk, journal: Journal) -> None:
    """Who settled did not wait any longer for a disk that stalls, and posted the charge elsewhere."""
    disk.open.clear()
    under_way = asyncio.create_task(journal.settled(charge("r1")))
    await until(lambda: disk.size)
    waiting = asyncio.create_task(journal.settled(charge("r2")))
    await asyncio.sleep(0)
    journal.confirmed(ORG, ["r1", "r2"])
    disk.open.set()
    await asyncio.gather(under_way, waiting)
    assert journal.needed_count == 0


async def test_a_directory_that_cannot_be_refuses_until_it_can(tmp_path: Path, disk: Disk, journal: Journal) -> None:
    disk.directory.write_text("a file")
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await journal.held("r1", ORG, 5, 1)
    disk.directory.unlink()
    await journal.held("r2", ORG, 5, 1)
    assert [path.name for path in disk.files] == ["00000001.log", "lock"]


async def test_a_directory_without_room_for_another_gets_none(
    disk: Disk, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as spoiled:
        spoiled.setattr("gateway.journal.files.fcntl.flock", full)
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await journal.held("r1", ORG, 5, 1)
    assert list(disk.directory.iterdir()) == []
    await journal.held("r2", ORG, 5, 1)


async def test_a_journal_that_somebody_deleted_is_begun_again(disk: Disk, journal: Journal) -> None:
    await journal.held("r1", ORG, 5, 1)
    for path in disk.files:
        path.unlink()
    for path in disk.directory.iterdir():
        path.rmdir()
    with pytest.raises(StoreUnavailable, match="deleted"):
        await journal.held("r2", ORG, 5, 1)
    await journal.held("r3", ORG, 5, 1)
    await journal.settled(charge("r1"))
    assert b'"r3"' in disk.synced


# Bounds


async def test_requests_that_come_and_go_leave_a_few_segments_and_at_last_none(disk: Disk, journal: Journal) -> None:
    for number in range(40):
        names = [f"r{number}.{one}" for one in range(20)]
        await asyncio.gather(*(journal.held(name, ORG, 5, 1) for name in names))
        await asyncio.gather(*(journal.settled(charge(name)) for name in names))
        journal.confirmed(ORG, names)
        assert journal.segments_count <= 2 + SEGMENTS_MAX
    await until(lambda: len(disk.segments) == journal.segments_count <= 2)
    await journal.close()
    assert list(disk.directory.iterdir()) == []


async def test_old_segments_go_when_they_are_needed_no_more_though_nothing_is_written(
    disk: Disk, journal: Journal
) -> None:
    names = [f"r{number}" for number in range(200)]
    for name in names:
        await journal.settled(charge(name))
    assert len(disk.segments) >= 3
    journal.confirmed(ORG, names)
    await until(lambda: len(disk.segments) == 1)


@pytest.mark.parametrize("long_ones", [1, 200])
async def test_requests_that_run_for_long_keep_no_old_segments_alive(
    disk: Disk, journal: Journal, long_ones: int
) -> None:
    """Two hundred are more than a segment of this size has room for."""
    await asyncio.gather(*(journal.held(f"long{number}", ORG, 5, 1) for number in range(long_ones)))
    needed_bytes = disk.size
    most = 0
    for number in range(80):
        names = [f"r{number}.{one}" for one in range(20)]
        await asyncio.gather(*(journal.settled(charge(name)) for name in names))
        journal.confirmed(ORG, names)
        most = max(most, journal.segments_count)
    # Beside it there is what is just being carried on.
    assert most <= SEGMENTS_MAX + 2 * needed_bytes / 4096 + 4 < 80 * 20 * 70 / 4096
    dies(journal)
    _, posted = await recovered(disk.directory)
    orphans = {name for name, (kind, _) in posted.kinds().items() if kind == "orphan"}
    assert orphans == {f"long{number}" for number in range(long_ones)}


async def test_the_end_of_a_request_is_not_deleted_before_its_beginning(
    disk: Disk, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    await journal.held("r1", ORG, 5, 1)
    unlink = Path.unlink

    def kept(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00000001.log":
            raise PermissionError("it stays")
        unlink(path, missing_ok)

    async def fill(count: int) -> None:
        for number in range(count):
            await journal.settled(charge(f"{number}"))
            journal.confirmed(ORG, [f"{number}"])

    with monkeypatch.context() as spoiled, capture_logs() as lines:
        spoiled.setattr(Path, "unlink", kept)
        await fill(80)
        assert len(disk.segments) == 2
        await journal.settled(charge("r1", 0))
        await fill(200)
        dies(journal)
        assert len(disk.segments) >= 3
        assert [line["event"] for line in lines] == ["journal segment not deleted"]
    _, posted = await recovered(disk.directory)
    assert posted.kinds()["r1"] == ("settle", 0)


@pytest.mark.parametrize("seed", range(12))
async def test_whenever_a_process_dies_its_journal_knows_what_was_open_and_owed(disk: Disk, seed: int) -> None:
    dice = random.Random(seed)
    journal = Journal(disk.directory, terms(segment_bytes=dice.choice((100, 700, 4096))))
    await journal.open()
    held: set[str] = set()
    owed: dict[str, int] = {}
    done: set[str] = set()

    async def work(worker: int) -> None:
        for number in range(dice.randrange(40)):
            name = f"w{worker}.{number}"
            await journal.held(name, ORG, 100, 7)
            held.add(name)
            if dice.random() < 0.1:
                continue
            ucredits = dice.choice((0, 3, 50))
            await journal.settled(charge(name, ucredits))
            held.remove(name)
            owed[name] = ucredits
            if ucredits and dice.random() < 0.2:
                continue
            if ucredits:
                journal.confirmed(ORG, [name])
            done.add(name)
            del owed[name]

    await asyncio.gather(*(work(worker) for worker in range(6)))
    dies(journal)
    assert len(left(disk.directory)) == bool(held or owed or done)
    found, posted = await recovered(disk.directory)
    kinds = posted.kinds()
    assert {name for name, (kind, _) in kinds.items() if kind == "orphan"} == held
    assert {name: kinds.get(name) for name in owed} == {name: ("settle", ucredits) for name, ucredits in owed.items()}
    assert {kinds[name][0] for name in done if name in kinds} <= {"settle"}
    assert found.broken_lines == 0
    assert list(disk.directory.iterdir()) == []

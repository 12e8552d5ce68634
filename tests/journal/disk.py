"""The disk under a journal, as far as a test wants to know or to spoil it, and processes that die."""

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from gateway.journal import Journal, Terms
from gateway.journal.files import Dead, find_dead
from gateway.journal.recovery import Recovered
from gateway.types import Entry

ORG = "acme"


class Disk:
    """Every sync is counted, waits for `open`, as does what there is no room for, and leaves in `synced` what would
    survive a loss of power."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.syncs = 0
        self.synced = b""
        self.open = threading.Event()
        self.open.set()
        #: Bytes that may still be written; None: as many as there are.
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr("gateway.journal.files._sync", self._sync)
        monkeypatch.setattr(os, "write", self._checked_write)

    @property
    def files(self) -> list[Path]:
        """Of every process, also what is not seen by others."""
        # os.walk, since directories come and go meanwhile.
        return sorted(Path(where, name) for where, _, names in os.walk(self.directory) for name in names)

    @property
    def segments(self) -> list[Path]:
        return [path for path in self.files if path.suffix == ".log"]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.segments if path.exists())

    def _sync(self, fd: int) -> None:
        self.open.wait(10)
        os.fsync(fd)
        self.syncs += 1
        self.synced = b"".join(path.read_bytes() for path in self.segments)

    def _checked_write(self, fd: int, data: bytes) -> int:
        if self.room is None:
            return self._write(fd, data)
        if not self.room:
            self.open.wait(10)
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(fd, data[: self.room])
        self.room -= written
        return written


def terms(segment_bytes: int = 4096, on_expiry: str = "checkpoint") -> Terms:
    return Terms(on_expiry=on_expiry, orphan_after_ms=0, segment_bytes=segment_bytes)


def charge(request_id: str, ucredits: int = 1, org_id: str = ORG) -> Entry:
    return Entry(org_id, request_id, "settle", -ucredits, {"basis": "exact"})


def dies(journal: Journal) -> None:
    """Its process is no more, and said nothing: its files are as they were, its lock is gone."""
    assert journal._thread is not None
    if journal._writing is not None:
        journal._writing.cancel()
    journal._thread.shutdown()
    journal._thread = None
    journal._files.close(keep=True)


class Posted(list[Entry]):
    """A ledger that only remembers."""

    async def __call__(self, entries: Sequence[Entry]) -> None:
        self += entries

    def kinds(self) -> dict[str, tuple[str, int]]:
        """By request: how it was posted, and for how much."""
        return {entry.request_id: (entry.kind, -entry.amount_ucredits) for entry in self}


async def recovered(directory: Path, on_expiry: str = "checkpoint") -> tuple[Recovered, Posted]:
    """What the next process makes of what is there."""
    posted = Posted()
    return await Journal(directory, terms(on_expiry=on_expiry)).recover(posted), posted


def left(directory: Path) -> list[Dead]:
    """What nobody who lives looks after; others may take it all the same."""
    dead = find_dead(directory)
    for one in dead:
        one.let_go()
    return dead

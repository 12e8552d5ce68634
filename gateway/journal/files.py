"""The journal's files: a directory for each process, locked while it lives, with segments in it.

Everything here blocks, and runs in one thread of its own.
"""

import contextlib
import fcntl
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"
SEGMENT = "*.log"
#: macOS has no fdatasync.
_sync = getattr(os, "fdatasync", os.fsync)


@dataclass(eq=False, slots=True)
class Segment:
    """One file of the journal."""

    path: Path
    written_bytes: int = 0


class Files:
    """Appends to the newest segment; after any failure to a new one, since nobody knows what the old one has."""

    def __init__(self, directory: Path, segment_bytes: int) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._lock: int | None = None
        self._fd: int | None = None
        self._current: Segment | None = None
        self._number = 0
        #: Of this process; made with the first write.
        self.home: Path | None = None

    def append(self, data: bytes) -> Segment:
        """`data` is on the disk, all in the segment returned. Raises OSError; then nobody knows what of it is."""
        try:
            if self._current is None or self._current.written_bytes >= self._segment_bytes:
                self._begin_segment()
            assert self._current is not None and self._fd is not None
            if os.fstat(self._fd).st_nlink == 0:
                self._leave_home()
                raise FileNotFoundError(f"{self._current.path} was deleted")
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            _sync(self._fd)
        except OSError:
            self._give_up_segment()
            raise
        self._current.written_bytes += len(data)
        return self._current

    def _begin_segment(self) -> None:
        self._end_segment()
        if self.home is None:
            self._make_home()
        assert self.home is not None
        self._number += 1
        path = self.home / f"{self._number:08}.log"
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            self._leave_home()
            raise
        self._current = Segment(path)
        _sync_directory(self.home)

    def _give_up_segment(self) -> None:
        """Nothing is appended to it any more. One that nothing counts in is gone: a disk that stays full must not fill
        with them."""
        segment = self._current
        self._end_segment()
        if segment is not None and not segment.written_bytes:
            with contextlib.suppress(OSError):
                segment.path.unlink(missing_ok=True)

    def _end_segment(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd = self._current = None

    def _make_home(self) -> None:
        """Nobody sees it before it is locked, or it would be taken for a dead process's."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{time.time_ns() // 1_000_000:x}-{os.getpid()}-{secrets.token_hex(4)}"
        unseen = self._directory / f".{name}"
        unseen.mkdir(mode=0o700)
        try:
            self._lock = os.open(unseen / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.home = unseen.rename(self._directory / name)
        except OSError:
            self._leave_home()
            with contextlib.suppress(OSError):
                remove(unseen)
            raise
        _sync_directory(self._directory)

    def _leave_home(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self.home = None

    def close(self, *, keep: bool) -> None:
        """Nothing is open any more; without `keep` nothing is left of it either."""
        self._end_segment()
        try:
            if self.home is not None and not keep:
                remove(self.home)
        finally:
            self._leave_home()


@dataclass(frozen=True, slots=True)
class Dead:
    """What a process left that is no more. Locked by us, so that nobody else takes it."""

    home: Path
    lock: int

    def read(self) -> bytes:
        """All its segments, in order. Raises OSError."""
        # A segment may end in the middle of a line.
        return b"\n".join(path.read_bytes() for path in _segments(self.home))

    def remove(self) -> None:
        """It is gone."""
        remove(self.home)

    def let_go(self) -> None:
        """Others may take it."""
        os.close(self.lock)


def find_dead(directory: Path) -> list[Dead]:
    """What dead processes left. Raises OSError; then nothing is locked."""
    dead: list[Dead] = []
    try:
        for home in sorted(directory.iterdir()) if directory.is_dir() else ():
            if not home.name.startswith(".") and (lock := _locked(home)) is not None:
                dead.append(Dead(home, lock))
    except OSError:
        for one in dead:
            one.let_go()
        raise
    return dead


def _locked(home: Path) -> int | None:
    """The lock of a process's directory; None when it lives, or nothing is left of it."""
    try:
        lock = os.open(home / LOCK, os.O_WRONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    if os.fstat(lock).st_nlink == 0:
        # Somebody else took it, and has removed it since we opened it.
        os.close(lock)
        return None
    return lock


def delete(segment: Segment) -> None:
    """The segment is gone, for good before the next one goes. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        segment.path.unlink()
        _sync_directory(segment.path.parent)


def remove(home: Path) -> None:
    """A process's directory is gone, its segments oldest first, its lock last. Raises OSError."""
    for path in _segments(home):
        delete(Segment(path))
    (home / LOCK).unlink(missing_ok=True)
    home.rmdir()


def _segments(home: Path) -> list[Path]:
    return sorted(home.glob(SEGMENT))


def _sync_directory(path: Path) -> None:
    """The names in it are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

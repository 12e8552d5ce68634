"""What a process holds on to, counted before and after: tasks, file descriptors, memory."""

import asyncio
import contextlib
import ctypes
import gc
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.waiting import until

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Remains:
    """Tasks by the name of what they run, and open file descriptors by what they stand for."""

    tasks: Counter[str]
    files: Counter[str]
    #: Sockets to these ports do not count: a store's pool keeps as many as it ever needed at once.
    pooled_ports: frozenset[int]

    @classmethod
    def now(cls, pools: Iterable[str] = ()) -> "Remains":
        """pools: URLs of servers to which connections are kept in a pool of their own."""
        return cls._now(frozenset(urlsplit(url).port or 0 for url in pools))

    @classmethod
    def _now(cls, ports: frozenset[int]) -> "Remains":
        tasks = Counter(_name(task) for task in asyncio.all_tasks())
        pooled = {inode for inode, port in _peers() if port in ports}
        files: Counter[str] = Counter()
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the directory's own descriptor is closed by now
                what = os.readlink(f"/proc/self/fd/{number}")
                if what not in pooled:
                    files[what.partition(":[")[0]] += 1
        return cls(tasks, files, ports)

    def new(self) -> dict[str, int]:
        """What there is now and was not then."""
        now = self._now(self.pooled_ports)
        return dict(now.tasks - self.tasks + (now.files - self.files))

    async def none_new(self, timeout_s: float = 5.0) -> None:
        """Within `timeout_s` there is nothing that was not there then."""
        with contextlib.suppress(AssertionError):
            await until(lambda: not self.new(), timeout_s)
        new = self.new()
        assert new == {}, f"left behind: {new}"


def resident_bytes() -> int:
    """Memory of this process, after everything that can be given back was: no garbage, no free pages of malloc."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def _name(task: "asyncio.Task[object]") -> str:
    coroutine = task.get_coro()
    return getattr(coroutine, "__qualname__", repr(coroutine))


def _peers() -> list[tuple[str, int]]:
    """(descriptor's link, peer's port) of every TCP socket of this network."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return [(f"socket:[{row[9]}]", int(row[2].rpartition(":")[2], 16)) for row in rows]

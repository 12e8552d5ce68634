"""What the kernel knows of a process and all its descendants: CPU time to the nanosecond, memory; and which core they
run on. Linux only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROC = Path("/proc")


def cpu_ns(pid: int) -> int:
    """CPU time, user and system, of every living thread of the tree. Unlike ticks, schedstat has no 10 ms grain."""
    return sum(
        int(text.split()[0]) for member in _tree(pid) for text in _read_all(f"{member}/task", "schedstat") if text
    )


def rss_bytes(pid: int) -> int:
    """Resident memory of the tree; pages that processes share count in each."""
    pages = sum(
        int(text.split()[1]) for member in _tree(pid) for text in [_read(_PROC / str(member) / "statm")] if text
    )
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """What is started inside the block runs on `core` only; None: wherever the kernel likes."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cores() -> tuple[int, int] | tuple[None, None]:
    """Two cores: for who is measured, and for everybody else. None where there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[1], usable[0]) if len(usable) > 1 else (None, None)


def cpu_name() -> str:
    for line in _read(_PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        # "4711 (name, which may hold spaces and parentheses) S 4710 ..."
        fields = _read(path).rpartition(")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    tree = [pid]
    for member in tree:
        tree += children.get(member, [])
    return tree


def _read_all(folder: str, name: str) -> list[str]:
    return [_read(path) for path in (_PROC / folder).glob(f"*/{name}")]


def _read(path: Path) -> str:
    """Empty when the process has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""

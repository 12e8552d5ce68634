"""What dead processes left: charges are posted at once, open holds end when Redis has had its time to end them."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import structlog

from gateway.errors import StoreRefused, StoreUnavailable
from gateway.journal.files import Dead, find_dead
from gateway.journal.lines import Held, decode
from gateway.types import Entry

POST_TOGETHER = 500
RETRY_PAUSE_S = 1.0

Post: TypeAlias = Callable[[Sequence[Entry]], Awaitable[object]]

log = structlog.get_logger("gateway.journal")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found and posted; among the charges those that PostgreSQL had already. broken_lines: those that were not
    whole."""

    processes: int = 0
    charges: int = 0
    orphans: int = 0
    broken_lines: int = 0


@dataclass(frozen=True, slots=True)
class _Left:
    #: Also of requests that were charged nothing: posted, nobody charges them as orphans.
    ends: list[Entry]
    open_holds: list[Held]
    broken_lines: int


async def recover(directory: Path, post: Post, on_expiry: str, orphan_after_ms: int) -> Recovered:
    """Everything that dead processes left in `directory` is posted and gone from it; waits `orphan_after_ms` when holds
    are among it, and as long as `post` raises StoreUnavailable. Raises OSError."""
    dead = await asyncio.to_thread(find_dead, directory)
    found_at_s = time.monotonic()
    try:
        left = [await asyncio.to_thread(_read, one) for one in dead]
        await _post(post, [entry for each in left for entry in each.ends])
        orphans = [_orphan(held, on_expiry) for each in left for held in each.open_holds]
        if orphans:
            await asyncio.sleep(max(0.0, found_at_s + orphan_after_ms / 1000 - time.monotonic()))
            await _post(post, [entry for entry in orphans if entry.amount_ucredits])
        for one in dead:
            await asyncio.to_thread(one.remove)
    finally:
        for one in dead:
            one.let_go()
    charges = sum(entry.amount_ucredits != 0 for each in left for entry in each.ends)
    recovered = Recovered(len(dead), charges, len(orphans), sum(each.broken_lines for each in left))
    if recovered.charges or recovered.orphans:
        log.warning("journals of lost gateways posted", charges=recovered.charges, orphans=recovered.orphans)
    return recovered


def _read(dead: Dead) -> _Left:
    """What still counts of a process's lines: of each request its last end, or its hold when it never ended."""
    ended: dict[tuple[str, str], Entry] = {}
    held: dict[tuple[str, str], Held] = {}
    broken = 0
    for line in decode(dead.read()):
        match line:
            case None:
                broken += 1
            case Held():
                held[line.org_id, line.request_id] = line
            case Entry():
                ended[line.org_id, line.request_id] = line
    return _Left(list(ended.values()), [each for name, each in held.items() if name not in ended], broken)


def _orphan(held: Held, on_expiry: str) -> Entry:
    charges = {"checkpoint": held.owed_ucredits, "hold": held.held_ucredits, "release": 0}
    meta = {"basis": on_expiry, "journal": True}
    return Entry(held.org_id, held.request_id, "orphan", -charges[on_expiry], meta)


async def _post(post: Post, entries: Sequence[Entry]) -> None:
    for at in range(0, len(entries), POST_TOGETHER):
        await _post_batch(post, entries[at : at + POST_TOGETHER])


async def _post_batch(post: Post, entries: Sequence[Entry]) -> None:
    """All are posted but those that PostgreSQL will never take, which are told to a person."""
    while True:
        try:
            await post(entries)
            return
        except StoreRefused as exc:
            if len(entries) == 1:
                log.error("a charge from a journal cannot be posted", entry=repr(entries[0]), error=str(exc))
                return
            for entry in entries:
                await _post_batch(post, [entry])
            return
        except StoreUnavailable as exc:
            log.warning("journals of lost gateways wait", error=str(exc))
            await asyncio.sleep(RETRY_PAUSE_S)

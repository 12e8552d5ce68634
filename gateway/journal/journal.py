"""Appending, so that all who wait at the same time share one fsync, and knowing what is still needed."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from gateway.errors import StoreUnavailable
from gateway.journal.files import Files, delete
from gateway.journal.lines import Held, Line, encode
from gateway.journal.needed import Name, Needed, Written
from gateway.journal.recovery import Recovered, recover
from gateway.types import Entry

SEGMENT_BYTES = 4 * 1024 * 1024
#: Ends of requests that could not be written; beyond it the oldest is forgotten.
KEPT_MAX = 100_000

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")

log = structlog.get_logger("gateway.journal")


@dataclass(frozen=True, slots=True)
class Terms:
    """From `credits:` in gateway.yaml. on_expiry: what a hold costs whose process died, `checkpoint`, `hold` or
    `release`. orphan_after_ms: by then its lease in Redis is over and swept, which knows better what was used."""

    on_expiry: str
    orphan_after_ms: int
    segment_bytes: int = SEGMENT_BYTES


@dataclass(slots=True)
class _Batch:
    """Lines that are written together. `done` is for everybody who waits; `told`: confirmed before they are written."""

    done: asyncio.Future[None]
    lines: list[Written] = field(default_factory=list)
    told: set[Name] = field(default_factory=set)


class Journal:
    """`open()` in the event loop; `held()` and `settled()` return when it is on the disk; `close()` last."""

    def __init__(self, directory: Path, terms: Terms) -> None:
        self._directory = directory
        self._terms = terms
        self._files = Files(directory, terms.segment_bytes)
        self._needed = Needed(terms.segment_bytes)
        self._thread: ThreadPoolExecutor | None = None
        self._next: _Batch | None = None
        self._under_way: _Batch | None = None
        self._writing: asyncio.Task[None] | None = None
        #: To be written with whatever is written next; nobody waits for it.
        self._kept: dict[Name, Written] = {}
        #: Why the last write failed; None after one that worked.
        self.trouble: str | None = None
        self._undeletable: str | None = None

    @property
    def needed_count(self) -> int:
        """Holds that are open and charges that are unconfirmed."""
        return len(self._needed)

    @property
    def segments_count(self) -> int:
        return self._needed.segments_count

    async def open(self) -> None:
        """Lines may come. A directory that cannot be written is told at the first of them, and at each."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")

    async def close(self) -> None:
        """Everything that came is on the disk or was refused; files that are not needed any more are gone."""
        if self._thread is None:
            return
        if self._kept:
            self._waiting()  # they go with a batch of nobody's
        while self._writing is not None:
            await asyncio.wait({self._writing})
        thread, self._thread = self._thread, None
        keep = bool(self._needed)
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().run_in_executor(thread, lambda: self._files.close(keep=keep))
        thread.shutdown(wait=False)

    async def held(self, hold_id: str, org_id: str, held_ucredits: int, owed_ucredits: int) -> None:
        """The hold is on the disk: its request may go on. Raises StoreUnavailable; then it may not."""
        try:
            await self._append(Held(org_id, hold_id, held_ucredits, owed_ucredits))
        except BaseException:
            # It may be there, or may come to be, and nobody will end it.
            self._keep(_written(Entry(org_id, hold_id, "settle", 0)))
            raise

    async def settled(self, entry: Entry) -> None:
        """How the hold ended is on the disk; until `confirmed` it is kept there when it is a charge. Raises
        StoreUnavailable; then it is written as soon as anything can be."""
        try:
            await self._append(entry)
        except StoreUnavailable:
            self._keep(_written(entry))
            raise

    def confirmed(self, org_id: str, request_ids: Iterable[str]) -> None:
        """PostgreSQL has the charges of these requests. Others' requests may be among them."""
        for request_id in request_ids:
            name = (org_id, request_id)
            self._kept.pop(name, None)
            for batch in filter(None, (self._under_way, self._next)):
                batch.told.add(name)
            self._needed.drop(name)
        if self._needed.unneeded is not None:
            self._wake()

    async def recover(self, post: Callable[[Sequence[Entry]], Awaitable[object]]) -> Recovered:
        """What dead processes left in the directory is in the ledger and gone from it. post: any number of times with
        one effect, may raise StoreUnavailable; then it is tried again. Raises OSError."""
        return await recover(self._directory, post, self._terms.on_expiry, self._terms.orphan_after_ms)

    async def _append(self, line: Line) -> None:
        if self._thread is None:
            raise StoreUnavailable(detail="journal: closed")
        written = _written(line)
        batch = self._waiting()
        batch.lines.append(written)
        await asyncio.shield(batch.done)

    def _waiting(self) -> _Batch:
        """The lines that are written next."""
        if self._next is None:
            self._next = _Batch(asyncio.get_running_loop().create_future())
            self._next.done.add_done_callback(_seen)
        batch = self._next
        self._wake()
        return batch

    def _keep(self, line: Written) -> None:
        if len(self._kept) >= KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        self._kept[line.name] = line

    def _wake(self) -> None:
        if self._writing is None and self._thread is not None:
            self._writing = asyncio.create_task(self._write(), name="journal")

    async def _write(self) -> None:
        """Whatever waits is written, and what came meanwhile, until nothing waits or something fails."""
        try:
            worked = True
            while worked and (self._next is not None or self._needed.carried()):
                worked = await self._write_once()
                await self._delete_unneeded()
            await self._delete_unneeded()
        finally:
            self._under_way = self._writing = None
            if self._next is not None:
                self._wake()

    async def _write_once(self) -> bool:
        batch = self._under_way = self._waiting()
        self._next = None
        # In this order: what is carried on was there before, and its end may be among the others.
        kept, self._kept = self._kept, {}
        lines = [*self._needed.carried(), *kept.values(), *batch.lines]
        try:
            segment = await self._in_thread(self._files.append, b"".join(line.data for line in lines))
        except BaseException as exc:
            self._kept = {name: line for name, line in kept.items() if name not in batch.told} | self._kept
            reason = f"{type(exc).__name__}: {exc}"
            batch.done.set_exception(StoreUnavailable(detail=f"journal {self._directory}: {reason}"))
            if not isinstance(exc, OSError):
                raise
            if self.trouble != reason:  # one line per change, not one per request
                log.error("journal cannot be written", directory=str(self._directory), error=reason)
            self.trouble = reason
            return False
        if self.trouble is not None:
            log.info("journal is written again")
            self.trouble = None
        self._needed.add(segment, (line for line in lines if line.name not in batch.told))
        batch.done.set_result(None)
        return True

    def _in_thread(self, work: Callable[[_Given], _Result], given: _Given) -> asyncio.Future[_Result]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, given)

    async def _delete_unneeded(self) -> None:
        """Oldest first: what is newer may have the end of what begins there. What cannot be is tried again."""
        while (segment := self._needed.unneeded) is not None:
            try:
                await self._in_thread(delete, segment)
            except OSError as exc:
                if self._undeletable != str(exc):
                    log.error("journal segment not deleted", error=str(exc))
                self._undeletable = str(exc)
                return
            self._undeletable = None
            self._needed.forget_oldest()


def _written(line: Line) -> Written:
    return Written((line.org_id, line.request_id), encode(line), isinstance(line, Held) or line.amount_ucredits != 0)


def _seen(done: asyncio.Future[None]) -> None:
    """Its failure is no news, even when all who waited for it have gone."""
    if not done.cancelled():
        done.exception()

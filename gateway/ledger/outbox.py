"""The way of a charge from Redis to PostgreSQL: read, post, commit, and only then delete.

Any gateway may carry any org's entries, several may carry the same: posting is idempotent (`gateway.post`), and
`applied.lua` subtracts exactly what it finds still there. A crash at any point means that it is done again.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from gateway import keys, limits
from gateway.errors import StoreLocked, StoreRefused, StoreUnavailable
from gateway.ledger import books
from gateway.ledger.rounds import Rounds
from gateway.stores import INCARNATION, Postgres, Redis, Script
from gateway.types import Balance, Entry

RETRY_PAUSE_MAX_S = 1.0
#: An older PostgreSQL goes on once; each time more, a late state of what it has forgotten came between.
ROUNDS_MAX = 5

log = structlog.get_logger("gateway.outbox")


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A ledger entry and the id it is deleted by once it is posted."""

    entry_id: str
    entry: Entry


class Outbox:
    """Carries entries every `flush_ms`, or as soon as `batch_max` of them wait; that many in one transaction.

    `confirmed` is told the org and its requests whose charges are in PostgreSQL, before Redis is."""

    def __init__(
        self,
        redis: Redis,
        postgres: Postgres,
        *,
        flush_ms: int,
        batch_max: int,
        mirror_ttl_s: int,
        confirmed: Callable[[str, Sequence[str]], None] = lambda org_id, request_ids: None,
    ) -> None:
        self._redis = redis
        self._postgres = postgres
        self._flush_s = flush_ms / 1000
        self._batch_max = batch_max
        self._mirror_ttl_s = mirror_ttl_s
        self._confirmed = confirmed
        self._applied = Script("applied", limits.script_text("applied"))
        self._dirty: set[str] = set()
        #: Marks since the last flush began: about as many entries wait.
        self._marks = 0
        self._enough = asyncio.Event()
        self._carries = Rounds(self._carry)
        #: The last flush before the end waits for the one that is under way, which would be cancelled half done.
        self._flushing = asyncio.Lock()
        #: Entries posted by this process since it started.
        self.posted_count = 0

    def mark(self, org_id: str) -> None:
        """This org has something to post."""
        self._dirty.add(org_id)
        self._marks += 1
        if self._marks >= self._batch_max:
            self._enough.set()

    async def run(self) -> None:
        """Flush for ever; a store that is away delays the work and loses nothing."""
        pause_s = self._flush_s
        failing = False
        while True:
            await self._pause(pause_s, failing)
            try:
                await self.flush()
            except StoreUnavailable as exc:
                if not failing:
                    log.warning("outbox waits", error=str(exc))
                failing, pause_s = True, min(RETRY_PAUSE_MAX_S, pause_s * 2)
            else:
                if failing:
                    log.info("outbox flows again")
                failing, pause_s = False, self._flush_s

    async def _pause(self, pause_s: float, failing: bool) -> None:
        if failing:
            await asyncio.sleep(pause_s)
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._enough.wait()

    async def carry(self, org_id: str) -> None:
        """Whatever of the org waited when this was called is posted, and Redis knows. One flush serves all who ask
        meanwhile. Raises StoreUnavailable."""
        await self._carries.join(org_id)

    async def _carry(self, org_id: str) -> None:
        self._dirty.add(org_id)
        await self.flush()

    async def flush(self) -> int:
        """Everything that was waiting for the marked orgs is posted, but for those whose part of a cluster is away;
        returns the number of entries. Raises StoreUnavailable when there is nobody to ask. What was not posted stays
        marked."""
        async with self._flushing:
            self._marks = 0
            self._enough.clear()
            return await self._flush()

    async def _flush(self) -> int:
        count = 0
        # Who settles from now on is carried by the next flush, or this one might never end.
        waiting = set(self._dirty)
        while waiting:
            orgs = sorted(waiting)[: self._batch_max]
            waiting.difference_update(orgs)
            # Unmarked before they are read: an org that settles meanwhile marks itself again.
            self._dirty.difference_update(orgs)
            try:
                share = max(1, self._batch_max // len(orgs))
                found, unread = await self._read(orgs, share)
                self._dirty |= unread
                batch, balances = await self._post(found)
                by_org = _by_org(batch)
                for org_id, items in by_org.items():
                    # What a sweeper charged is not how the request ended: its gateway may settle yet.
                    self._confirmed(org_id, [item.entry.request_id for item in items if item.entry.kind == "settle"])
                await self._apply(by_org, {balance.org_id: balance for balance in balances})
            except BaseException:
                self._dirty.update(orgs)
                raise
            count += len(batch)
            self.posted_count += len(batch)
            carried = Counter(item.entry.org_id for item in batch)
            more = {org_id for org_id, entries in carried.items() if entries >= share}
            self._dirty |= more
            waiting |= more
        return count

    async def _read(self, orgs: Sequence[str], share: int) -> tuple[list[OutboxEntry], set[str]]:
        """At most `share` of the oldest entries of each org, in one round trip, and the orgs that could not be asked
        for. Raises StoreUnavailable when none could."""
        found = await asyncio.gather(*(self._read_org(org_id, share) for org_id in orgs), return_exceptions=True)
        entries: list[OutboxEntry] = []
        unread: set[str] = set()
        for org_id, items in zip(orgs, found, strict=True):
            if isinstance(items, StoreUnavailable):
                unread.add(org_id)
            elif isinstance(items, BaseException):
                raise items
            else:
                entries += items
        if len(unread) == len(orgs) and isinstance(found[0], StoreUnavailable):
            raise found[0]
        return entries, unread

    async def _read_org(self, org_id: str, share: int) -> list[OutboxEntry]:
        try:
            entries = await self._redis.call("XRANGE", keys.outbox(org_id), "-", "+", "COUNT", share)
        except StoreRefused as exc:
            # Somebody else's value under our name: a matter for a person, and for this org alone.
            log.error("an outbox cannot be read", org=org_id, error=str(exc))
            return []
        return [_read_entry(org_id, entry_id, fields) for entry_id, fields in entries]

    async def _post(self, batch: list[OutboxEntry]) -> tuple[list[OutboxEntry], list[Balance]]:
        """What of `batch` is in the ledger now, and the balances after it. An entry that the ledger refuses stays
        where it is, for a person to look at; it never keeps back the others."""
        if not batch:
            return [], []
        try:
            return batch, await books.post(self._postgres, [item.entry for item in batch])
        except StoreLocked as exc:
            return await self._post_unlocked(batch, exc)
        except StoreRefused as exc:
            if len(batch) == 1:
                entry = batch[0].entry
                log.error("the ledger refuses a charge", org=entry.org_id, hold=entry.request_id, error=str(exc))
                return [], []
        middle = len(batch) // 2
        older, balances = await self._post(batch[:middle])
        newer, later = await self._post(batch[middle:])
        return older + newer, balances + later

    async def _post_unlocked(
        self, batch: list[OutboxEntry], locked: StoreLocked
    ) -> tuple[list[OutboxEntry], list[Balance]]:
        """Somebody keeps a lock on the row of an org: the others do not wait for that, and it is tried again."""
        orgs = {item.entry.org_id for item in batch}
        free = await books.unlocked(self._postgres, orgs)
        if not free or free == orgs:
            raise locked
        self._dirty |= orgs - free
        log.warning("charges wait for locked rows", orgs=len(orgs - free), first_org=min(orgs - free))
        rest = [item for item in batch if item.entry.org_id in free]
        return rest, await books.post(self._postgres, [item.entry for item in rest])

    async def _apply(self, by_org: dict[str, list[OutboxEntry]], balances: dict[str, Balance]) -> None:
        """Redis waits for these entries no longer. Raises StoreUnavailable when it could not be told of all."""

        tellings = (self._tell(balances[org_id], items) for org_id, items in by_org.items())
        told = await asyncio.gather(*tellings, return_exceptions=True)
        for org_id, failure in zip(by_org, told, strict=True):
            if isinstance(failure, StoreRefused):
                # As above: what is posted will be posted again without effect, until a person has looked.
                log.error("an outbox cannot be emptied", org=org_id, error=str(failure))
            elif failure is not None:
                raise failure

    async def _tell(self, balance: Balance, items: list[OutboxEntry]) -> None:
        org_id = balance.org_id
        for _ in range(ROUNDS_MAX):
            status, _, version, epoch = await self._redis.run(
                self._applied,
                [keys.account(org_id), keys.outbox(org_id), keys.mirror(org_id)],
                [
                    *limits.state_row(balance),
                    limits.mirror_ttl_s(self._mirror_ttl_s),
                    *(item.entry_id for item in items),
                    INCARNATION,
                ],
            )
            if status == b"OK":
                return
            if status == b"OLDER":
                log.error("postgres is older than redis knows it, was it restored?", org=org_id)
            balance = await books.go_on_after(self._postgres, org_id, int(version), int(epoch))
        raise StoreUnavailable(detail=f"postgres is older than redis knows the account of {org_id}")

    async def close(self) -> None:
        await self._carries.close()


def _by_org(batch: Sequence[OutboxEntry]) -> dict[str, list[OutboxEntry]]:
    by_org: dict[str, list[OutboxEntry]] = {}
    for item in batch:
        by_org.setdefault(item.entry.org_id, []).append(item)
    return by_org


def _read_entry(org_id: str, entry_id: bytes, fields: list[bytes]) -> OutboxEntry:
    values = dict(zip(fields[::2], fields[1::2], strict=True))
    entry = Entry(
        org_id=org_id,
        request_id=values[b"r"].decode(),
        kind=values[b"k"].decode(),
        amount_ucredits=-int(values[b"a"]),
        meta=msgspec.json.decode(values[b"m"]),
    )
    return OutboxEntry(entry_id.decode(), entry)

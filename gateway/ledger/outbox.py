"""The way of a charge from Redis to PostgreSQL: read, post, commit, and only then delete.

Any gateway may carry any org's entries, several may carry the same: posting is idempotent (`gateway.post`), and
`applied.lua` subtracts exactly what it finds still there. A crash at any point means that it is done again.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from gateway import keys, limits
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger.queries import query
from gateway.stores import Postgres, Redis, Script
from gateway.types import Balance, Entry

POST_TIMEOUT_MS = 5_000
RETRY_PAUSE_MAX_S = 1.0

log = structlog.get_logger("gateway.outbox")


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A ledger entry and the id it is deleted by once it is posted."""

    entry_id: str
    entry: Entry


async def post(postgres: Postgres, entries: Sequence[Entry]) -> list[Balance]:
    """The entries are in the ledger; returns the balance of every org named. Repeating it changes nothing."""
    rows = await postgres.rows(
        query("post"),
        [entry.org_id for entry in entries],
        [entry.request_id for entry in entries],
        [entry.kind for entry in entries],
        [entry.amount_ucredits for entry in entries],
        [_json(entry.meta) for entry in entries],
        timeout_ms=POST_TIMEOUT_MS,
    )
    return [Balance(row["org_id"], row["balance"], row["version"]) for row in rows]


class Outbox:
    """Carries entries every `flush_ms`, at most `batch_max` in one transaction."""

    def __init__(self, redis: Redis, postgres: Postgres, *, flush_ms: int, batch_max: int, mirror_ttl_s: int) -> None:
        self._redis = redis
        self._postgres = postgres
        self._flush_s = flush_ms / 1000
        self._batch_max = batch_max
        self._mirror_ttl_s = mirror_ttl_s
        self._applied = Script("applied", limits.script_text("applied"))
        self._dirty: set[str] = set()
        #: The last flush before the end waits for the one that is under way, which would be cancelled half done.
        self._flushing = asyncio.Lock()
        #: Entries posted by this process since it started.
        self.posted_count = 0

    def mark(self, org_id: str) -> None:
        """This org has something to post."""
        self._dirty.add(org_id)

    async def run(self) -> None:
        """Flush for ever; a store that is away delays the work and loses nothing."""
        pause_s = self._flush_s
        failing = False
        while True:
            await asyncio.sleep(pause_s)
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

    async def flush(self) -> int:
        """Everything that was waiting for the marked orgs is posted, but for those whose part of a cluster is away;
        returns the number of entries. Raises StoreUnavailable when there is nobody to ask. What was not posted stays
        marked."""
        async with self._flushing:
            return await self._flush()

    async def _flush(self) -> int:
        count = 0
        away: set[str] = set()
        while waiting := self._dirty - away:
            orgs = sorted(waiting)[: self._batch_max]
            # Unmarked before they are read: an org that settles meanwhile marks itself again.
            self._dirty.difference_update(orgs)
            try:
                share = max(1, self._batch_max // len(orgs))
                found, unread = await self._read(orgs, share)
                away |= unread
                self._dirty |= unread
                batch, balances = await self._post(found)
                await self._apply(batch, {balance.org_id: balance for balance in balances})
            except BaseException:
                self._dirty.update(orgs)
                raise
            count += len(batch)
            carried = Counter(item.entry.org_id for item in batch)
            self._dirty.update(org_id for org_id, entries in carried.items() if entries >= share)
        self.posted_count += count
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
            return batch, await post(self._postgres, [item.entry for item in batch])
        except StoreRefused as exc:
            if len(batch) == 1:
                entry = batch[0].entry
                log.error("the ledger refuses a charge", org=entry.org_id, hold=entry.request_id, error=str(exc))
                return [], []
        middle = len(batch) // 2
        older, balances = await self._post(batch[:middle])
        newer, later = await self._post(batch[middle:])
        return older + newer, balances + later

    async def _apply(self, batch: Iterable[OutboxEntry], balances: dict[str, Balance]) -> None:
        by_org: dict[str, list[str]] = {}
        for item in batch:
            by_org.setdefault(item.entry.org_id, []).append(item.entry_id)
        for org_id, ids in by_org.items():
            # An org without a row has gone to the dead letters: nothing is owed any more.
            balance = balances.get(org_id, Balance(org_id, 0, 0))
            await self._redis.run(
                self._applied,
                [keys.account(org_id), keys.outbox(org_id), keys.mirror(org_id)],
                [balance.ucredits, balance.version, self._mirror_ttl_s, *ids],
            )


def _json(meta: Mapping[str, Any]) -> str:
    """`meta` as jsonb takes it: a client may name a model with a NUL in it, which PostgreSQL cannot store."""
    clean = {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in meta.items()}
    return msgspec.json.encode(clean).decode()


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

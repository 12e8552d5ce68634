"""Charges that Redis was told and PostgreSQL does not have yet, as far as this process knows.

settled ──posted by our own flusher─────────────────────────────▶ forgotten
    ├───another's: the account is the same, the entry is gone────▶ forgotten
    └───the account is another, or Redis is away: may be lost────▶ posted from here, then forgotten
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import structlog

from gateway import keys, limits
from gateway.admission.posting import posted
from gateway.admission.powers import Powers
from gateway.errors import StoreUnavailable
from gateway.stores import INCARNATION, Redis, Script
from gateway.types import Entry

ASK_EVERY_S = 1.0
#: Orgs asked after in one go; the others have their turn a second later.
ORGS_AT_ONCE = 500

log = structlog.get_logger("gateway.settling")


@dataclass(frozen=True, slots=True)
class _Charge:
    entry: Entry
    #: Of the account that it was settled into; empty when that cannot be relied on.
    birth: bytes
    #: In the outbox of that account.
    outbox_id: tuple[int, ...]
    at_s: float


class Unconfirmed:
    """Bounded by whoever asks its length before there are more. State: by org and request, in the order of asking."""

    def __init__(self, redis: Redis, powers: Powers) -> None:
        self._redis = redis
        self._powers = powers
        self._script = Script("confirm", limits.script_text("confirm"))
        self._by_org: dict[str, dict[str, _Charge]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, entry: Entry, birth: bytes, outbox_id: bytes) -> None:
        """Redis has this charge in the outbox of the account born as `birth`; without birth or id, nobody knows where
        it has it."""
        charges = self._by_org.setdefault(entry.org_id, {})
        self._count += entry.request_id not in charges
        place = _order(outbox_id) if outbox_id else ()
        charges[entry.request_id] = _Charge(entry, birth if place else b"", place, time.monotonic())

    def confirmed(self, org_id: str, request_ids: Sequence[str]) -> None:
        """PostgreSQL has what these requests were charged. Others' may be among them."""
        if (charges := self._by_org.get(org_id)) is not None:
            for request_id in request_ids:
                self._count -= charges.pop(request_id, None) is not None
            if not charges:
                del self._by_org[org_id]
        if (journal := self._powers.journal) is not None:
            journal.confirmed(org_id, request_ids)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(ASK_EVERY_S)
            await self.ask(time.monotonic() - ASK_EVERY_S)

    async def ask(self, before_s: float) -> None:
        """What was charged before that (monotonic time) was asked after; what Redis may have lost is in PostgreSQL.
        What no store could tell is left for the next time."""
        old = (org for org, charges in self._by_org.items() if next(iter(charges.values())).at_s <= before_s)
        orgs = list(islice(old, ORGS_AT_ONCE))
        if not self._redis.usable:
            await self._post_quietly([entry for org_id in orgs for entry in self._entries(org_id)])
            return
        for org_id in orgs:
            if org_id in self._by_org:
                self._by_org[org_id] = self._by_org.pop(org_id)  # behind the others
        await asyncio.gather(*map(self._ask, orgs))

    async def _ask(self, org_id: str) -> None:
        known = list(self._by_org.get(org_id, {}).values())
        try:
            birth, oldest = await self._redis.run(
                self._script, [keys.account(org_id), keys.outbox(org_id)], [INCARNATION]
            )
        except StoreUnavailable as exc:
            log.debug("charges not confirmed", org=org_id, error=str(exc))
            return
        first = _order(oldest) if oldest else None
        there = [one for one in known if one.birth and one.birth == birth]
        gone = [one.entry.request_id for one in there if first is None or one.outbox_id < first]
        if gone:
            self.confirmed(org_id, gone)
        await self._post_quietly([one.entry for one in known if one.birth != birth or not birth])

    async def resubmit(self, org_id: str) -> None:
        """PostgreSQL has all that this process has charged the org. Raises StoreUnavailable when that is not so."""
        await self._post(self._entries(org_id))

    async def post_all(self) -> None:
        """The same for every org."""
        await self._post([entry for org_id in list(self._by_org) for entry in self._entries(org_id)])

    def _entries(self, org_id: str) -> list[Entry]:
        return [one.entry for one in self._by_org.get(org_id, {}).values()]

    async def _post_quietly(self, entries: Sequence[Entry]) -> None:
        try:
            await self._post(entries)
        except StoreUnavailable as exc:
            log.debug("charges not posted", count=len(entries), error=str(exc))

    async def _post(self, entries: Sequence[Entry]) -> None:
        async for part, _ in posted(self._powers.post, entries):
            for org_id, request_ids in by_org(part):
                self.confirmed(org_id, request_ids)
                self._powers.refresh(org_id)


def by_org(entries: Iterable[Entry]) -> Iterable[tuple[str, list[str]]]:
    """The requests of each org."""
    requests: dict[str, list[str]] = {}
    for entry in entries:
        requests.setdefault(entry.org_id, []).append(entry.request_id)
    return requests.items()


def _order(outbox_id: bytes) -> tuple[int, ...]:
    """Ids of a stream in their order: `1719230405060-3`."""
    return tuple(int(part) for part in outbox_id.split(b"-"))

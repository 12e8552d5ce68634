"""Limits that apply to one org instead of its policy's: all in memory, followed in PostgreSQL.

Owns what is known of `gateway.limit_override`, and how soon a change is known. Does not know what a limit is: a name
that no limit of the org's policy has changes nothing. Values are in the unit of the policy file, credits are whole.

| state                                     | what `of` answers                                                      |
|-------------------------------------------|------------------------------------------------------------------------|
| not read since the start                  | nothing: limits apply as the policies write them                       |
| PostgreSQL is away                        | what was known last                                                    |
| a change is announced                     | the new state, one read later                                          |
| announcements do not reach us             | the new state, after POLL_S and a read at most                         |
| listening anew, or a backup was restored  | all is read again; each org changes when it is read, the gone ones last |

Every change gives the orgs it touches the next version, and versions become visible in their order (migration 0002). So
there is one way to read, orgs by version from the last one seen, whatever the reason; and one reader, so no answer ever
overtakes another.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import TypeAlias

import structlog

from gateway.errors import StoreUnavailable
from gateway.stores import Postgres, Row

#: Channel on which the database announces the org whose overrides changed; an empty text stands for several.
CHANNEL = "gateway_limits"

#: Transaction-pooling proxies lose announcements. Below a second, so that a change takes effect within one there too.
POLL_S = 0.8
#: Reads begin at least so far apart: a stream of changes costs 50 statements per second, not one for each.
APART_S = 0.02
RETRY_PAUSE_MIN_S = 0.1
RETRY_PAUSE_MAX_S = 2.0
READ_TIMEOUT_MS = 2_000
#: Orgs in one answer; the database allows each 64 overrides.
PAGE_ORGS = 500

#: $1, $2: the place to read on from; $3: how many orgs. One row per override, one without a name for an org that has
#: none, and one without an org when nothing is new.
READ_SQL = """
WITH changed AS (
    SELECT org_id, version FROM gateway.limit_override_change
     WHERE (version, org_id) > ($1::bigint, $2::text) ORDER BY version, org_id LIMIT $3
)
SELECT latest.version AS latest, c.org_id, c.version, o.limit_name, o.value
  FROM gateway.limit_override_version AS latest
  LEFT JOIN changed AS c ON true
  LEFT JOIN gateway.limit_override AS o ON o.org_id = c.org_id
 ORDER BY c.version, c.org_id
"""

#: Version and org: everything up to here has been read.
Place: TypeAlias = tuple[int, str]
BEGINNING: Place = (0, "")
#: Of every org without overrides, so nobody must be able to put one in.
NONE: Mapping[str, int] = MappingProxyType({})

log = structlog.get_logger("gateway.overrides")


@dataclass(frozen=True, slots=True)
class _Page:
    """Orgs in order of their versions, each with all of its overrides."""

    orgs: Sequence[tuple[str, Mapping[str, int]]]
    end: Place
    #: The newest version there is; less than what was read before when the database is not the one it was.
    latest: int

    @property
    def is_last(self) -> bool:
        return len(self.orgs) < PAGE_ORGS


class Overrides:
    """`of` answers from memory at once; `run` keeps that up to date.

    entries_max: overrides kept. An org whose overrides do not fit has the limits of its policy.
    """

    def __init__(self, postgres: Postgres, *, entries_max: int) -> None:
        self._postgres = postgres
        self._entries_max = entries_max
        #: Orgs that have any. The mappings never change, they are replaced.
        self._by_org: dict[str, Mapping[str, int]] = {}
        self._place = BEGINNING
        self._all_stale = True
        self._wake = asyncio.Event()
        #: Some org was left out for want of room.
        self._is_overfull = False
        #: Everything has been read once since the start.
        self.known = False
        #: Overrides kept.
        self.count = 0

    def of(self, org_id: str) -> Mapping[str, int]:
        """Values by name of the limit; empty for most orgs. The same object until the org's overrides change."""
        return self._by_org.get(org_id, NONE)

    @property
    def trouble(self) -> str | None:
        """Why limits may not be what the database says; None when they are."""
        if not self.known:
            return "overrides of limits are not read yet: limits are those of the policies"
        if self._is_overfull:
            return f"there are more overrides than limits.overrides_max ({self._entries_max}): not all of them apply"
        return None

    def on_notification(self, _org_id: str) -> None:
        """Somebody changed overrides: they are read now. Whose they are, the database says again."""
        self._wake.set()

    def refresh_all(self) -> None:
        """Everything is read anew: announcements may have been missed, and the database may be another."""
        self._all_stale = True
        self._wake.set()

    async def run(self) -> None:
        """Follow the database for ever; while it is away, what is known stays."""
        retry_s, is_failing = RETRY_PAUSE_MIN_S, False
        while True:
            # Before the read: a change announced while it runs is read again.
            self._wake.clear()
            try:
                await self._catch_up()
            except StoreUnavailable as exc:
                if not is_failing:
                    log.warning("overrides cannot be read", error=str(exc), kept=self.count)
                is_failing, pause_s = True, retry_s
                retry_s = min(retry_s * 2, RETRY_PAUSE_MAX_S)
            else:
                if is_failing:
                    log.info("overrides are read again", kept=self.count)
                is_failing, pause_s, retry_s = False, POLL_S - APART_S, RETRY_PAUSE_MIN_S
            await asyncio.sleep(APART_S)
            await _set_within(self._wake, pause_s)

    async def _catch_up(self) -> None:
        """What was new when this began is known. Raises StoreUnavailable; what was read until then is."""
        whole = self._all_stale
        self._all_stale = False
        place = BEGINNING if whole else self._place
        seen: set[str] = set()
        left_out = False
        try:
            while True:
                page = await self._read(place)
                if page.latest < place[0]:
                    log.warning("overrides are of an older database, all are read again")
                    self.refresh_all()
                    return
                for org_id, overrides in page.orgs:
                    seen.add(org_id)
                    left_out |= not self._put(org_id, overrides)
                place = page.end
                if not whole:
                    self._place = place
                if page.is_last:
                    break
        except BaseException:
            self._all_stale |= whole
            self._note_room(left_out, False)
            raise
        if whole:
            for org_id in [org_id for org_id in self._by_org if org_id not in seen]:
                self._put(org_id, NONE)
            self._place, self.known = place, True
        self._note_room(left_out, whole)

    async def _read(self, place: Place) -> _Page:
        rows = await self._postgres.rows(READ_SQL, *place, PAGE_ORGS, timeout_ms=READ_TIMEOUT_MS)
        if not rows:
            raise StoreUnavailable(detail="postgres: gateway.limit_override_version has lost its row")
        found = [row for row in rows if row["org_id"] is not None]
        end = (found[-1]["version"], found[-1]["org_id"]) if found else place
        orgs = [(org_id, _overrides(of_org)) for org_id, of_org in groupby(found, key=lambda row: str(row["org_id"]))]
        return _Page(orgs, end, rows[0]["latest"])

    def _put(self, org_id: str, overrides: Mapping[str, int]) -> bool:
        """These are the org's overrides now; False when there was no room for them."""
        held = self.of(org_id)
        count = self.count - len(held) + len(overrides)
        fits = not overrides or count <= self._entries_max
        if not fits:
            overrides, count = NONE, self.count - len(held)
        if overrides != held:
            if overrides:
                self._by_org[org_id] = overrides
            else:
                del self._by_org[org_id]
            if self._is_overfull and count < self.count:
                # There is room again for some of those that were left out: looked for with the next read, not at once.
                self._all_stale = True
            self.count = count
        return fits

    def _note_room(self, left_out: bool, whole: bool) -> None:
        if left_out and not self._is_overfull:
            log.error("more overrides than limits.overrides_max, some do not apply", overrides_max=self._entries_max)
        self._is_overfull = left_out or (self._is_overfull and not whole)


def _overrides(rows: Iterable[Row]) -> Mapping[str, int]:
    """The overrides of one org's rows."""
    return {row["limit_name"]: row["value"] for row in rows if row["limit_name"] is not None}


async def _set_within(event: asyncio.Event, timeout_s: float) -> None:
    """The event is set, or the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()

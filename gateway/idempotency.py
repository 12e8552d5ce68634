"""Requests that clients may send again: what is called by an Idempotency-Key is run and charged once.

The table gateway.idempotency says who runs under a key and how it ended; answers are not kept. Durable in PostgreSQL,
so that no loss of Redis makes a request run twice, and without PostgreSQL nothing runs under a key: StoreUnavailable.

    (no row) ──claimed──▶ RUNNING ──ended──▶ FINISHED   it cost or delivered something: whoever sends it again is told
        ▲                    │                          so for a day
        └──cost nothing──────┤
        └──gateway died──────┘  running_until is not moved on any more. A charge that the ledger or Redis knows of makes
                                it FINISHED; a hold that is still open, RUNNING; else the key is free.

The walk asks `key()` and goes on inside `once()`. State: what runs under a key in this process, and what has ended
there without PostgreSQL knowing it yet, bounded.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import structlog

from gateway import keys
from gateway.errors import BadRequest, StoreUnavailable
from gateway.stores import Postgres, Redis
from gateway.telemetry import Record
from gateway.types import UCREDITS_PER_CREDIT, Facts, Outcome, Principal, Refusal

FIELD = b"idempotency-key"
KEY = re.compile(r"[\x21-\x7e]{1,255}")

#: Ends that PostgreSQL was not told of yet; beyond it the oldest is left to its `running_until`.
KEPT_MAX = 100_000
TOGETHER = 1_000
RETRY_PAUSE_S = 0.2
FORGET_EVERY_S = 60.0
WORK_TIMEOUT_MS = 5_000
#: An entry of the outbox that is younger has its tombstone beside it (15 minutes), whatever our clock and Redis's show.
OUTBOX_YOUNG_MS = 450_000
_ENDED = re.compile(rb"(?:settled|orphaned):(\d+)")

_CLAIM = "SELECT * FROM gateway.claim_key($1, $2, $3, $4, $5, $6, $7, $8)"
_END = "SELECT gateway.end_keys($1::text[], $2::bytea[], $3::text[], $4::text[])"
_BEAT = "SELECT gateway.beat_keys($1::text[], $2::bytea[], $3::text[], $4)"
_FORGET = "SELECT gateway.forget_keys($1) AS forgotten"

log = structlog.get_logger("gateway.idempotency")


@dataclass(frozen=True, slots=True)
class Rules:
    """How long a gateway that says nothing is taken for alive, how often it says something, how long keys are known."""

    running_ms: int
    beat_ms: int
    remember_ms: int = 86_400_000


@dataclass(frozen=True, slots=True)
class Claim:
    """A request under its key."""

    org_id: str
    key_digest: bytes
    #: What the hold and the ledger know it by.
    request_id: str


class Idempotency:
    """`once()` for the walk; `run()` until it is cancelled; then `drain()`."""

    def __init__(self, postgres: Postgres, redis: Redis, rules: Rules) -> None:
        self._postgres = postgres
        self._redis = redis
        self._rules = rules
        self._running: set[Claim] = set()
        #: How they ended, as JSON; None: the key is free.
        self._kept: dict[Claim, str | None] = {}
        self._keeps = asyncio.Event()

    @property
    def kept_count(self) -> int:
        """Requests that have ended and whose end PostgreSQL does not know yet."""
        return len(self._kept)

    @staticmethod
    def key(facts: Facts) -> str | None:
        """What the client calls the request; None when it does not. Raises BadRequest for what is no such name."""
        given = [value for name, value in facts.headers if name == FIELD]
        if not given:
            return None
        key = given[0].decode("latin-1")
        if len(given) > 1 or KEY.fullmatch(key) is None:
            raise BadRequest("Idempotency-Key must be one value of 1 to 255 visible ASCII characters.")
        return key

    @asynccontextmanager
    async def once(
        self, key: str, principal: Principal, facts: Facts, body: bytes, hold_id: str, record: Record
    ) -> AsyncIterator[Refusal | None]:
        """Inside the block the request runs under `key`, and nobody else does; a Refusal instead means that it ran, or
        runs already. Leaving the block notes how it ended, as `record` says by then, whatever happens meanwhile.

        body: all of it. Raises StoreUnavailable when PostgreSQL cannot be asked or, of a request whose gateway died,
        Redis."""
        claim = Claim(principal.org_id, sha256(key.encode()).digest(), hold_id)
        try:
            refusal = await self._claim(claim, sha256(b"\0".join((facts.method.encode(), facts.target, body))).digest())
        except BaseException:
            self._keep(claim, None)  # it may have been written all the same
            raise
        if refusal is not None:
            yield refusal
            return
        self._running.add(claim)
        try:
            yield None
        finally:
            await self._end(claim, _outcome(record))

    async def _claim(self, claim: Claim, body_digest: bytes) -> Refusal | None:
        """The request runs under its key, or the answer says why not."""
        terms = (self._rules.running_ms, self._rules.remember_ms)
        asked: str | None = None
        charged: int | None = None
        while True:
            row = await self._postgres.row(
                _CLAIM, claim.org_id, claim.key_digest, body_digest, claim.request_id, *terms, asked, charged
            )
            assert row is not None  # the function always says who may
            match row["verdict"]:
                case "RUN":
                    return None
                case "OTHER":
                    return _reused()
                case "FINISHED":
                    return _finished(json.loads(row["outcome"]), row["at"].isoformat(timespec="milliseconds"))
                case "RUNNING":
                    return _running()
            asked = str(row["request_id"])
            under_way, charged = await self._in_redis(claim.org_id, asked)
            if under_way:
                return _running()

    async def _in_redis(self, org_id: str, request_id: str) -> tuple[bool, int | None]:
        """Whether something of the request is under way in Redis; else what it was charged, as far as Redis knows."""
        await self._redis.connected()
        asked = (
            self._redis.send("HEXISTS", keys.holds(org_id), request_id),
            self._redis.send("GET", keys.tombstone(org_id, request_id)),
            self._redis.send("XRANGE", keys.outbox(org_id), "-", "+", "COUNT", 1),
        )
        for future in asked:
            future.add_done_callback(Redis.ignore)  # the first one that fails leaves nobody to read the others
        held, ended, oldest = [await self._redis.reply(future) for future in asked]
        if held:
            return True, None
        if ended is not None:
            found = _ENDED.match(ended)
            return False, int(found[1]) if found else None
        since_ms = time.time() * 1000 - OUTBOX_YOUNG_MS
        return bool(oldest) and int(oldest[0][0].split(b"-")[0]) < since_ms, None

    async def _end(self, claim: Claim, outcome: str | None) -> None:
        """How the request ended is known to PostgreSQL, or is kept to be told soon; whatever happens to the caller."""
        try:
            await self._tell({claim: outcome})
        except StoreUnavailable as exc:
            log.warning("end of a request kept for later", hold=claim.request_id, error=str(exc))
            self._keep(claim, outcome)
        except BaseException:
            self._keep(claim, outcome)  # it may have been told; that it is told again does no harm
            raise
        finally:
            self._running.discard(claim)

    def _keep(self, claim: Claim, outcome: str | None) -> None:
        if len(self._kept) >= KEPT_MAX:
            self._kept.pop(next(iter(self._kept)))
            log.error("too many ends of requests to tell, one is left to its time")
        self._kept[claim] = outcome
        self._keeps.set()

    async def _tell(self, ends: Mapping[Claim, str | None], timeout_ms: int | None = None) -> None:
        await self._postgres.rows(_END, *_columns(ends), list(ends.values()), timeout_ms=timeout_ms)

    # For ever

    async def run(self) -> None:
        """What runs is said to run, what was kept is told, what is long past is forgotten."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_keep_doing(self.beat, self._rules.beat_ms / 1000))
            group.create_task(_keep_doing(self._tell_soon, RETRY_PAUSE_S))
            group.create_task(_keep_doing(self.forget, FORGET_EVERY_S))

    async def beat(self) -> None:
        """What runs here lives another lease. Raises StoreUnavailable."""
        if alive := [*self._running, *self._kept]:
            await self._postgres.rows(_BEAT, *_columns(alive), self._rules.running_ms, timeout_ms=WORK_TIMEOUT_MS)

    async def _tell_soon(self) -> None:
        await self._keeps.wait()
        await self.tell_kept()

    async def tell_kept(self) -> None:
        """PostgreSQL knows how everything ended. Raises StoreUnavailable."""
        while told := dict(islice(self._kept.items(), TOGETHER)):
            await self._tell(told, WORK_TIMEOUT_MS)
            for claim in told:
                self._kept.pop(claim, None)
        self._keeps.clear()

    async def forget(self) -> int:
        """What nobody need remember any more is forgotten; returns how many keys. Raises StoreUnavailable."""
        count = 0
        while True:
            row = await self._postgres.row(_FORGET, TOGETHER, timeout_ms=WORK_TIMEOUT_MS)
            assert row is not None
            forgotten: int = row["forgotten"]
            count += forgotten
            if forgotten < TOGETHER:
                return count

    async def drain(self, timeout_s: float) -> None:
        """What was kept is told, if PostgreSQL takes it in time; of the rest the ledger will tell."""
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.tell_kept()


async def _keep_doing(work: Callable[[], Awaitable[object]], pause_s: float) -> None:
    while True:
        await asyncio.sleep(pause_s)
        try:
            await work()
        except StoreUnavailable as exc:
            log.debug("idempotency keys wait", error=str(exc))  # the connection's own log tells of the outage


def _columns(claims: Iterable[Claim]) -> tuple[list[str], list[bytes], list[str]]:
    claims = list(claims)
    return (
        [claim.org_id for claim in claims],
        [claim.key_digest for claim in claims],
        [claim.request_id for claim in claims],
    )


def _outcome(record: Record) -> str | None:
    """How it ended, as it is kept; None for what cost nothing and delivered nothing, so that a repetition may run."""
    nothing = (None, Outcome.NEVER_REACHED.value, Outcome.UPSTREAM_REFUSED.value)
    if record.outcome in nothing and not record.charged_ucredits:
        return None
    return json.dumps(
        {
            "request_id": record.request_id,
            "status": record.status,
            "outcome": record.outcome,
            "charged_ucredits": record.charged_ucredits or 0,
        }
    )


def _running() -> Refusal:
    message = "A request with this Idempotency-Key is running; its outcome can be asked for when it has ended."
    return Refusal(409, "request_in_progress", message, retry_after_ms=1000, should_retry=True)


def _finished(outcome: Mapping[str, Any], at: str) -> Refusal:
    credits, fraction = divmod(outcome["charged_ucredits"], UCREDITS_PER_CREDIT)
    message = (
        "The request with this Idempotency-Key has ended, and its answer is not kept. It is neither run nor charged "
        "again; with another key it would be."
    )
    first = {
        "request_id": outcome["request_id"],
        "status": outcome["status"],
        "outcome": outcome["outcome"],
        "charged_credits": outcome["charged_ucredits"] / UCREDITS_PER_CREDIT if fraction else credits,
        "at": at,
    }
    return Refusal(409, "request_finished", message, should_retry=False, details={"first": first})


def _reused() -> Refusal:
    message = "This Idempotency-Key was used for another request; a new request needs a new key."
    return Refusal(422, "idempotency_key_reused", message, should_retry=False)

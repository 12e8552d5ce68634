"""Whether every credit is accounted for: ledger = balances, balances = what may be spent + outbox + holds, per org.

It may look while gateways work. What one org has in Redis is read in one step, then all books in one snapshot of
PostgreSQL: whatever Redis was told by then is in them, and where both have the same version of an account they must
agree. Only what others do by themselves may be seen half done (the application's changes where no trigger tells, the
mirror that the application writes as well, holds that are being swept): that counts when it is still so a moment later.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger.queries import query
from gateway.ledger.redis_books import RedisBooks, State, read_redis_books
from gateway.stores import Postgres, Redis, Row
from gateway.types import UCREDITS_PER_CREDIT

#: Orgs asked for in one round trip to Redis.
TOGETHER = 200
#: A long ledger takes its time.
TIMEOUT_MS = 600_000
LOOKS = 3
LOOK_AGAIN_S = 1.0
#: A lease that is over by more than this should have been ended by some gateway; charges do not wait for longer.
LATE_MS = 60_000
#: As far as the scripts count exactly, and PostgreSQL tells Redis.
EXACT_MAX = 2**53

_IN_PASSING = frozenset(("credits_unseen", "mirror", "overdue"))
_IN_WORDS = {
    "hold_unreadable": "is no hold, or has used more than it holds",
    "hold_without_lease": "is held without a lease, so that nobody would ever end it",
    "hold_without_tombstone": "is held, and its admission is forgotten",
    "hold_that_has_ended": "is held, and has ended",
    "lease_without_hold": "has a lease and holds nothing",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about an org's books, in words. `code` is stable."""

    org_id: str
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class OrgBooks:
    """What an org's books come to. What is in Redis is None where that could not be asked."""

    org_id: str
    entries: int
    ledger_ucredits: int
    balance_ucredits: int
    #: Of the balance: held in PostgreSQL, or left alone because a lost state of Redis may have owed it.
    set_aside_ucredits: int
    #: Charges on their way to PostgreSQL, and holds of requests in flight.
    unposted_ucredits: int | None
    held_ucredits: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """`wrong` is empty when every credit is accounted for, as far as could be asked; `trouble`: why Redis could not."""

    orgs: tuple[OrgBooks, ...]
    wrong: tuple[Finding, ...]
    remarks: tuple[Finding, ...]
    trouble: str | None


class Auditor:
    """`audit()` any number of times. redis: None when there is none to ask."""

    def __init__(self, postgres: Postgres, redis: Redis | None) -> None:
        self._postgres = postgres
        self._redis = redis
        self._trouble: str | None = None

    async def audit(self, org_id: str | None = None) -> Report:
        """The books of one org, or of all. Raises StoreUnavailable when PostgreSQL cannot be asked."""
        self._trouble = None
        orgs, found, remarks = await self._look(None if org_id is None else [org_id])
        passing = [one for one in found if one.code in _IN_PASSING]
        for _ in range(LOOKS - 1):
            if passing:
                await asyncio.sleep(LOOK_AGAIN_S)
                _, again, _ = await self._look(sorted({one.org_id for one in passing}))
                seen = {(one.org_id, one.code) for one in passing}
                passing = [one for one in again if (one.org_id, one.code) in seen]
        wrong = [*(one for one in found if one.code not in _IN_PASSING), *passing]
        return Report(tuple(orgs), tuple(sorted(wrong, key=lambda one: one.org_id)), tuple(remarks), self._trouble)

    async def _look(self, orgs: list[str] | None) -> tuple[list[OrgBooks], list[Finding], list[Finding]]:
        names = orgs
        if names is None:
            names = [row["org_id"] for row in await self._postgres.rows(query("audit_orgs"), timeout_ms=TIMEOUT_MS)]
        # Redis first: whatever it knows by now, PostgreSQL knows.
        in_redis = await self._read_redis(names)
        books: list[OrgBooks] = []
        wrong: list[Finding] = []
        remarks: list[Finding] = []
        for row in await self._postgres.rows(query("audit"), orgs, timeout_ms=TIMEOUT_MS):
            wrong += _in_postgres(row)
            remarks += _letters(row)
            here = in_redis.get(row["org_id"])
            if isinstance(here, Finding):
                wrong.append(here)
                here = None
            elif here is not None:
                wrong += [*_in_redis(row, here), *_between(row, here)]
                remarks += _on_the_way(row, here)
            books.append(_books(row, here))
        return books, wrong, remarks

    async def _read_redis(self, orgs: Sequence[str]) -> dict[str, RedisBooks | Finding]:
        """Of each org, what Redis has or why it cannot be read; nothing of those that could not be asked for."""
        found: dict[str, RedisBooks | Finding] = {}
        if (redis := self._redis) is None:
            self._trouble = "there is no Redis to ask"
            return found
        for at in range(0, len(orgs), TOGETHER):
            part = orgs[at : at + TOGETHER]
            replies = await asyncio.gather(
                *(read_redis_books(redis, org_id) for org_id in part), return_exceptions=True
            )
            for org_id, reply in zip(part, replies, strict=True):
                if isinstance(reply, RedisBooks):
                    found[org_id] = reply
                elif isinstance(reply, StoreRefused):
                    found[org_id] = Finding(org_id, "foreign_key", f"a key of its is somebody else's: {reply.detail}")
                elif isinstance(reply, StoreUnavailable):
                    self._trouble = reply.detail or str(reply)
                else:
                    raise reply
            if not found and self._trouble is not None:
                break  # nobody is there: the others need not wait for the same answer
        return found


def _books(row: Row, here: RedisBooks | None) -> OrgBooks:
    return OrgBooks(
        org_id=row["org_id"],
        entries=row["entries"],
        ledger_ucredits=int(row["entries_sum"]),
        balance_ucredits=_balance(row),
        set_aside_ucredits=row["lost"] + row["held"],
        unposted_ucredits=None if here is None else here.entries_ucredits,
        held_ucredits=None if here is None else here.holds_ucredits,
    )


def _balance(row: Row) -> int:
    """As the account has it: what the application changed is not in it before the gateway has noted that."""
    return int(row["credits_seen"]) * UCREDITS_PER_CREDIT + int(row["micro"])


def _in_postgres(row: Row) -> Iterator[Finding]:
    """What one snapshot of PostgreSQL contradicts itself in."""
    org_id, balance, entries = row["org_id"], _balance(row), int(row["entries_sum"])
    if entries != balance:
        yield Finding(org_id, "balance", f"its ledger comes to {entries} micro-credits, its account has {balance}")
    if row["credits"] != row["credits_seen"]:
        text = f"it has {row['credits']} credits, of which the ledger was told {row['credits_seen']}"
        yield Finding(org_id, "credits_unseen", text)
    if row["held"] != row["holds_sum"]:
        text = f"its account holds {row['held']} micro-credits, its holds in PostgreSQL come to {row['holds_sum']}"
        yield Finding(org_id, "held", text)
    if row["plan_micro"] > max(0, balance):
        text = f"{row['plan_micro']} micro-credits of its balance are of a plan, and the balance is {balance}"
        yield Finding(org_id, "plan_pocket", text)
    if row["letters"] and row["present"]:
        text = f"{row['letters']} entries ({row['letters_sum']} micro-credits) were not posted while its row was gone"
        yield Finding(org_id, "dead_letters", text)


def _letters(row: Row) -> Iterator[Finding]:
    if row["letters"] and not row["present"]:
        text = f"{row['letters']} entries ({row['letters_sum']} micro-credits) could not be posted: it has no row"
        yield Finding(row["org_id"], "dead_letters", text)


def _in_redis(row: Row, here: RedisBooks) -> Iterator[Finding]:
    """What Redis contradicts itself in."""
    org_id, state = row["org_id"], here.state
    for request_id, trouble in here.troubles:
        yield Finding(org_id, trouble, f"{request_id} {_IN_WORDS[trouble]}")
    if row["living"] and here.overdue_ms is not None and here.overdue_ms > LATE_MS:
        yield Finding(
            org_id, "overdue", f"a lease is over since {here.overdue_ms // 1000} s and the hold has not ended"
        )
    if state is None:
        return
    if state.held != here.holds_ucredits:
        text = f"Redis counts {state.held} micro-credits held, its holds come to {here.holds_ucredits}"
        yield Finding(org_id, "holds_sum", text)
    if here.entries_ucredits not in (None, state.unposted):
        text = f"Redis counts {state.unposted} micro-credits unposted, its outbox comes to {here.entries_ucredits}"
        yield Finding(org_id, "outbox_sum", text)
    shown = str(max(0, state.balance - state.unposted) // UCREDITS_PER_CREDIT)
    if here.mirror not in (None, shown):
        yield Finding(org_id, "mirror", f"the application reads {here.mirror!r} credits in Redis, not {shown!r}")


def _between(row: Row, here: RedisBooks) -> Iterator[Finding]:
    """What the stores contradict each other in. One may have a newer version of the account, and only PostgreSQL."""
    org_id, state = row["org_id"], here.state
    if state is None:
        return
    if state.version > row["version"]:
        text = f"Redis has version {state.version} of its account, PostgreSQL only {row['version']}"
        yield Finding(org_id, "version_ahead", text)
    if state.version != row["version"] or row["credits"] != row["credits_seen"]:
        return
    for what, ours, theirs in _parts(row, state):
        if ours != theirs:
            text = f"of version {state.version} of its account, Redis has {what} {theirs}, PostgreSQL {ours}"
            yield Finding(org_id, "state", text)
    # Redis may have lowered its own already, to tell PostgreSQL next.
    cap = row["cap"] if state.birth == row["birth"] else 0
    if state.cap > cap:
        yield Finding(org_id, "cap", f"Redis may owe {state.cap} micro-credits by its own word, {cap} by PostgreSQL's")


def _parts(row: Row, state: State) -> Iterator[tuple[str, int, int]]:
    balance = max(-EXACT_MAX, min(EXACT_MAX, _balance(row))) if row["present"] else 0
    yield "balance", balance, state.balance
    yield "set aside", row["lost"] + row["held"], state.set_aside
    yield "epoch", row["epoch"], state.epoch
    yield "end of the period", row["period_ends_ms"], state.period_ends_ms


def _on_the_way(row: Row, here: RedisBooks) -> Iterator[Finding]:
    """What is accounted for, and not as it is most of the time."""
    org_id = row["org_id"]
    if here.gone:
        text = "Redis was started anew since it was last asked for this org; its account there is built anew then"
        yield Finding(org_id, "restarted", text)
    elif here.state is None and (here.holds or here.entries):
        text = f"Redis has lost its account; {here.holds} holds and {here.entries} charges are there"
        yield Finding(org_id, "lost", text)
    if not row["living"] and here.overdue_ms is not None and here.overdue_ms > LATE_MS:
        yield Finding(org_id, "overdue", f"{here.holds} requests hold credits, and no gateway is there to end them")
    if here.waits_ms is not None and here.waits_ms > LATE_MS:
        text = f"{here.entries} charges wait to be posted, the oldest since {here.waits_ms // 1000} s"
        yield Finding(org_id, "waiting", text)
    if here.entries_ucredits is None:
        yield Finding(org_id, "long_outbox", f"{here.entries} charges wait to be posted: too many to be added up")

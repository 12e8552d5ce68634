"""The books: every function of the database that reads or changes an org's account, typed.

All of them raise StoreUnavailable when PostgreSQL cannot be asked, and StoreRefused for values that it will never take.
All may be repeated: what has happened does not happen again. Amounts are micro-credits.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.ledger.queries import query
from gateway.stores import Postgres, Row
from gateway.types import UCREDITS_PER_CREDIT, Balance, Entry

POST_TIMEOUT_MS = 5_000
SWEEP_MAX = 500


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of asking for a hold in PostgreSQL."""

    #: OK | DUP (taken before) | GONE (the request has ended) | NOCREDIT | INFLIGHT | REFUSED (of an extension).
    status: str
    #: Held now; of an extension: granted.
    held_ucredits: int
    available_ucredits: int
    owned_ucredits: int
    balance: Balance


@dataclass(frozen=True, slots=True)
class Beat:
    """How many gateways live, and the epochs of orgs that wait to hear what this one knows."""

    instances: int
    waiting: tuple[tuple[str, int], ...]


async def read(postgres: Postgres, orgs: Iterable[str]) -> dict[str, Balance]:
    """The state of every org named; one without a row in the application's table has nothing."""
    return {row["org_id"]: balance_of(row) for row in await postgres.rows(query("states"), list(orgs))}


async def read_balance(postgres: Postgres, org_id: str) -> Balance | None:
    """The org's state, or None when it has no row in the application's table."""
    row = await postgres.row(query("balance"), org_id)
    return None if row is None else balance_of(row)


async def post(postgres: Postgres, entries: Sequence[Entry]) -> list[Balance]:
    """The entries are in the ledger, and the holds here of what they end are gone; the state of every org named."""
    rows = await postgres.rows(
        query("post"),
        [entry.org_id for entry in entries],
        [entry.request_id for entry in entries],
        [entry.kind for entry in entries],
        [entry.amount_ucredits for entry in entries],
        [_json(entry.meta) for entry in entries],
        timeout_ms=POST_TIMEOUT_MS,
    )
    return [balance_of(row) for row in rows]


async def unlocked(postgres: Postgres, orgs: Iterable[str]) -> set[str]:
    """Those of the orgs that could be posted to now without waiting for anybody, those without a row among them."""
    return {row["org_id"] for row in await postgres.rows(query("unlocked"), list(orgs))}


async def grant(postgres: Postgres, org_id: str, credits: int, *, grant_id: str, note: str = "") -> Balance:
    """The org has `credits` more, once per `grant_id`; running gateways learn it by notification."""
    meta = json.dumps({"credits": credits, **({"note": note} if note else {})})
    return await _state(postgres, "grant", org_id, grant_id, credits * UCREDITS_PER_CREDIT, meta)


async def raise_cap(
    postgres: Postgres,
    org_id: str,
    epoch: int,
    birth: str,
    need_ucredits: int,
    floor_ucredits: int,
    grace_ms: int,
    percent: int = 0,
) -> Balance:
    """The Redis hash born as `birth` may owe `need_ucredits`, as far as there is so much; ahead of need as much as
    `floor_ucredits` or `percent` of the balance. If another hash had the cap, that one is lost from now on. For a hash
    of another epoch nothing changes: its state is out of date."""
    return await _state(postgres, "raise_cap", org_id, epoch, birth, need_ucredits, floor_ucredits, grace_ms, percent)


async def lower_cap(
    postgres: Postgres, org_id: str, epoch: int, birth: str, version: int, cap_ucredits: int
) -> Balance | None:
    """The cap is what Redis has lowered its own to, if the account is still of this version; else None."""
    row = await postgres.row(query("lower_cap"), org_id, epoch, birth, version, cap_ucredits)
    return None if row is None else balance_of(row)


async def go_on_after(postgres: Postgres, org_id: str, version: int, epoch: int) -> Balance:
    """The account goes on after this version and epoch, which Redis has, and a restored database has forgotten."""
    return await _state(postgres, "go_on_after", org_id, version, epoch)


async def acknowledge(
    postgres: Postgres, instance: str, org_id: str, epoch: int, birth: str, owed_ucredits: int, grace_ms: int
) -> Balance:
    """The instance has registered again what it knows of the org, and the hash born as `birth` owes `owed_ucredits` in
    all; with an empty birth, it knew of nothing. The last one's word ends the loss."""
    return await _state(postgres, "acknowledge", instance, org_id, epoch, birth, owed_ucredits, grace_ms)


async def beat(postgres: Postgres, instance: str) -> Beat:
    """The instance lives; losses that nobody can tell of any more are over."""
    rows = await postgres.rows(query("beat"), instance)
    waiting = tuple((row["org_id"], row["epoch"]) for row in rows if row["org_id"] is not None)
    return Beat(rows[0]["instances"], waiting)


async def leave(postgres: Postgres, instance: str) -> None:
    """The instance has ended and nobody waits for it."""
    await postgres.rows(query("leave"), instance)


async def take_hold(
    postgres: Postgres,
    org_id: str,
    request_id: str,
    want_ucredits: int,
    least_ucredits: int,
    owed_ucredits: int,
    *,
    instance: str,
    lease_ms: int,
    capped: bool = True,
) -> Taken:
    """`want_ucredits` are held for the request beside what Redis may owe, or what there is of it, `least_ucredits` at
    least. owed_ucredits: what it owes as soon as it runs."""
    row = await postgres.row(
        query("take_hold"), org_id, request_id, want_ucredits, least_ucredits, owed_ucredits, instance, lease_ms, capped
    )
    return _taken(row)


async def extend_hold(
    postgres: Postgres, org_id: str, request_id: str, more_ucredits: int, *, capped: bool = True
) -> Taken:
    """The request's hold here has grown by `more_ucredits`, or by what there is of it."""
    return _taken(await postgres.row(query("extend_hold"), org_id, request_id, more_ucredits, capped))


async def renew_holds(postgres: Postgres, holds: Sequence[tuple[str, str, int]], lease_ms: int) -> None:
    """The holds (org, request, used so far) last another lease, as far as they are still there."""
    orgs, requests, used = zip(*holds, strict=True)
    await postgres.rows(query("renew_holds"), list(orgs), list(requests), list(used), lease_ms)


async def sweep_holds(postgres: Postgres, on_expiry: str) -> list[tuple[str, str, int]]:
    """Holds whose lease is over, at most SWEEP_MAX, have become `orphan` entries: org, request, what it was charged."""
    rows = await postgres.rows(query("sweep_holds"), on_expiry, SWEEP_MAX, timeout_ms=POST_TIMEOUT_MS)
    return [(row["org_id"], row["request_id"], row["charged"]) for row in rows]


async def poll_external(postgres: Postgres) -> list[str]:
    """Where no trigger tells: what others changed is in the ledger; the orgs whose balance it was."""
    return [row["org_id"] for row in await postgres.rows(query("poll_external"), timeout_ms=POST_TIMEOUT_MS)]


def balance_of(row: Row) -> Balance:
    """A state as the database's functions return it."""
    return Balance(
        org_id=row["org_id"],
        ucredits=row["balance"],
        version=row["version"],
        set_aside_ucredits=row["set_aside"],
        cap_ucredits=row["cap"],
        epoch=row["epoch"],
        birth=row["birth"],
        period_ends_ms=row["period_ends_ms"],
        present=row["present"],
    )


async def _state(postgres: Postgres, name: str, *args: Any) -> Balance:
    row = await postgres.row(query(name), *args)
    assert row is not None  # these functions return the state of the org that they were asked about
    return balance_of(row)


def _taken(row: Row | None) -> Taken:
    assert row is not None  # the functions always say what came of it
    return Taken(row["status"], row["taken"], row["available"], row["owned"], balance_of(row))


def _json(meta: Mapping[str, Any]) -> str:
    """`meta` as jsonb takes it: a client may name a model with a NUL in it, which PostgreSQL cannot store."""
    clean = {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in meta.items()}
    return msgspec.json.encode(clean).decode()

"""Orgs, their API keys and what they are given: what an operator does to the ledger, apart from how it is shown.

Owns the rules (which ids and names are allowed, that a plan must exist, that a grant counts once). Does not make
secrets: a key arrives here as its hash.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from gateway.config import Settings
from gateway.config.problems import quoted, suggest, unknown
from gateway.config.rules import CREDITS_MAX
from gateway.errors import GatewayError
from gateway.ledger.books import grant, read_balance
from gateway.ledger.grants import Pockets, look, opening_terms, read_pockets
from gateway.ledger.queries import query
from gateway.stores import Postgres, Row
from gateway.types import UCREDITS_PER_CREDIT, Balance

#: The same alphabet as in the table's own check: an org id stands in Redis keys, logs and headers.
_ORG = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: Visible ASCII, as identity takes user ids from tokens: `auth0|5f7c`, `ada@example.com`.
_USER = re.compile(r"[\x21-\x7e]{1,256}")
_GRANT_ID = re.compile(r"[\x21-\x7e]{1,200}")
_LABEL_CHARS_MAX = 200
#: How many orgs are looked through for the one that was meant.
_SUGGEST_FROM_MAX = 1000


class LedgerRefusal(GatewayError):
    """The ledger cannot do what was asked."""

    code = "ledger_refusal"
    status = 409


class UnknownOrg(LedgerRefusal):
    """There is no such organization."""

    code = "unknown_org"
    status = 404


class UnknownKey(LedgerRefusal):
    """There is no such API key."""

    code = "unknown_key"
    status = 404


class BadInput(LedgerRefusal):
    """What was asked for can never be done."""

    code = "bad_input"
    status = 400


@dataclass(frozen=True, slots=True)
class OrgRow:
    """An org as the operator added it."""

    org_id: str
    name: str
    plan: str
    created_at: datetime
    #: Posted; None when the org has no row in the application's table.
    balance_ucredits: int | None
    #: Keys that were not revoked.
    keys: int


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key to be stored. sha256: 32 bytes, of the secret that only the caller knows."""

    key_id: str
    sha256: bytes
    user_id: str | None = None
    name: str = ""
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A key as it is stored, without the hash."""

    key_id: str
    org_id: str
    user_id: str | None
    name: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class EntryRow:
    """A line of the ledger. `amount_ucredits` is signed: a charge is negative."""

    seq: int
    at: datetime
    kind: str
    request_id: str
    amount_ucredits: int
    meta: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Granted:
    """The org's balance after a grant. `new` is False when the same grant had been made before."""

    grant_id: str
    credits: int
    balance_ucredits: int
    new: bool


async def add_org(postgres: Postgres, settings: Settings, org_id: str, plan: str, name: str = "") -> OrgRow:
    """The org exists, with the credits of its plan granted once; both or neither.

    Raises BadInput for an id or name that is not allowed or a plan that is not configured, LedgerRefusal when the id
    is taken, StoreUnavailable."""
    check_org(org_id)
    check_label("name", name)
    terms = settings.plans.get(plan)
    if terms is None:
        raise BadInput(unknown("plan", plan, list(settings.plans)))
    # Created now, by the database's clock: where its periods begin with it, they do.
    facts = await look(postgres, org_id)
    facts = replace(facts, created_ms=facts.clock_ms)
    added = await postgres.row(query("open_org"), org_id, name, facts.created_ms, *opening_terms(plan, terms, facts))
    if added is None:
        found = await get_org(postgres, org_id)
        raise LedgerRefusal(f"org {quoted(org_id)} exists already, with plan {quoted(found.plan)}")
    return await get_org(postgres, org_id)


async def list_orgs(postgres: Postgres, limit: int) -> list[OrgRow]:
    """The first `limit` orgs in order of id."""
    return [_org(row) for row in await postgres.rows(query("orgs"), None, limit)]


async def get_org(postgres: Postgres, org_id: str) -> OrgRow:
    """Raises UnknownOrg, with a guess what was meant, and StoreUnavailable."""
    check_org(org_id)
    row = await postgres.row(query("orgs"), org_id, 1)
    if row is None:
        raise await _unknown_org(postgres, org_id)
    return _org(row)


async def add_key(postgres: Postgres, org_id: str, key: NewKey) -> KeyRow:
    """The key opens the gateway for `org_id`. Raises BadInput, UnknownOrg, StoreUnavailable."""
    check_org(org_id)
    check_label("name", key.name)
    if key.user_id is not None and _USER.fullmatch(key.user_id) is None:
        raise BadInput(f"{quoted(key.user_id)} is not a user id: visible ASCII without spaces, at most 256 characters")
    row = await postgres.row(
        query("add_org_key"), key.key_id, key.sha256, org_id, key.user_id, key.name, key.expires_at
    )
    if row is None:
        raise await _unknown_org(postgres, org_id)
    return _key(row)


async def list_keys(postgres: Postgres, org_id: str, limit: int) -> list[KeyRow]:
    """The org's newest `limit` keys, revoked ones too. Raises BadInput, UnknownOrg, StoreUnavailable."""
    await get_org(postgres, org_id)
    return [_key(row) for row in await postgres.rows(query("keys"), org_id, limit)]


async def revoke_key(postgres: Postgres, key_id: str) -> tuple[KeyRow, bool]:
    """The key opens nothing any more; False when it had been revoked before. Raises UnknownKey, StoreUnavailable."""
    if not key_id.isascii() or not key_id.isprintable() or len(key_id) > _LABEL_CHARS_MAX:
        raise UnknownKey("that is no id of an API key: they look like key_0123456789abcdef")
    revoked = await postgres.row(query("revoke_key"), key_id)
    row = await postgres.row(query("key"), key_id)
    if row is None:
        raise UnknownKey(f"there is no API key {quoted(key_id)}; `gateway keys list ORG` shows an org's keys")
    return _key(row), revoked is not None


async def give_credits(
    postgres: Postgres, org_id: str, credits: int, *, grant_id: str, note: str = "", create: bool = False
) -> Granted:
    """The org has `credits` more, once per `grant_id`.

    create: also for an org that was never seen here; otherwise that raises UnknownOrg, because it is mostly a typing
    error. Raises BadInput, LedgerRefusal when the id was used for another amount, StoreUnavailable."""
    check_org(org_id)
    check_label("note", note)
    if _GRANT_ID.fullmatch(grant_id) is None:
        raise BadInput(f"{quoted(grant_id)} is not a grant id: visible ASCII without spaces, at most 200 characters")
    if not 0 < credits <= CREDITS_MAX:
        raise BadInput(f"the amount must be between 1 and {CREDITS_MAX} credits, got {credits}")
    before = await read_balance(postgres, org_id)
    if before is None and not create:
        await get_org(postgres, org_id)
    already = await _granted(postgres, org_id, grant_id)
    held = 0 if before is None else before.ucredits
    if already is None and held + credits * UCREDITS_PER_CREDIT > CREDITS_MAX * UCREDITS_PER_CREDIT:
        raise BadInput(f"no org can have more than {CREDITS_MAX} credits, and this one has some already")
    after = await grant(postgres, org_id, credits, grant_id=grant_id, note=note)
    given = already or await _granted(postgres, org_id, grant_id)
    if given != credits * UCREDITS_PER_CREDIT:
        raise LedgerRefusal(f"grant id {quoted(grant_id)} was used before, for another amount; nothing was granted")
    return Granted(grant_id, credits, after.ucredits, new=already is None)


async def get_balance(postgres: Postgres, org_id: str) -> Balance:
    """The posted balance. Raises BadInput, UnknownOrg, StoreUnavailable."""
    check_org(org_id)
    balance = await read_balance(postgres, org_id)
    if balance is None:
        await get_org(postgres, org_id)
        return Balance(org_id, 0, 0)
    return balance


async def get_pockets(postgres: Postgres, org_id: str) -> Pockets:
    """What the posted balance is made of. Raises BadInput, UnknownOrg, StoreUnavailable."""
    check_org(org_id)
    pockets = await read_pockets(postgres, org_id)
    if pockets is None:
        await get_org(postgres, org_id)
        return Pockets(org_id, 0, 0, None, 0)
    return pockets


async def list_entries(postgres: Postgres, org_id: str, limit: int) -> list[EntryRow]:
    """The org's newest `limit` ledger entries. Raises BadInput, UnknownOrg, StoreUnavailable."""
    check_org(org_id)
    rows = await postgres.rows(query("entries"), org_id, limit)
    if not rows:
        await get_balance(postgres, org_id)
    return [
        EntryRow(row["seq"], row["at"], row["kind"], row["request_id"], row["amount"], json.loads(row["meta"]))
        for row in rows
    ]


async def _granted(postgres: Postgres, org_id: str, grant_id: str) -> int | None:
    row = await postgres.row(query("granted"), org_id, grant_id)
    return None if row is None else int(row["amount"])


async def _unknown_org(postgres: Postgres, org_id: str) -> UnknownOrg:
    text = f"there is no org {quoted(org_id)}"
    if await read_balance(postgres, org_id) is not None:
        return UnknownOrg(f"{text} here: it has credits, but its plan and users come from tokens or headers")
    names = [org.org_id for org in await list_orgs(postgres, _SUGGEST_FROM_MAX)]
    return UnknownOrg(f"{text}{suggest(org_id, names) or '; `gateway orgs add` makes one'}")


def check_org(org_id: str) -> None:
    """Raises BadInput for text that can be no org's id."""
    if _ORG.fullmatch(org_id) is None:
        raise BadInput(
            f"{quoted(org_id)} is not an org id: letters, digits, '.', '_', ':' and '-', at most 128 characters"
        )


def check_label(what: str, text: str) -> None:
    """Raises BadInput for text that is not one short line."""
    if not text.isprintable() or len(text) > _LABEL_CHARS_MAX:
        raise BadInput(f"the {what} must be one line of at most {_LABEL_CHARS_MAX} printable characters")


def _org(row: Row) -> OrgRow:
    return OrgRow(row["org_id"], row["name"], row["plan"], row["created_at"], row["balance"], row["keys"])


def _key(row: Row) -> KeyRow:
    return KeyRow(
        row["key_id"],
        row["org_id"],
        row["user_id"],
        row["name"],
        row["created_at"],
        row["expires_at"],
        row["revoked_at"],
    )

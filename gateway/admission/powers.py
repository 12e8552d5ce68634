"""What admission needs of the ledger, passed in as functions: rooms do not import each other."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.types import Balance, Entry


class Journal(Protocol):
    """What this process has promised, on its own disk before it counts. Raises StoreUnavailable when that cannot be."""

    async def held(self, hold_id: str, org_id: str, held_ucredits: int, owed_ucredits: int) -> None: ...

    async def settled(self, entry: Entry) -> None: ...

    def confirmed(self, org_id: str, request_ids: Sequence[str]) -> None: ...


class Taken(Protocol):
    """What came of asking PostgreSQL for a hold."""

    @property
    def status(self) -> str: ...
    @property
    def held_ucredits(self) -> int: ...
    @property
    def available_ucredits(self) -> int: ...
    @property
    def owned_ucredits(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Powers:
    """Those that are awaited raise StoreUnavailable when their store cannot be asked; those that ask both raise
    UnknownBalance when it is PostgreSQL that cannot, since for want of Redis alone a request may still be admitted."""

    #: (org, plan, need): the org's account is in Redis, with a cap for `need` micro-credits if there is so much.
    load: Callable[[str, str, int], Awaitable[None]]
    #: (org, epoch, birth, need): the state after the cap was raised, which Redis has.
    raise_cap: Callable[[str, int, str, int], Awaitable[Balance]]
    #: (org, plan): the org has what its plan brings now, as far as anybody can tell. Raises nothing.
    begin_period: Callable[[str, str], Awaitable[None]]
    #: (org, plan, ms since 1970 by Redis's clock): the org's grant period is the current one, and Redis knows.
    turn_period: Callable[[str, str, int], Awaitable[None]]
    #: (org): whatever it was charged before this call is in PostgreSQL, and Redis knows.
    carry: Callable[[str], Awaitable[None]]
    #: (org): it was refused for want of credits.
    recheck: Callable[[str], None]
    #: (org): Redis will have the org's newest state as soon as it can be told.
    refresh: Callable[[str], None]
    #: (org): what this process holds for it was registered again (`Admission.register`), begun after this call, and
    #: PostgreSQL knows.
    recover: Callable[[str], Awaitable[None]]
    #: (entries): they are in the ledger; the states after.
    post: Callable[[Sequence[Entry]], Awaitable[Sequence[Balance]]]
    #: (balance): Redis has it, if it is newer than what is there.
    install: Callable[[Balance], Awaitable[None]]
    #: (org, request, want, least, owed). An ambiguous failure: it may be held all the same.
    take_in_postgres: Callable[[str, str, int, int, int], Awaitable[Taken]]
    #: (org, request, more).
    extend_in_postgres: Callable[[str, str, int], Awaitable[Taken]]
    #: ((org, request, used), ...).
    renew_in_postgres: Callable[[Sequence[tuple[str, str, int]]], Awaitable[None]]
    #: How many gateway processes share the work.
    instances: Callable[[], int]
    #: (org): it has charges to post.
    mark_dirty: Callable[[str], None]
    journal: Journal | None = None

"""An org's keys in Redis, and what the scripts answer."""

from typing import NamedTuple, TypeVar

T = TypeVar("T")

# Kinds of entries, and what a tombstone says.
SETTLE, ORPHAN = range(2)
ADMITTED, SETTLED, ORPHANED = range(3)


class Row(NamedTuple):
    """An account of PostgreSQL as of `version`: what `install` and `applied` bring."""

    posted: int
    version: int
    set_aside: int
    cap: int
    epoch: int
    #: The hash that `cap` was given to; 0: none.
    birth: int


class Account(NamedTuple):
    """The account hash."""

    posted: int
    version: int
    set_aside: int
    cap: int
    epoch: int
    unposted: int
    held: int
    #: Tells this hash from every other that was or will be.
    birth: int
    #: Incarnation of the server that it was built on.
    server: int

    @property
    def available(self) -> int:
        return self.posted - self.set_aside - self.unposted - self.held


class Entry(NamedTuple):
    """One entry of the outbox. `life` is in the place of the time that real ids begin with."""

    request: int
    kind: int
    amount: int
    delta: int
    life: int
    #: Of the state that it was written beside; -1: there was none.
    version: int


class Tomb(NamedTuple):
    verdict: int
    charge: int = 0


class Held(NamedTuple):
    amount: int
    used: int


class Redis(NamedTuple):
    """The keys of the org. Holds and tombstones by request."""

    incarnation: int
    #: Grows whenever keys were lost; what a clock is to births and entry ids.
    life: int
    account: Account | None
    holds: tuple[Held | None, ...]
    outbox: tuple[Entry, ...]
    tombs: tuple[Tomb | None, ...]


class Admitted(NamedTuple):
    """Reply of `admit` and `extend`. `birth` is that of any hash, also one of another server; 0: there is none."""

    status: str
    granted: int
    epoch: int
    need: int
    birth: int


class Told(NamedTuple):
    """Reply of `settle`. `birth` is 0 when the account is missing or of another server."""

    status: str
    birth: int
    entry: Entry | None


class Renewed(NamedTuple):
    """Reply of `renew`; `birth` as of Told."""

    status: str
    epoch: int
    owed: int
    birth: int


class Lowered(NamedTuple):
    """Reply of `lower`; a version of -1: there is no such account."""

    version: int
    epoch: int
    cap: int
    birth: int


class Applied(NamedTuple):
    """Reply of `applied`. Unless it was done, PostgreSQL must go on after this version and epoch first."""

    status: str
    posted: int
    version: int = 0
    epoch: int = 0


class Waiting(NamedTuple):
    """Reply of `confirm`: of the entries, the script only tells the oldest."""

    birth: int
    outbox: tuple[Entry, ...]


def empty(requests: int) -> Redis:
    nothing = (None,) * requests
    return Redis(1, 1, None, nothing, (), nothing)


def put(values: tuple[T, ...], at: int, value: T) -> tuple[T, ...]:
    return (*values[:at], value, *values[at + 1 :])

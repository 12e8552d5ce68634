"""Everything there is: both stores, the gateways with what only they know, and what is under way between them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.protocol.books_side import Books, opened
from tests.protocol.redis_state import Account, Entry, Held, Lowered, Redis, Row, Tomb, empty, put
from tests.protocol.rules import Scope

# What the gateway of a request knows of it. Numbers, so that the order of worlds is the same in every process.
(
    NEW,
    ADMITTED,  # the script ran, its reply is under way
    OPEN,  # held in Redis, the upstream works
    EXTENDING,  # the same, and the reply to a request for more is under way
    OPEN_THERE,  # held in PostgreSQL
    GIVING_BACK,  # no reply came: whatever was taken must go
    GIVING_BACK_THERE,
    OWING,  # what it costs is known here; whether Redis knows is not
    TOLD,  # Redis has the charge; kept until PostgreSQL has it
    POSTED,  # PostgreSQL has it from us, Redis still has the hold and does not know the new balance
    SHOWN,  # Redis knows the new balance
    OVER,
    LOST,  # its gateway died
    EXCUSED,  # it died, and Redis lost the charge before it was posted (docs/guarantees.md)
) = range(14)

# What a flusher has in hand.
READ, COMMITTED = range(2)


class Settled(NamedTuple):
    """Of TOLD: the hash that took the charge, 0 when that cannot be relied on, and its entry there."""

    birth: int
    entry: Entry | None


class Reply(NamedTuple):
    """Of ADMITTED and EXTENDING, under way: what was granted in which epoch."""

    granted: int
    epoch: int


class Request(NamedTuple):
    stage: int = NEW
    gateway: int = -1
    #: Held.
    amount: int = 0
    #: What it cost; -1: not known, or known to nobody any more.
    charge: int = -1
    #: A row: of POSTED what Redis is shown, of LOST what a sweeper must have shown it.
    mark: Settled | Reply | Row | None = None


class Round(NamedTuple):
    """A gateway that registers its open holds again, for `epoch`."""

    epoch: int
    birth: int
    owed: int
    #: Bit per request.
    done: int


class Flush(NamedTuple):
    """READ, or COMMITTED with the row that PostgreSQL answered."""

    stage: int
    entries: tuple[Entry, ...]
    row: Row | None = None


class Gateway(NamedTuple):
    alive: bool = True
    acknowledged: int = 1
    round: Round | None = None
    flush: Flush | None = None


class Faults(NamedTuple):
    """What may still go wrong."""

    kills: int
    flushes: int
    rollbacks: int
    evictions: int
    topups: int
    lowerings: int
    restores: int


class Saved(NamedTuple):
    """What Redis would come back with."""

    account: Account | None
    holds: tuple[Held | None, ...]
    outbox: tuple[Entry, ...]
    tombs: tuple[Tomb | None, ...]


class Asked(NamedTuple):
    """A refusal for want of a cap, under way to PostgreSQL."""

    epoch: int
    birth: int
    need: int


class World(NamedTuple):
    redis: Redis
    books: Books
    gateways: tuple[Gateway, ...]
    requests: tuple[Request, ...]
    faults: Faults
    saved: Saved | None = None
    #: What PostgreSQL would come back with.
    backup: Books | None = None
    #: It did.
    restored: bool = False
    #: Rows under way to Redis.
    mails: tuple[Row, ...] = ()
    asked: Asked | None = None
    #: What `lower` answered, under way to PostgreSQL.
    lowered: Lowered | None = None
    #: Request whose admission may still arrive, though nobody waits for it.
    ghost: int = -1
    #: What holds of stalled gateways may cost beyond what the sweeper gave free, and what Redis could spend when
    #: PostgreSQL was restored.
    slack: int = 0

    @property
    def alive(self) -> int:
        """Bit per gateway."""
        return sum(1 << at for at, gateway in enumerate(self.gateways) if gateway.alive)

    @property
    def seen(self) -> int:
        """Bit per gateway that was heard of lately: a dead one was, a moment ago."""
        return (1 << len(self.gateways)) - 1

    @property
    def entry_versions(self) -> Iterator[int]:
        """With -1 among them perhaps."""
        yield from (entry.version for entry in self.redis.outbox)
        yield from (entry.version for entry in (self.saved.outbox if self.saved else ()))
        yield from (entry.version for gateway in self.gateways if gateway.flush for entry in gateway.flush.entries)
        marks = (request.mark for request in self.requests)
        yield from (mark.entry.version for mark in marks if isinstance(mark, Settled) and mark.entry is not None)

    @property
    def rows(self) -> Iterator[Row]:
        """States of the account that are under way to Redis."""
        yield from self.mails
        yield from (gateway.flush.row for gateway in self.gateways if gateway.flush and gateway.flush.row)
        yield from (request.mark for request in self.requests if isinstance(request.mark, Row))

    def with_request(self, at: int, **changes: Any) -> "World":
        return self._replace(requests=put(self.requests, at, self.requests[at]._replace(**changes)))

    def with_gateway(self, at: int, **changes: Any) -> "World":
        return self._replace(gateways=put(self.gateways, at, self.gateways[at]._replace(**changes)))


class Step(NamedTuple):
    does: str
    #: (operation, its arguments ...), or () when no store is asked.
    op: tuple[Any, ...]
    after: World
    #: It brings the world nearer to rest; False: faults, new requests, things that may go on for ever.
    ends: bool = True


def start(scope: Scope) -> World:
    return World(
        empty(scope.requests),
        opened(scope.credits, scope.requests),
        (Gateway(),) * scope.gateways,
        (Request(),) * scope.requests,
        Faults(
            scope.kills, scope.flushes, scope.rollbacks, scope.evictions, scope.topups, scope.lowerings, scope.restores
        ),
    )

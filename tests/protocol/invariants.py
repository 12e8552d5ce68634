"""What must hold in every state (C1-C4, C11) and when nothing is left to do (C3, C5). Each returns what is wrong."""

from collections.abc import Iterator

from tests.protocol.redis_side import ours
from tests.protocol.rules import Scope
from tests.protocol.world import (
    ADMITTED,
    EXCUSED,
    EXTENDING,
    LOST,
    NEW,
    OPEN,
    OPEN_THERE,
    OVER,
    OWING,
    TOLD,
    Request,
    World,
)


def wrong(world: World) -> Iterator[str]:
    """What is wrong in this state."""
    books = world.books
    posted = sum((settle or 0) + (orphan or 0) for settle, orphan in books.ledger)
    if books.balance != books.given - posted:
        yield "C1: the balance is not what came in less what was charged"
    account = world.redis.account
    if account is not None and not world.restored and (account.version, account.epoch) > (books.version, books.epoch):
        yield "C11: Redis has a state that PostgreSQL never gave out"
    for at, request in enumerate(world.requests):
        settle, orphan = books.ledger[at]
        if settle is not None and request.charge >= 0 and settle + (orphan or 0) != request.charge:
            yield f"C2: request {at} cost {request.charge}, the ledger took {settle + (orphan or 0)}"
        if request.stage == OVER and request.charge > 0 and settle is None:
            yield f"C3: the charge of {at} is forgotten, the ledger does not have it"
        if request.stage == LOST and request.charge > 0 and settle is None and not _waits(world, at):
            yield f"C3: the charge of {at} was told to Redis, and is nowhere"
    exposed = sum(_exposed(world, at, request) for at, request in enumerate(world.requests))
    if exposed > books.given + world.slack:
        yield f"C4: {exposed} are or may be charged of {books.given}"


def _waits(world: World, at: int) -> bool:
    flushing = any(gateway.flush and any(e.request == at for e in gateway.flush.entries) for gateway in world.gateways)
    return flushing or any(entry.request == at for entry in world.redis.outbox)


def _exposed(world: World, at: int, request: Request) -> int:
    """The most that this request has cost or may still cost."""
    settle, orphan = world.books.ledger[at]
    taken = (settle or 0) + (orphan or 0)
    if settle is not None or request.stage == NEW:
        return taken
    if request.stage in (ADMITTED, OPEN, EXTENDING, OPEN_THERE):
        return max(taken, request.amount)
    if request.stage in (OWING, TOLD):
        return max(taken, request.charge)
    if request.stage in (LOST, EXCUSED):
        hold, hold_there = world.redis.holds[at], world.books.holds[at]
        left = [entry.amount for entry in world.redis.outbox if entry.request == at]
        return max([taken, hold.used if hold else 0, hold_there.used if hold_there else 0, *left])
    return taken


def wrong_at_rest(world: World, scope: Scope) -> Iterator[str]:
    """What is wrong when nothing moves any more. C5: nothing is held and everything spendable is available."""
    redis, books, account = world.redis, world.books, world.redis.account
    if any(redis.holds) or redis.outbox or any(books.holds) or books.held:
        yield "C5: something is still held or unposted"
    if account is not None and (account.held or account.unposted):
        yield f"C5: the account still counts {account.held} held and {account.unposted} unposted"
    if account is not None and ours(redis) and account.available != books.balance:
        yield f"C5: {account.available} of {books.balance} are available"
    if books.lost or books.waiting:
        yield "C5: a lost state is still waited for"
    for at, request in enumerate(world.requests):
        if request.stage not in (NEW, OVER, LOST, EXCUSED):
            yield f"C5: request {at} never ends"
        settle, orphan = books.ledger[at]
        if request.stage == LOST and request.charge > 0 and settle is None:
            yield f"C3: the charge of {at} never reached the ledger"
        # A late admission that finds all tombstones lost is charged like a request whose gateway died.
        forgotten = scope.ghosts and (scope.flushes or scope.rollbacks)
        if request.stage == OVER and (settle or 0) + (orphan or 0) != request.charge and not forgotten:
            yield f"C2: request {at} cost {request.charge}, the ledger took {(settle or 0) + (orphan or 0)} in the end"

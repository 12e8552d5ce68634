"""What may go wrong at any time, as often as the scope has it."""

from collections.abc import Iterator

from tests.protocol import books_side as sql
from tests.protocol.books_side import Books
from tests.protocol.redis_state import Redis, Row, empty
from tests.protocol.rules import Scope
from tests.protocol.world import EXCUSED, LOST, OVER, POSTED, READ, SHOWN, TOLD, Request, Saved, Step, World


def faults(world: World, scope: Scope) -> Iterator[Step]:
    left = world.faults
    if left.topups:
        after = world._replace(books=sql.top_up(world.books, 1)[0], faults=left._replace(topups=left.topups - 1))
        yield Step("top up", ("top_up", 1), after, False)
    if left.kills and world.alive & (world.alive - 1):
        fewer = world._replace(faults=left._replace(kills=left.kills - 1))
        for at, gateway in enumerate(world.gateways):
            if gateway.alive:
                yield Step(f"kill gateway {at}", (), _killed(fewer, at), False)
    if left.flushes:
        fewer = world._replace(faults=left._replace(flushes=left.flushes - 1))
        yield Step("FLUSHALL", ("flushall",), _excused(fewer._replace(redis=flushed(world.redis))), False)
    if left.evictions and expires(world.redis):
        fewer = world._replace(faults=left._replace(evictions=left.evictions - 1))
        yield Step("the idle account expires", ("evict",), fewer._replace(redis=evicted(world.redis)), False)
    if left.restores and world.backup is None:
        yield Step("PostgreSQL is backed up", (), world._replace(backup=world.books), False)
    elif left.restores and world.backup is not None:
        fewer = world._replace(faults=left._replace(restores=left.restores - 1))
        yield Step("PostgreSQL is restored", (), _restored(fewer, world.backup), False)
    if left.rollbacks and world.saved is None:
        yield Step("Redis saves", ("save",), world._replace(saved=Saved(*world.redis[2:])), False)
    elif left.rollbacks and world.saved is not None:
        fewer = world._replace(faults=left._replace(rollbacks=left.rollbacks - 1), saved=None)
        back = restarted(world.redis, world.saved)
        yield Step("Redis restarts from what it saved", ("restart",), _excused(fewer._replace(redis=back)), False)


def _restored(world: World, backup: Books) -> World:
    """What was charged since the backup is forgotten with it, unless it still waits in Redis and is posted again."""
    told = [entry.request for entry in world.redis.outbox]
    for gateway in world.gateways:
        if gateway.flush is not None and gateway.flush.stage != READ:
            told = [at for at in told if at not in {entry.request for entry in gateway.flush.entries}]
    for at, request in enumerate(world.requests):
        forgotten = world.books.ledger[at] != backup.ledger[at] and not (request.stage == TOLD and at in told)
        if forgotten and request.stage in (OVER, TOLD, LOST):
            world = world.with_request(at, stage=EXCUSED, charge=-1, mark=None)
        elif request.stage == LOST and isinstance(request.mark, Row):
            world = world.with_request(at, mark=backup.row)
    # What waits in Redis may be spent once more, and again with each late state of what is forgotten.
    caps = [world.redis.account.cap if world.redis.account else 0, *(row.cap for row in world.rows)]
    slack = world.slack + len(caps) * max(caps)
    return world._replace(books=backup, backup=None, restored=True, slack=slack)


def flushed(redis: Redis) -> Redis:
    return empty(len(redis.holds))._replace(incarnation=redis.incarnation, life=redis.life + 1)


def expires(redis: Redis) -> bool:
    """An account that owes nothing has a time to live."""
    return redis.account is not None and not redis.account.unposted and not redis.account.held


def evicted(redis: Redis) -> Redis:
    return redis._replace(account=None, life=redis.life + 1)


def restarted(redis: Redis, saved: Saved) -> Redis:
    return Redis(redis.incarnation + 1, redis.life + 1, *saved)


def _killed(world: World, gateway: int) -> World:
    def left(request: Request) -> Request:
        if request.gateway != gateway or request.stage == OVER:
            return request
        told = request.stage in (TOLD, POSTED, SHOWN)
        return Request(LOST, gateway, 0, request.charge if told else -1, world.books.row)

    requests = tuple(left(request) for request in world.requests)
    world = world.with_gateway(gateway, alive=False, round=None, flush=None)
    return _excused(world._replace(requests=requests))


def _excused(world: World) -> World:
    """Charges of the dead that neither Redis nor PostgreSQL has: nobody promised them."""
    found = {entry.request for entry in world.redis.outbox}
    for at, request in enumerate(world.requests):
        if request.stage == LOST and request.charge > 0 and at not in found and world.books.ledger[at][0] is None:
            world = world.with_request(at, stage=EXCUSED)
    return world

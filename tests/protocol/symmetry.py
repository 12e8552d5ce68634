"""Requests are alike, and so are gateways: of all the worlds that differ only in which is which, one stands for all."""

from collections.abc import Sequence
from typing import Any

from tests.protocol.books_side import Books
from tests.protocol.redis_state import Entry, put
from tests.protocol.world import Gateway, Request, Settled, World

# Absent values stand as () and not as None in what is hashed, whose hash differs from process to process.


def ordered(world: World) -> World:
    """The world with gateways and requests in an order that does not depend on which is which."""
    gateways = range(len(world.gateways))
    own = [_gateway(world, at) for at in gateways]
    marks = [_request(world, at, request, own) for at, request in enumerate(world.requests)]
    keys = [
        hash((own[at], sum(mark for mark, request in zip(marks, world.requests, strict=True) if request.gateway == at)))
        for at in gateways
    ]
    by_gateway = sorted(gateways, key=keys.__getitem__)
    places = {old: at for at, old in enumerate(by_gateway)}
    by_request = sorted(range(len(marks)), key=lambda at: (marks[at], places.get(world.requests[at].gateway, -1)))
    if by_request == sorted(by_request) and by_gateway == sorted(by_gateway) and len(world.redis.outbox) < 2:
        return world
    return _renamed(world, by_request, by_gateway)


def _gateway(world: World, at: int) -> int:
    """What there is of a gateway but its requests."""
    gateway = world.gateways[at]
    flush, turn = gateway.flush, gateway.round
    return hash(
        (
            gateway.alive,
            gateway.acknowledged,
            turn[:3] if turn else (),
            (flush.stage, flush.row or (), len(flush.entries)) if flush else (),
            world.books.waiting & 1 << at != 0,
        )
    )


def _request(world: World, at: int, request: Request, own: list[int]) -> int:
    redis, books, saved, backup = world.redis, world.books, world.saved, world.backup
    mark: Any = request.mark or ()
    if isinstance(request.mark, Settled):
        mark = (request.mark.birth, request.mark.entry[1:] if request.mark.entry else ())
    turn = world.gateways[request.gateway].round if request.gateway >= 0 else None
    flushed = [
        (own[number], request.gateway == number, _of(gateway.flush.entries, at))
        for number, gateway in enumerate(world.gateways)
        if gateway.flush
    ]
    settle, orphan = books.ledger[at]
    return hash(
        (
            request[0],
            own[request.gateway] if request.gateway >= 0 else (),
            request[2:4],
            mark,
            redis.holds[at] or (),
            redis.tombs[at] or (),
            -1 if settle is None else settle,
            -1 if orphan is None else orphan,
            books.holds[at] or (),
            (saved.holds[at] or (), saved.tombs[at] or (), _of(saved.outbox, at)) if saved else (),
            _of(redis.outbox, at),
            (tuple(-1 if kind is None else kind for kind in backup.ledger[at]), backup.holds[at] or ())
            if backup
            else (),
            world.ghost == at,
            turn is not None and turn.done & 1 << at != 0,
            sum(hash(one) for one in flushed),
        )
    )


def _of(entries: Sequence[Entry], at: int) -> tuple[Any, ...]:
    return tuple(sorted([entry[1:] for entry in entries if entry[0] == at])) if entries else ()


def _renamed(world: World, by_request: list[int], by_gateway: list[int]) -> World:
    new = [0] * len(by_request)
    for at, old in enumerate(by_request):
        new[old] = at

    def entry(old: Entry) -> Entry:
        return Entry(new[old[0]], *old[1:])

    def entries(old: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple(sorted([entry(one) for one in old])) if old else old

    def some(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([values[old] for old in by_request])

    def gateway(old: Gateway) -> Gateway:
        turn, flush = old.round, old.flush
        if turn is not None and turn.done:
            done = sum(1 << new[at] for at in range(len(new)) if turn.done & 1 << at)
            old = old._replace(round=turn._replace(done=done))
        return old if flush is None else old._replace(flush=flush._replace(entries=entries(flush.entries)))

    def renamed(old: Books) -> Books:
        waiting = sum(1 << at for at, gone in enumerate(by_gateway) if old.waiting & 1 << gone)
        return old._replace(ledger=some(old.ledger), holds=some(old.holds), waiting=waiting)

    redis, saved = world.redis, world.saved
    requests = some(world.requests)
    for at, request in enumerate(requests):
        mark, gone_to = request.mark, request.gateway
        if isinstance(mark, Settled) and mark.entry is not None:
            mark = mark._replace(entry=entry(mark.entry))
        if gone_to >= 0:
            requests = put(requests, at, request._replace(mark=mark, gateway=by_gateway.index(gone_to)))
    return world._replace(
        redis=redis._replace(holds=some(redis.holds), tombs=some(redis.tombs), outbox=entries(redis.outbox)),
        books=renamed(world.books),
        backup=world.backup and renamed(world.backup),
        saved=saved and saved._replace(holds=some(saved.holds), outbox=entries(saved.outbox), tombs=some(saved.tombs)),
        requests=requests,
        gateways=tuple(gateway(world.gateways[old]) for old in by_gateway),
        ghost=new[world.ghost] if world.ghost >= 0 else -1,
    )

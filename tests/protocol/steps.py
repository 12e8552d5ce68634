"""What a gateway may do next for its requests.

Every step does at most one operation of one store, named in `op`; so any two of them may be mixed as networks, crashes
and schedulers do.
"""

from collections.abc import Iterator

from tests.protocol import books_side as sql
from tests.protocol import redis_side as lua
from tests.protocol.background import background, registers_or_flushes
from tests.protocol.faults import faults
from tests.protocol.redis_state import SETTLE, Admitted, Row, put
from tests.protocol.rules import PROTOCOL, Rules, Scope
from tests.protocol.world import (
    ADMITTED,
    EXTENDING,
    GIVING_BACK,
    GIVING_BACK_THERE,
    NEW,
    OPEN,
    OPEN_THERE,
    OVER,
    OWING,
    POSTED,
    SHOWN,
    TOLD,
    Asked,
    Reply,
    Request,
    Settled,
    Step,
    World,
)


def steps(world: World, scope: Scope, rules: Rules = PROTOCOL) -> Iterator[Step]:
    """Every step that is possible, those that change nothing left out."""
    for step in _all(world, scope, rules):
        if step.after != world:
            yield step


def _all(world: World, scope: Scope, rules: Rules) -> Iterator[Step]:
    for at, gateway in enumerate(world.gateways):
        if gateway.alive:
            yield from _begin(world, scope, rules, at)
            yield from registers_or_flushes(world, scope, rules, at)
    for at, request in enumerate(world.requests):
        if request.gateway >= 0 and world.gateways[request.gateway].alive:
            yield from _go_on(world, scope, rules, at, request)
    yield from background(world, scope, rules)
    yield from faults(world, scope)


def _begin(world: World, scope: Scope, rules: Rules, gateway: int) -> Iterator[Step]:
    """A request comes in. They are alike, so the first that is new stands for all of them."""
    at = next((at for at, request in enumerate(world.requests) if request.stage == NEW), None)
    if at is None:
        return
    if scope.redis_holds:
        yield from _admit(world, scope, rules, gateway, at, int(scope.capped))
    if scope.redis_holds and scope.ghosts and world.ghost < 0:
        given_up = Request(GIVING_BACK, gateway, scope.want)
        after = world._replace(ghost=at, requests=put(world.requests, at, given_up))
        yield Step(f"gateway {gateway}: give up on the admission of {at}, still under way", (), after, False)
    if scope.postgres_holds:
        yield from _take(world, scope, rules, gateway, at)


def _admit(world: World, scope: Scope, rules: Rules, gateway: int, at: int, capped: int) -> Iterator[Step]:
    asks = (at, scope.want, scope.least, scope.owed, capped)
    redis, reply = lua.admit(world.redis, *asks, rules)
    does = f"gateway {gateway}: admit request {at}: {reply.status}"
    after = world._replace(redis=redis)
    if reply.status == "OK":
        if scope.slow_replies:
            mark = Reply(reply.granted, reply.epoch)
            after = after.with_request(at, stage=ADMITTED, gateway=gateway, amount=reply.granted, mark=mark)
        else:
            after = _is_open(after, gateway, at, reply.granted, reply.epoch)
        yield Step(does, ("admit", *asks), after, False)
    elif reply.status == "CAP":
        yield Step(does, ("admit", *asks), _asked(after, reply), False)
        # The cap could not be raised to that: then it is asked for what there is.
        yield from _admit(world, scope, rules, gateway, at, 2)


def _asked(world: World, reply: Admitted) -> World:
    return world._replace(asked=Asked(reply.epoch, reply.birth, reply.need))


def _is_open(world: World, gateway: int, at: int, amount: int, epoch: int) -> World:
    """What was admitted in the new epoch need not be registered again."""
    turn = world.gateways[gateway].round
    if turn is not None and epoch >= turn.epoch:
        world = world.with_gateway(gateway, round=turn._replace(done=turn.done | 1 << at))
    return world.with_request(at, stage=OPEN, gateway=gateway, amount=amount, mark=None)


def _take(world: World, scope: Scope, rules: Rules, gateway: int, at: int) -> Iterator[Step]:
    wants = (at, scope.want, scope.least, scope.owed, int(scope.capped))
    books, taken = sql.take_hold(world.books, *wants, rules)
    if taken.status != "OK":
        return
    does = f"gateway {gateway}: take {taken.granted} for request {at} in PostgreSQL"
    there = world._replace(books=books)
    requests = put(world.requests, at, Request(OPEN_THERE, gateway, taken.granted))
    yield Step(does, ("take_hold", *wants), there._replace(requests=requests), False)
    if scope.lost_replies:
        requests = put(world.requests, at, Request(GIVING_BACK_THERE, gateway, taken.granted))
        yield Step(does + ", reply lost", ("take_hold", *wants), there._replace(requests=requests), False)


def _go_on(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    """The gateway of request `at` does what comes next for it."""
    stage = request.stage
    if stage == ADMITTED:
        assert isinstance(request.mark, Reply)
        after = _is_open(world, request.gateway, at, *request.mark)
        yield Step(f"reply to the admission of {at} arrives", (), after)
        if scope.lost_replies:
            after = world.with_request(at, stage=GIVING_BACK, mark=None)
            yield Step(f"reply to the admission of {at} is lost", (), after)
    elif stage == EXTENDING:
        yield from _extended(world, scope, rules, at, request)
    elif stage in (OPEN, OWING):
        yield from _end(world, scope, rules, at, request)
        if stage == OPEN:
            yield from _while_open(world, scope, rules, at, request)
    elif stage == OPEN_THERE:
        yield _post_directly(world, rules, at, _charge(scope, request), OVER)
        if request.amount < scope.most:
            yield from _extend_there(world, scope, rules, at, request)
    elif stage == GIVING_BACK_THERE:
        yield _post_directly(world, rules, at, 0, OVER)
    elif stage == TOLD:
        yield from _confirm(world, scope, rules, at, request)
    else:
        yield from _give_back(world, scope, rules, at, request)


def _give_back(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    if request.stage == POSTED:
        assert isinstance(request.mark, Row)
        redis, status = lua.install(world.redis, *request.mark, rules)
        after = world._replace(redis=redis).with_request(at, stage=SHOWN, mark=None)
        yield Step(f"show what {at} left: {status}", ("install", *request.mark), after)
    elif request.stage in (GIVING_BACK, SHOWN):
        redis, told = lua.settle(world.redis, at, 0, rules)
        charge = max(0, request.charge)
        after = world._replace(redis=redis).with_request(at, stage=OVER, charge=charge, mark=None)
        yield Step(f"give back what {at} holds: {told.status}", ("settle", at, 0), after)
    if request.stage == GIVING_BACK and rules.fallback_under_same_id and scope.postgres_holds:
        wants = (at, scope.want, scope.least, scope.owed, int(scope.capped))
        books, taken = sql.take_hold(world.books, *wants, rules)
        if taken.status == "OK":
            after = world._replace(books=books).with_request(at, stage=OPEN_THERE, amount=taken.granted)
            yield Step(f"take {at} in PostgreSQL instead", ("take_hold", *wants), after, False)


def _while_open(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    if scope.beats:
        redis, renewed = lua.renew(world.redis, at, request.amount, scope.owed, rules)
        beat = ("renew", at, request.amount, scope.owed)
        yield Step(f"renew {at}: {renewed.status}", beat, world._replace(redis=redis), False)
    if request.amount < scope.most:
        yield from _extend(world, scope, rules, at, request, int(scope.capped))


def _extend(world: World, scope: Scope, rules: Rules, at: int, request: Request, capped: int) -> Iterator[Step]:
    asks = (at, 1, scope.owed, capped)
    redis, reply = lua.extend(world.redis, *asks, rules)
    does = f"extend {at}: {reply.status}"
    after = world._replace(redis=redis)
    if reply.status == "OK":
        after = after.with_request(at, stage=EXTENDING, mark=Reply(reply.granted, reply.epoch))
        if not scope.slow_replies:
            after = _grown(after, rules, at, request)
        yield Step(does, ("extend", *asks), after, False)
    elif reply.status == "CAP":
        yield Step(does, ("extend", *asks), _asked(after, reply), False)
        yield from _extend(world, scope, rules, at, request, 2)


def _extended(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    yield Step(f"reply to the extension of {at} arrives", (), _grown(world, rules, at, request))
    if scope.lost_replies:
        after = world.with_request(at, stage=OPEN, mark=None)
        yield Step(f"reply to the extension of {at} is lost", (), after)


def _grown(world: World, rules: Rules, at: int, request: Request) -> World:
    """The word of an account of an older epoch than the gateway has heard of is worth nothing."""
    reply, gateway = world.requests[at].mark, world.gateways[request.gateway]
    assert isinstance(reply, Reply)
    heard = max(gateway.acknowledged, gateway.round.epoch if gateway.round else 0)
    counts = reply.epoch >= heard or rules.extends_on_stale_word
    return world.with_request(at, stage=OPEN, amount=request.amount + (reply.granted if counts else 0), mark=None)


def _extend_there(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    asks = (at, 1, int(scope.capped))
    books, taken = sql.extend_hold(world.books, *asks, rules)
    if taken.status == "OK":
        after = world._replace(books=books)
        grown = after.with_request(at, amount=request.amount + taken.granted)
        yield Step(f"extend {at} in PostgreSQL", ("extend_hold", *asks), grown, False)
        if scope.lost_replies:
            yield Step(f"extend {at} in PostgreSQL, reply lost", ("extend_hold", *asks), after, False)


def _charge(scope: Scope, request: Request) -> int:
    if request.charge >= 0:
        return request.charge
    return request.amount if scope.charge is None else min(scope.charge, request.amount)


def _end(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    charge = _charge(scope, request)
    redis, told = lua.settle(world.redis, at, charge, rules)
    op = ("settle", at, charge)
    if told.status == "MISS":
        if not rules.settle_needs_account:
            yield _post_directly(world, rules, at, charge, POSTED)
        return
    after = world._replace(redis=redis)
    mark = Settled(told.birth, told.entry)
    done = after.with_request(at, stage=TOLD, charge=charge, mark=mark)
    yield Step(f"settle {at} for {charge}: {told.status}", op, done)
    if scope.lost_replies:
        after = after.with_request(at, stage=OWING, charge=charge)
        yield Step(f"settle {at} for {charge}, reply lost", op, after, False)
    if _may_post(world, scope, request):
        yield _post_directly(world, rules, at, charge, POSTED)


def _may_post(world: World, scope: Scope, request: Request) -> bool:
    return scope.direct_posts or world.gateways[request.gateway].acknowledged < world.books.epoch


def _post_directly(world: World, rules: Rules, at: int, charge: int, stage: int) -> Step:
    books, row = sql.post(world.books, (at, SETTLE, charge), rules=rules)
    if stage == POSTED and rules.drops_before_install:
        stage = SHOWN
    after = world._replace(books=books)
    after = after.with_request(at, stage=stage, charge=charge, mark=row if stage == POSTED else None)
    return Step(f"post {charge} for {at} to PostgreSQL", ("post", (at, SETTLE, charge)), after)


def _confirm(world: World, scope: Scope, rules: Rules, at: int, request: Request) -> Iterator[Step]:
    """PostgreSQL has the charge when its entry is gone from the hash that took it; in any other case it is posted."""
    assert isinstance(request.mark, Settled)
    birth, entry = request.mark
    _, now = lua.confirm(world.redis, rules)
    if entry is not None and (birth == now.birth != 0 or rules.confirms_by_absence):
        if entry not in now.outbox:
            yield Step(f"confirm {at}", ("confirm",), world.with_request(at, stage=OVER, mark=None))
        if not _may_post(world, scope, request):
            return
    yield _post_directly(world, rules, at, request.charge, OVER)

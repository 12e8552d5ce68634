"""What gateways do for all requests: register again, flush, sweep, raise and lower caps, tell Redis what they read."""

from collections.abc import Iterator
from dataclasses import replace

from tests.protocol import books_side as sql
from tests.protocol import redis_side as lua
from tests.protocol.redis_state import SETTLE, Account, Held, Row
from tests.protocol.rules import Rules, Scope
from tests.protocol.world import (
    ADMITTED,
    COMMITTED,
    EXCUSED,
    EXTENDING,
    LOST,
    OPEN,
    OPEN_THERE,
    OVER,
    OWING,
    POSTED,
    READ,
    TOLD,
    Flush,
    Request,
    Round,
    Step,
    World,
)


def registers_or_flushes(world: World, scope: Scope, rules: Rules, gateway: int) -> Iterator[Step]:
    if scope.redis_holds:
        yield from _register(world, scope, rules, gateway)
        flushing = sum(gateway.flush is not None for gateway in world.gateways)
        if world.gateways[gateway].flush is not None or flushing < scope.flushers:
            yield from _flush(world, scope, rules, gateway)


def _register(world: World, scope: Scope, rules: Rules, gateway: int) -> Iterator[Step]:
    """A new epoch: every open hold is registered again, every charge posted, and only then it is acknowledged."""
    mine = [(at, request) for at, request in enumerate(world.requests) if request.gateway == gateway]
    state, books = world.gateways[gateway], world.books
    if state.acknowledged >= books.epoch:
        return
    now = state.round
    if now is None or now.epoch < books.epoch:
        now = Round(books.epoch, 0, 0, 0)
    missing = False
    for at, request in mine:
        if request.stage not in (OPEN, EXTENDING) or now.done & 1 << at:
            continue
        missing = True
        redis, told = lua.renew(world.redis, at, request.amount, scope.owed, rules)
        after = world._replace(redis=redis)
        if told.status == "GONE":
            after = after.with_gateway(gateway, round=now._replace(done=now.done | 1 << at))
        elif told.status == "OK" and told.birth:
            # Another hash than the one before: what was registered there is gone.
            already = now.done if now.birth in (0, told.birth) else 0
            done = Round(now.epoch, told.birth, told.owed, already | 1 << at)
            after = after.with_gateway(gateway, round=done)
        asks = ("renew", at, request.amount, scope.owed)
        yield Step(f"gateway {gateway}: register {at} again: {told.status}", asks, after)
    under_way = any(request.stage in (ADMITTED, EXTENDING) for _, request in mine)
    unposted = any(request.stage in (OWING, TOLD) for _, request in mine)
    if (
        (missing and not rules.acknowledges_unregistered)
        or (under_way and not rules.acknowledges_under_way)
        or (unposted and not rules.acknowledges_unposted)
    ):
        return
    says = (gateway, now.epoch, now.birth, now.owed, world.seen)
    after = world._replace(books=sql.acknowledge(books, *says, rules)[0])
    after = after.with_gateway(gateway, acknowledged=now.epoch, round=None)
    yield Step(f"gateway {gateway}: acknowledge epoch {now.epoch}, {now.owed} owed", ("acknowledge", *says), after)


def _flush(world: World, scope: Scope, rules: Rules, gateway: int) -> Iterator[Step]:
    """Read, post and commit, applied; each may be the last that this flusher does."""
    flush, redis = world.gateways[gateway].flush, world.redis
    who = f"flusher {gateway}"
    if flush is None:
        if redis.outbox:
            after = world.with_gateway(gateway, flush=Flush(READ, redis.outbox))
            if rules.ack_before_commit:
                unseen = world.books.row._replace(version=-1)
                taken = lua.applied(redis, unseen, redis.outbox, replace(rules, older_subtracts=True))[0]
                after = after._replace(redis=taken)
            yield Step(f"{who}: read {len(redis.outbox)}", (), after)
        return
    if scope.flusher_dies:
        yield Step(f"{who}: dies", (), world.with_gateway(gateway, flush=None), False)
    if flush.stage == READ:
        entries = tuple((entry.request, entry.kind, entry.amount) for entry in flush.entries)
        books, row = sql.post(world.books, *entries, rules=rules)
        posted = None if rules.ack_before_commit else Flush(COMMITTED, flush.entries, row)
        after = world._replace(books=books).with_gateway(gateway, flush=posted)
        for at in {entry.request for entry in flush.entries if entry.kind == SETTLE}:
            if after.requests[at].stage == TOLD and after.requests[at].gateway == gateway:
                after = after.with_request(at, stage=OVER, mark=None)
        yield Step(f"{who}: post and commit", ("post", *entries), after)
    else:
        assert flush.row is not None
        op = ("applied", flush.row, flush.entries)
        redis, reply = lua.applied(redis, flush.row, flush.entries, rules)
        if reply.status != "OK":
            assert world.restored or reply.status == "SAME", "PostgreSQL was never set back"
            after = _gone_on(world, reply.version, reply.epoch)
            after = after.with_gateway(gateway, flush=flush._replace(row=after.books.row))
            # Its reply changes nothing by itself, so the two steps are one.
            yield Step(f"{who}: {reply.status}, go on after {reply.version}", ("go_on_after", *reply[2:]), after)
            return
        after = world._replace(redis=redis).with_gateway(gateway, flush=None)
        yield Step(f"{who}: applied", op, after)


def _gone_on(world: World, version: int, epoch: int) -> World:
    return world._replace(books=sql.go_on_after(world.books, version, epoch)[0])


def background(world: World, scope: Scope, rules: Rules) -> Iterator[Step]:
    if not world.alive:
        return
    if scope.redis_holds:
        yield from _mails(world, scope, rules)
        yield from _caps(world, scope, rules)
        if world.ghost >= 0:
            asks = (world.ghost, scope.want, scope.least, scope.owed, int(scope.capped))
            after = world._replace(redis=lua.admit(world.redis, *asks, rules)[0], ghost=-1)
            yield Step(f"the late admission of {world.ghost} arrives", ("admit", *asks), after, False)
    yield from _sweep(world, scope, rules)
    if world.books.waiting and not world.books.waiting & world.alive and _dead_owe_nothing(world):
        yield Step("grace is over", ("end_grace",), world._replace(books=sql.end_grace(world.books)[0]))


def _mails(world: World, scope: Scope, rules: Rules) -> Iterator[Step]:
    """Whoever reads the account tells Redis, at some time. What was told may arrive again until it is forgotten."""
    row, mails, account = world.books.row, world.mails, world.redis.account
    if world.restored and account is not None and _contradicts(account, row):
        does, after = f"read, go on after {account.version}", _gone_on(world, account.version, account.epoch)
        yield Step(does, ("go_on_after", account.version, account.epoch), after)
    if scope.mails and row not in mails:
        yield Step("read the account", ("read",), world._replace(mails=(*mails, row)[-scope.mails :]))
    for mail in mails if scope.mails else (row,):
        redis, status = lua.install(world.redis, *mail, rules)
        does, after = f"install version {mail.version}: {status}", world._replace(redis=redis)
        # Perhaps no request comes that needs the account. Before it ends a hold, the sweeper builds it.
        yield Step(does, ("install", *mail), after, status != "BUILT" or any(world.redis.holds))


def _contradicts(account: Account, row: Row) -> bool:
    """It was read after the account, so only a restored PostgreSQL says this."""
    if row.version == account.version and row.posted != account.posted:
        return True
    return row.version < account.version or row.epoch < account.epoch


def _caps(world: World, scope: Scope, rules: Rules) -> Iterator[Step]:
    redis, books = world.redis, world.books
    if world.asked is not None:
        asks = (*world.asked, scope.floor, world.seen)
        after = world._replace(books=sql.raise_cap(books, *asks, rules)[0], asked=None)
        yield Step("raise the cap", ("raise_cap", *asks), after)
    if rules.without_births and not lua.ours(redis, rules) and books.cap:
        lost, _ = sql.lose_state(books, books.epoch, world.seen)
        yield Step("the state was lost", ("lose_state", books.epoch, world.seen), world._replace(books=lost))
    left = world.faults.lowerings
    if left and world.lowered is None and lua.ours(redis, rules):
        redis, lowered = lua.lower(redis, rules)
        after = world._replace(redis=redis, lowered=lowered, faults=world.faults._replace(lowerings=left - 1))
        yield Step("lower", ("lower",), after, False)
    if world.lowered is not None:
        version, epoch, cap, birth = world.lowered
        after = world._replace(books=sql.lower_cap(books, epoch, birth, version, cap, rules)[0], lowered=None)
        yield Step("lower the cap", ("lower_cap", epoch, birth, version, cap), after)


def _sweep(world: World, scope: Scope, rules: Rules) -> Iterator[Step]:
    for at, request in enumerate(world.requests):
        gone = request.stage in (LOST, EXCUSED, OVER)
        # Who holds in PostgreSQL renews nothing in Redis.
        unkept = gone or request.stage == OPEN_THERE
        hold, hold_there = world.redis.holds[at], world.books.holds[at]
        if hold is not None and (unkept or scope.stalls) and _is_shown(world, request, rules):
            after = _stalled(world, unkept, hold)._replace(redis=lua.orphan(world.redis, at)[0])
            yield Step(f"sweep {at}", ("orphan", at), after, unkept)
        if hold_there is not None and (gone or scope.stalls):
            after = _stalled(world, gone, hold_there)._replace(books=sql.sweep_hold(world.books, at, rules)[0])
            yield Step(f"sweep {at} in PostgreSQL", ("sweep_hold", at), after, gone)


def _is_shown(world: World, request: Request, rules: Rules) -> bool:
    """The sweeper has installed what it read after the lease was over: what the dead posted is known to Redis."""
    account = world.redis.account
    if account is None or rules.sweeps_unshown or not isinstance(request.mark, Row) or request.stage == POSTED:
        return True
    return account.version >= request.mark.version


def _stalled(world: World, gone: bool, hold: Held) -> World:
    """A living gateway may charge its whole hold later, of which the sweeper gave a part free."""
    return world if gone else world._replace(slack=world.slack + hold.amount - hold.used)


def _dead_owe_nothing(world: World) -> bool:
    """What the dead left behind in Redis is posted, or was lost with it."""
    keys = [(world.redis.holds, world.redis.outbox)]
    if world.saved is not None:
        keys.append((world.saved.holds, world.saved.outbox))
    dead = {at for at, request in enumerate(world.requests) if request.stage in (LOST, EXCUSED)}
    flushing = {entry.request for g in world.gateways if g.flush for entry in g.flush.entries}
    return not dead & flushing and not any(
        any(holds[at] is not None for at in dead) or any(entry.request in dead for entry in outbox)
        for holds, outbox in keys
    )

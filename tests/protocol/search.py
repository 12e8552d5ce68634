"""Every state that can be reached, nearest first: the first thing found wrong has the shortest way to it."""

import gc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.protocol.invariants import wrong, wrong_at_rest
from tests.protocol.redis_state import Entry, Row
from tests.protocol.rules import PROTOCOL, Rules, Scope
from tests.protocol.steps import steps
from tests.protocol.symmetry import ordered
from tests.protocol.world import EXCUSED, LOST, Request, Settled, World, start


@dataclass
class Found:
    """What a search came to. `problem` is empty when all holds; `trace` is the shortest way to it."""

    states: int = 0
    transitions: int = 0
    at_rest: int = 0
    problem: str = ""
    trace: list[str] = field(default_factory=list)
    #: Not everything was seen.
    cut: bool = False


def search(scope: Scope, rules: Rules = PROTOCOL, states_max: int = 5_000_000) -> Found:
    """Looks at every state of `scope` under `rules`, until something is wrong or `states_max` were seen."""
    # Nothing here is in a circle, and looking for circles among millions of tuples takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _search(scope, rules, states_max)
    finally:
        if collecting:
            gc.enable()


def _search(scope: Scope, rules: Rules, states_max: int) -> Found:
    first = alike(start(scope))
    found = Found(states=1)
    #: Every state, and every world as a step left it, with the state that stands for it.
    known = {first: first}
    came_from: dict[World, tuple[World | None, str]] = {first: (None, "")}
    queue = deque([first])
    while queue and not found.problem and not found.cut:
        world = queue.popleft()
        found.problem = next(wrong(world), "")
        resting = not found.problem
        for step in steps(world, scope, rules) if resting else ():
            found.transitions += 1
            state = known.get(step.after)
            if state is None:
                state = known[step.after] = alike(step.after)
                if state not in came_from:
                    known[state] = state
                    came_from[state] = (world, step.does)
                    queue.append(state)
            if step.ends and state != world:
                resting = False
        if resting:
            found.at_rest += 1
            found.problem = next(wrong_at_rest(world, scope), "")
        found.states = len(came_from)
        found.cut = found.states > states_max
        if found.problem:
            found.trace = _way(came_from, world)
    return found


def _way(came_from: dict[World, tuple[World | None, str]], world: World) -> list[str]:
    way: list[str] = []
    before, does = came_from[world]
    while before is not None:
        way.append(does)
        before, does = came_from[before]
    return way[::-1]


def alike(world: World) -> World:
    """One world for all that will go on alike: what can have no effect any more is left out, and versions are numbered
    anew, since only their order matters and they would grow for ever."""
    world = _tidied(world)
    versions = {world.books.version, *world.entry_versions} - {-1}
    if world.backup is not None:
        versions.add(world.backup.version)
    if world.redis.account is not None:
        versions.add(world.redis.account.version)
    versions.update([mail.version for mail in world.mails])
    if world.saved is not None and world.saved.account is not None:
        versions.add(world.saved.account.version)
    if world.lowered is not None:
        versions.add(world.lowered.version)
    for gateway in world.gateways:
        if gateway.flush is not None and gateway.flush.row is not None:
            versions.add(gateway.flush.row.version)
    for request in world.requests:
        if isinstance(request.mark, Row):
            versions.add(request.mark.version)
    # Of a restored PostgreSQL it matters as well whether its next change reaches a version.
    rank = _ranks(sorted(versions), 2 if world.faults.restores or world.restored else 1)
    if any(new != old for old, new in rank.items()):
        world = _ranked(world, rank)
    return ordered(world)


def _ranks(versions: list[int], apart_max: int) -> dict[int, int]:
    """Each version's new number: the first is 0, and no two that follow each other are further apart than that."""
    ranks, at = {-1: -1}, 0
    for before, version in zip([versions[0], *versions], versions, strict=False):
        at += min(apart_max, version - before)
        ranks[version] = at
    return ranks


def _with_entries(world: World, changed: Callable[[Entry], Entry]) -> World:
    def entries(old: tuple[Entry, ...]) -> tuple[Entry, ...]:
        return tuple([changed(entry) for entry in old])

    def mark(old: Request) -> Request:
        if isinstance(old.mark, Settled) and old.mark.entry is not None:
            return old._replace(mark=old.mark._replace(entry=changed(old.mark.entry)))
        return old

    return world._replace(
        redis=world.redis._replace(outbox=entries(world.redis.outbox)),
        saved=world.saved and world.saved._replace(outbox=entries(world.saved.outbox)),
        gateways=tuple(
            gateway._replace(flush=gateway.flush._replace(entries=entries(gateway.flush.entries)))
            if gateway.flush
            else gateway
            for gateway in world.gateways
        ),
        requests=tuple(mark(request) for request in world.requests),
    )


def _tidied(world: World) -> World:
    books, faults, account = world.books, world.faults, world.redis.account
    if world.asked is not None and world.asked.epoch != books.epoch and not (faults.restores or world.restored):
        world = world._replace(asked=None)
    if (
        world.mails
        and not (faults.flushes or faults.rollbacks or faults.evictions)
        and account is not None
        and account.server == world.redis.incarnation
        and any(mail.version <= account.version for mail in world.mails)
    ):
        world = world._replace(mails=tuple(mail for mail in world.mails if mail.version > account.version))
    for at, request in enumerate(world.requests):
        row = request.mark
        if request.stage in (LOST, EXCUSED) and isinstance(row, Row):
            if world.redis.holds[at] is None and world.saved is None and world.ghost != at:
                world = world.with_request(at, mark=None)
            elif row != (0, row.version, 0, 0, 0, 0):
                world = world.with_request(at, mark=Row(0, row.version, 0, 0, 0, 0))
    for at, gateway in enumerate(world.gateways):
        turn = gateway.round
        if turn is not None and turn.epoch < books.epoch:
            turn = None
        acknowledged = gateway.acknowledged if gateway.acknowledged >= books.epoch else 0
        if (turn, acknowledged) != (gateway.round, gateway.acknowledged):
            world = world.with_gateway(at, round=turn, acknowledged=acknowledged)
    return world


def _ranked(world: World, rank: dict[int, int]) -> World:
    def row(old: Row) -> Row:
        return old._replace(version=rank[old.version])

    if any(version >= 0 for version in world.entry_versions):
        world = _with_entries(world, lambda entry: entry._replace(version=rank[entry.version]))
    redis, saved, lowered = world.redis, world.saved, world.lowered
    if redis.account is not None:
        redis = redis._replace(account=redis.account._replace(version=rank[redis.account.version]))
    if saved is not None and saved.account is not None:
        saved = saved._replace(account=saved.account._replace(version=rank[saved.account.version]))
    if lowered is not None:
        lowered = lowered._replace(version=rank[lowered.version])
    return world._replace(
        redis=redis,
        backup=world.backup and world.backup._replace(version=rank[world.backup.version]),
        books=world.books._replace(version=rank[world.books.version]),
        mails=tuple(row(mail) for mail in world.mails),
        saved=saved,
        lowered=lowered,
        gateways=tuple(
            g._replace(flush=g.flush._replace(row=row(g.flush.row))) if g.flush and g.flush.row else g
            for g in world.gateways
        ),
        requests=tuple(r._replace(mark=row(r.mark)) if isinstance(r.mark, Row) else r for r in world.requests),
    )

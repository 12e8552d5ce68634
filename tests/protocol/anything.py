"""Operations of all kinds, one after the other, that tell scripts and functions from the model if anything does."""

import random
from collections.abc import Sequence
from typing import Any

from tests.protocol.redis_state import ORPHAN, SETTLE, Entry, Row
from tests.protocol.rules import Scope
from tests.protocol.world import World

Op = tuple[Any, ...]


class Anything:
    """Operations with whatever arguments were ever seen, also such as no gateway would think of."""

    def __init__(self, scope: Scope, chance: random.Random) -> None:
        self._scope = scope
        self._chance = chance
        self._rows: list[Row] = []
        self._entries: list[Entry] = []
        self._births = [0]

    def next(self, world: World) -> Op:
        self._see(world)
        weights = {name: weight for name, weight in WEIGHTS.items() if getattr(self, f"_may_{name}", _always)(world)}
        (name,) = self._chance.choices([*weights], [*weights.values()])
        make = getattr(self, f"_{name}", None)
        return (name, *(make(world) if make else ()))

    def _see(self, world: World) -> None:
        if world.books.row not in self._rows:
            self._rows.append(world.books.row)
        self._entries += [entry for entry in world.redis.outbox if entry not in self._entries]
        account = world.redis.account
        if account is not None and account.birth not in self._births:
            self._births.append(account.birth)

    def _request(self, *likely: Sequence[object]) -> int:
        """Mostly one for which there is something in one of `likely`."""
        requests = range(self._scope.requests)
        found = [at for at in requests if any(there[at] is not None for there in likely)]
        return self._chance.choice(found if found and self._chance.random() < 0.7 else requests)

    def _amount(self, least: int = 0) -> int:
        return self._chance.randint(least, 3)

    def _mostly_last(self, seen: list[Any]) -> Any:
        return seen[-1] if self._chance.random() < 0.7 else self._chance.choice(seen)

    def _account(self, world: World) -> tuple[int, int]:
        """An epoch and a birth."""
        account, chance = world.redis.account, self._chance
        if account is not None and chance.random() < 0.7:
            return (account.epoch if chance.random() < 0.5 else world.books.epoch), account.birth
        return world.books.epoch - chance.randint(0, 1), self._mostly_last(self._births)

    def _admit(self, world: World) -> Op:
        want = self._amount(1)
        return self._request(), want, self._chance.randint(1, want), self._amount(), self._chance.randint(0, 2)

    def _extend(self, world: World) -> Op:
        return self._request(world.redis.holds), self._amount(1), self._amount(), self._chance.randint(0, 2)

    def _settle(self, world: World) -> Op:
        return self._request(world.redis.holds, world.redis.tombs), self._amount()

    def _renew(self, world: World) -> Op:
        return self._request(world.redis.holds), self._amount(1), self._amount()

    def _orphan(self, world: World) -> Op:
        return (self._request(world.redis.holds),)

    def _install(self, world: World) -> Op:
        row: Row = self._mostly_last(self._rows)
        return row

    def _applied(self, world: World) -> Op:
        waiting = world.redis.outbox
        some = (
            waiting if self._chance.random() < 0.5 else tuple(e for e in self._entries if self._chance.random() < 0.3)
        )
        return self._mostly_last(self._rows), some

    def _post(self, world: World) -> Op:
        chance = self._chance
        if chance.random() < 0.6 and world.redis.outbox:
            return tuple((entry.request, entry.kind, entry.amount) for entry in world.redis.outbox)
        return tuple(
            (self._request(), chance.choice((SETTLE, ORPHAN)), self._amount()) for _ in range(chance.randint(1, 3))
        )

    def _sweep_hold(self, world: World) -> Op:
        return (self._request(world.books.holds),)

    def _take_hold(self, world: World) -> Op:
        want = self._amount(1)
        return self._request(), want, self._chance.randint(1, want), self._amount(), self._chance.randint(0, 1)

    def _extend_hold(self, world: World) -> Op:
        return self._request(world.books.holds), self._amount(1), self._chance.randint(0, 1)

    def _raise_cap(self, world: World) -> Op:
        return *self._account(world), self._amount(), self._amount(), world.seen

    def _go_on_after(self, world: World) -> Op:
        """Of a database that was never restored: it already has."""
        older = [row for row in self._rows if row.version < world.books.version]
        row = self._chance.choice(older or [world.books.row._replace(version=-1)])
        return row.version, row.epoch

    def _may_go_on_after(self, world: World) -> bool:
        return any(row.version < world.books.version for row in self._rows)

    def _acknowledge(self, world: World) -> Op:
        gateway, account = self._chance.randrange(self._scope.gateways), self._account(world)
        if world.books.waiting and world.redis.account and self._chance.random() < 0.5:
            account = world.books.epoch, world.redis.account.birth
        return gateway, *account, self._amount(), world.seen

    def _lower_cap(self, world: World) -> Op:
        row = self._rows[-1] if self._chance.random() < 0.5 else self._chance.choice(self._rows)
        account = (row.epoch, row.birth) if self._chance.random() < 0.6 else self._account(world)
        return *account, row.version, self._amount()

    def _top_up(self, world: World) -> Op:
        return (self._amount(1),)

    def _may_restart(self, world: World) -> bool:
        return world.saved is not None


def _always(world: World) -> bool:
    return True


#: How often, beside each other.
WEIGHTS = {
    "admit": 16, "extend": 7, "settle": 8, "renew": 6, "orphan": 3, "install": 16, "applied": 6, "lower": 3,
    "confirm": 2, "read": 1, "post": 5, "sweep_hold": 2, "take_hold": 6, "extend_hold": 4, "raise_cap": 12,
    "go_on_after": 1, "acknowledge": 10, "lower_cap": 4, "end_grace": 1, "top_up": 3, "flushall": 1, "evict": 2,
    "save": 2, "restart": 1,
}  # fmt: skip

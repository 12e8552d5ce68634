"""The model is what the scripts and the SQL functions do: every operation of the one, done by the others, answers the
same and leaves the same behind."""

import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis as redis_py

from gateway.ledger import migrate
from gateway.stores import Postgres
from gateway.types import Balance
from tests.protocol.anything import Anything, Op
from tests.protocol.names import Names
from tests.protocol.ops import FUNCTIONS, perform
from tests.protocol.real_books import RealBooks
from tests.protocol.real_redis import RealRedis
from tests.protocol.redis_state import Row, Waiting
from tests.protocol.rules import PROTOCOL, Rules, Scope
from tests.protocol.scopes import MUTANTS
from tests.protocol.steps import steps
from tests.protocol.world import start


@dataclass
class Stores:
    client: redis_py.Redis
    postgres: Postgres


@pytest.fixture
async def stores(redis_url: str, database_url: str) -> AsyncIterator[Stores]:
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=1)
    await postgres.open()
    await migrate(postgres)
    try:
        with redis_py.Redis.from_url(redis_url) as client:
            yield Stores(client, postgres)
    finally:
        await postgres.close()


class Both:
    """A world of the model beside the same one in real stores. Fails where they differ."""

    def __init__(self, stores: Stores, org: str, scope: Scope, rules: Rules = PROTOCOL) -> None:
        names = Names()
        self._rules = rules
        self.world = start(scope)
        self.done: list[Op] = []
        self._redis = RealRedis(stores.client, org, scope.requests, names)
        self._books = RealBooks(stores.postgres, org, scope.requests, scope.gateways, names)
        self._credits = scope.credits

    async def open(self) -> None:
        await self._books.open(self._credits)
        assert await self._books.state(self.world.books) == self.world.books

    async def set_back(self, row: Row) -> None:
        """PostgreSQL has forgotten what versions and epochs it gave out after this one."""
        await self._books.set_back(row)
        self.world = self.world._replace(books=self.world.books._replace(version=row.version, epoch=row.epoch))

    async def do(self, op: Op) -> Any:
        """The model's reply to `op`, which is that of the real store as well."""
        self.done.append(op)
        name, *args = op
        self.world, expected = perform(self.world, op, self._rules)
        try:
            if name in FUNCTIONS:
                await self._call(name, args, expected)
            else:
                self._run(name, args, expected)
        except Exception as exc:
            exc.add_note("\n".join(map(str, self.done)))
            raise
        return expected

    async def _call(self, name: str, args: list[Any], expected: Any) -> None:
        reply = await getattr(self._books, name)(*args)
        assert await self._books.state(self.world.books) == self.world.books
        assert (self._books.row(reply) if isinstance(reply, Balance) else reply) == expected

    def _run(self, name: str, args: list[Any], expected: Any) -> None:
        reply, redis = getattr(self._redis, name)(*args), self.world.redis
        assert self._redis.read(redis) == redis
        if name == "settle":
            reply = self._redis.told(reply)
        if isinstance(expected, Waiting):
            expected = (expected.birth, expected.outbox[0] if expected.outbox else None)
        assert reply == expected


async def test_whatever_a_store_is_asked_it_does_what_the_model_does(stores: Stores, full: bool) -> None:
    for number in range(400 if full else 12):
        await ask_anything(stores, number)


async def ask_anything(stores: Stores, number: int, rules: Rules = PROTOCOL) -> None:
    chance = random.Random(number)
    scope = Scope("anything", requests=12, credits=chance.randint(4, 20))
    both, anything = Both(stores, f"org-{uuid.uuid4().hex[:8]}", scope, rules), Anything(scope, chance)
    await both.open()
    for _ in range(100):
        await both.do(anything.next(both.world))


#: Of these no operation of a store knows, only what gateways make of it.
OF_GATEWAYS = {
    "ack_before_commit", "settle_needs_account", "acknowledges_unregistered", "acknowledges_under_way",
    "acknowledges_unposted", "sweeps_unshown", "drops_before_install", "confirms_by_absence", "fallback_under_same_id",
    "extends_on_stale_word",
}  # fmt: skip


async def test_a_model_of_other_scripts_is_told_from_ours(stores: Stores, full: bool) -> None:
    """So is a script or a function that is changed without the model."""
    others = [mutant.rules for mutant in MUTANTS if mutant.name not in OF_GATEWAYS]
    for rules in others if full else others[::3]:
        await is_told(stores, rules)


async def is_told(stores: Stores, rules: Rules) -> None:
    for number in range(30):
        try:
            await ask_anything(stores, number, rules)
        except AssertionError:
            return
    raise AssertionError(f"this is what our scripts and functions do, too: {rules}")


async def test_an_extension_that_a_rollback_has_forgotten_is_registered_again(stores: Stores) -> None:
    """Found by the search: the hold came back as small as it was saved, and the rest of it could be spent once more."""
    both = Both(stores, "acme", Scope("a rollback", credits=2))
    await both.open()
    await both.do(("install", *both.world.books.row))
    await both.do(("admit", 0, 1, 1, 0, 0))
    await both.do(("save",))
    await both.do(("extend", 0, 1, 0, 0))
    await both.do(("restart",))
    await both.do(("install", *both.world.books.row))
    assert (await both.do(("renew", 0, 2, 0))).owed == 2
    assert (await both.do(("admit", 1, 1, 1, 0, 0))).status == "INFLIGHT"


async def test_a_cap_that_is_taken_back_is_never_raised(stores: Stores) -> None:
    """Found by the search: a hash that was built after a loss owes more than it was given, and would have made that its
    cap."""
    both = Both(stores, "acme", Scope("a loss", credits=2))
    await both.open()
    await both.do(("install", *both.world.books.row))
    await both.do(("renew", 0, 1, 0))
    assert (await both.do(("lower",))).cap == 0
    await both.do(("settle", 0, 0))
    assert (await both.do(("admit", 1, 1, 1, 0, 1))).status == "CAP"


async def test_postgres_goes_on_after_what_it_has_forgotten(stores: Stores) -> None:
    both = Both(stores, "acme", Scope("PostgreSQL is restored", credits=4))
    await both.open()
    first = both.world.books.row
    await both.do(("install", *first))
    await both.do(("raise_cap", first.epoch, both.world.redis.life, 2, 1, both.world.seen))
    newest = both.world.books.row
    await both.do(("install", *newest))
    await both.do(("admit", 0, 1, 1, 0, 1))
    await both.do(("settle", 0, 1))
    await both.set_back(first)
    told = await both.do(("applied", first, both.world.redis.outbox))
    assert told == ("OLDER", 0, newest.version, newest.epoch)
    row = await both.do(("go_on_after", newest.version, newest.epoch + 1))
    assert (row.version, row.epoch) == (newest.version + 1, newest.epoch + 1)
    assert (await both.do(("go_on_after", newest.version, newest.epoch + 1))) == row
    assert (await both.do(("applied", row, both.world.redis.outbox))).status == "OK"
    assert both.world.redis.account is not None and both.world.redis.account.version == row.version


#: All that the searches look at, in one: faults, slow and lost replies, holds in both stores.
EVERYTHING = Scope(
    "everything",
    credits=6,
    requests=8,
    most=3,
    kills=1,
    flushes=2,
    rollbacks=1,
    evictions=1,
    topups=2,
    mails=2,
    flushers=2,
    flusher_dies=True,
    slow_replies=True,
    lost_replies=True,
    ghosts=True,
    stalls=True,
    beats=True,
    postgres_holds=True,
    direct_posts=True,
    lowerings=3,
)


async def test_a_way_through_the_model_is_a_way_through_the_stores(stores: Stores, full: bool) -> None:
    for number in range(300 if full else 12):
        chance, both = random.Random(number), Both(stores, f"way-{number}", EVERYTHING)
        await both.open()
        for _ in range(120):
            possible = list(steps(both.world, EVERYTHING))
            if not possible:
                break
            step = chance.choice(possible)
            before = both.world
            if step.op:
                await both.do(step.op)
            # What gateways make of it is the model's alone.
            assert (both.world.redis, both.world.books) == (step.after.redis, step.after.books), (before, step)
            both.world = step.after

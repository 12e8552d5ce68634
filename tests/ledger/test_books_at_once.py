"""Random histories of two orgs, by several gateways and an application at once, over the real SQL.

After every history, in one snapshot: each balance is the sum of its ledger and what is held the sum of the holds. At
the moment of a hold: it fits beside what Redis may owe, what it may have owed, and the other holds. Nobody ever waits
in a circle. Derandomized; how steps of several workers fall together differs from run to run.
"""

import asyncio
import itertools
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from gateway.ledger import books
from gateway.ledger.migrate import Binding, migrate
from gateway.stores import Postgres
from gateway.types import Balance, Entry
from tests.ledger.audit import books_are_right

CREDIT = 1_000_000
EXAMPLES = 60
WORKERS = 4
GRACE_MS = 60_000

_histories = itertools.count()


@dataclass(frozen=True)
class Step:
    """One call. What the figures stand for is up to the kind; `org` and `request` choose among few."""

    kind: str
    org: int
    request: int
    amount: int


@dataclass
class History:
    """Two orgs of their own, and what was last seen of each."""

    postgres: Postgres
    name: str
    capped: bool = True
    births: dict[str, str] = field(default_factory=lambda: defaultdict(str))
    seen: dict[tuple[int, str], int] = field(default_factory=lambda: defaultdict(int))
    _lives: "itertools.count[int]" = field(default_factory=itertools.count)

    def org(self, step: Step) -> str:
        return f"{self.name}-{step.org}"

    async def begin(self) -> None:
        for org in range(2):
            await self.postgres.rows("INSERT INTO ai_credits VALUES ($1, 6)", f"{self.name}-{org}")
        for worker in range(WORKERS):
            await books.beat(self.postgres, f"w{worker}")

    async def work(self, worker: int, steps: Sequence[Step]) -> None:
        for step in steps:
            for state in await self.do(worker, step):
                # A worker never sees an older state after a newer one.
                assert state.version >= self.seen[worker, state.org_id]
                self.seen[worker, state.org_id] = state.version

    async def do(self, worker: int, step: Step) -> list[Balance]:
        org, postgres, amount = self.org(step), self.postgres, step.amount
        match step.kind:
            case "settle" | "orphan" | "correction":
                entries = [
                    Entry(f"{self.name}-{one}", f"r{step.request}", step.kind, -amount)
                    for one in (step.org, 1 - step.org)
                ]
                return await books.post(postgres, entries[: 1 + step.request % 2])
            case "grant":
                return [await books.grant(postgres, org, amount // CREDIT, grant_id=f"g{step.request}")]
            case "take":
                return [await self._take(worker, step)]
            case "extend":
                return [
                    (await books.extend_hold(postgres, org, f"r{step.request}", amount, capped=self.capped)).balance
                ]
            case "renew":
                both = [(f"{self.name}-{one}", f"r{step.request}", amount) for one in (step.org, 1 - step.org)]
                await books.renew_holds(postgres, both, 60_000)
            case "expire":
                await postgres.rows(
                    "UPDATE gateway.hold SET deadline = now() - interval '1 s' WHERE (org_id, request_id) = ($1, $2)",
                    org, f"r{step.request}",
                )  # fmt: skip
            case "sweep":
                await books.sweep_holds(postgres, ("checkpoint", "hold", "release")[step.request % 3])
            case "beat":
                return await self._beat(worker)
            case "leave":
                await books.leave(postgres, f"w{worker}")
            case "poll":
                await books.poll_external(postgres)
            case "sql":
                await self._sql(org, step)
            case _ if self.capped:
                return [await self._redis(worker, step)]
        return []

    async def _take(self, worker: int, step: Step) -> Balance:
        taken = await books.take_hold(
            self.postgres, self.org(step), f"r{step.request}", step.amount, step.amount // 2, 1,
            instance=f"w{worker}", lease_ms=60_000, capped=self.capped,
        )  # fmt: skip
        after = taken.balance
        if taken.status == "OK":
            assert after.ucredits - after.set_aside_ucredits - after.cap_ucredits >= 0
        return after

    async def _redis(self, worker: int, step: Step) -> Balance:
        """What is said on behalf of Redis: by the hash of the latest birth, or by one that is just born."""
        org = self.org(step)
        now = (await books.read(self.postgres, [org]))[org]
        match step.kind:
            case "raise":
                birth = self.births[org] or "b"
                return await books.raise_cap(self.postgres, org, now.epoch, birth, step.amount, CREDIT, GRACE_MS)
            case "lose":
                self.births[org] = f"b{next(self._lives)}"
                return await books.raise_cap(self.postgres, org, now.epoch, self.births[org], step.amount, 0, GRACE_MS)
            case "lower":
                await books.lower_cap(self.postgres, org, now.epoch, now.birth, now.version, step.amount)
                return now
            case "acknowledge":
                birth = now.birth if step.request % 2 else ""
                owed = step.amount if birth else 0
                return await books.acknowledge(self.postgres, f"w{worker}", org, now.epoch, birth, owed, GRACE_MS)
        raise AssertionError(step.kind)

    async def _beat(self, worker: int) -> list[Balance]:
        beat = await books.beat(self.postgres, f"w{worker}")
        assert 1 <= beat.instances <= WORKERS
        return []

    async def _sql(self, org: str, step: Step) -> None:
        statement = (
            "UPDATE ai_credits SET credits = credits + $2 WHERE organization_id = $1",
            "UPDATE ai_credits SET credits = $2 WHERE organization_id = $1",
            "INSERT INTO ai_credits VALUES ($1, $2) ON CONFLICT DO NOTHING",
            "DELETE FROM ai_credits WHERE organization_id = $1 AND credits < $2",
        )[step.request % 4]
        await self.postgres.rows(statement, org, step.amount // CREDIT)

    async def end(self) -> None:
        """Every request settles, and nothing is held."""
        orgs = [f"{self.name}-{org}" for org in range(2)]
        await books.post(self.postgres, [Entry(org, f"r{n}", "settle", 0) for org in orgs for n in range(6)])
        await books.poll_external(self.postgres)
        await books_are_right(self.postgres)
        rows = await self.postgres.rows("SELECT sum(held) AS held FROM gateway.account WHERE org_id = ANY ($1)", orgs)
        assert [row["held"] for row in rows] in ([0], [None])


KINDS = (
    "settle", "settle", "orphan", "correction", "grant", "take", "take", "take", "extend", "renew", "expire", "sweep",
    "beat", "leave", "poll", "sql", "sql", "raise", "raise", "lose", "lower", "acknowledge", "acknowledge",
)  # fmt: skip
AMOUNTS = (1, CREDIT // 2, CREDIT, 2 * CREDIT, 5 * CREDIT)
STEPS = st.lists(
    st.builds(Step, st.sampled_from(KINDS), st.integers(0, 1), st.integers(0, 5), st.sampled_from(AMOUNTS)), max_size=12
)


@asynccontextmanager
async def opened(url: str, binding: Binding) -> AsyncIterator[Postgres]:
    postgres = Postgres(url, timeout_ms=30_000, pool_max=WORKERS + 2)
    await postgres.open()
    try:
        await migrate(postgres)
        await migrate(postgres, binding)
        yield postgres
    finally:
        await postgres.close()


def test_the_books_are_right_after_any_history(database_url: str) -> None:
    _play_many(database_url, Binding())


def test_the_books_are_right_after_any_history_where_nobody_tells(database_url: str) -> None:
    _play_many(database_url, Binding(mode="readonly"))


def _play_many(url: str, binding: Binding) -> None:
    with asyncio.Runner() as runner:
        house = opened(url, binding)
        postgres = runner.run(house.__aenter__())

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )  # fmt: skip
        @hypothesis_given(st.lists(STEPS, min_size=1, max_size=WORKERS), st.booleans())
        def play(workers: list[list[Step]], capped: bool) -> None:
            runner.run(_play(postgres, workers, capped))

        try:
            play()
        finally:
            runner.run(house.__aexit__(None, None, None))


async def _play(postgres: Postgres, workers: Sequence[Sequence[Step]], capped: bool) -> None:
    history = History(postgres, f"h{next(_histories)}", capped)
    await history.begin()
    await asyncio.gather(*(history.work(number, steps) for number, steps in enumerate(workers)))
    await history.end()


async def test_everything_at_once_ends_without_a_deadlock(database_url: str) -> None:
    """Far more of it on the same two orgs: every wait is for somebody who goes on."""
    async with opened(database_url, Binding()) as postgres:
        history = History(postgres, "busy")
        await history.begin()
        await books.grant(postgres, "busy-0", 10_000, grant_id="a")
        dice = random.Random(5)

        def some(count: int) -> list[Step]:
            return [
                Step(dice.choice(KINDS), dice.randint(0, 1), dice.randint(0, 400), dice.choice(AMOUNTS))
                for _ in range(count)
            ]

        looking = asyncio.create_task(_look(postgres))
        await asyncio.gather(*(history.work(number, some(150)) for number in range(WORKERS)))
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await books_are_right(postgres)
        rows = await postgres.rows("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        assert rows[0]["deadlocks"] == 0


async def _look(postgres: Postgres) -> None:
    """The books are right at every moment, not only at the end."""
    while True:
        await books_are_right(postgres)
        await asyncio.sleep(0)

"""One run: load, faults, healing, verdict."""

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
from redis.exceptions import RedisError

from tests.chaos.clients import Customers
from tests.chaos.faults import FAULTS, subject
from tests.chaos.stores import Stores
from tests.chaos.upstream import router
from tests.chaos.verdict import BOOKS, Verdict, at_rest, holds_have_ended, judge, wrong_books
from tests.chaos.world import LEASE_S, LOSS_GRACE_S, Happening, Seat, World

GATEWAYS = 3
CUSTOMERS = 12
#: C5: every hold has ended so long after everything works again.
REST_WITHIN_S = LEASE_S + LOSS_GRACE_S + 60
#: In the section `credits` of a run, stands for a directory of each gateway's own.
JOURNAL = "journal: on"
#: What asking a store raises while it is away.
AWAY = (
    OSError,
    TimeoutError,
    RedisError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


@dataclass(frozen=True)
class Plan:
    seconds: float
    seed: int
    #: A key of stores.KINDS.
    redis: str = "aof"
    faults: tuple[str, ...] = tuple(FAULTS)
    #: More of the section `credits`, such as `write: through`.
    credits: str = ""
    #: Faults at the same time, of different subjects.
    at_once: int = 1

    @property
    def keeps(self) -> bool:
        """A charge survives the loss of its gateway and of Redis together."""
        return "through" in self.credits or "journal" in self.credits

    @property
    def capped(self) -> bool:
        return "optimistic" not in self.credits


@dataclass
class Report:
    plan: Plan
    verdict: Verdict
    statuses: Counter[str]
    faults: Counter[str] = field(default_factory=Counter)
    #: Of top-ups by SQL while nothing was broken: seconds until Redis had them.
    seen_after_s: list[float] = field(default_factory=list)
    #: Snapshots of the database that were looked at, and what was wrong in them.
    snapshots: int = 0
    seen_wrong: list[str] = field(default_factory=list)


async def run(plan: Plan, keep: Path | None = None) -> Report:
    """The verdict of one run. Nothing of it is left behind but, in `keep`, what the gateways of one with violations
    logged, the ledger, and what was delivered."""
    dice = random.Random(plan.seed)
    async with _world(plan) as world:
        stop = asyncio.Event()
        customers = Customers(world, random.Random(dice.random()), stop)
        report = Report(plan, Verdict(), customers.statuses)
        async with asyncio.TaskGroup() as group:
            group.create_task(customers.run(CUSTOMERS))
            group.create_task(_look_on(world, plan, stop, report))
            breakers = Breakers(world, plan, report)
            group.create_task(_top_up(world, random.Random(dice.random()), stop, breakers.calm, report))
            await breakers.run([random.Random(dice.random()) for _ in range(plan.at_once)])
            stop.set()
        holds_ended_s, rest_s = await _rest(world)
        report.verdict = await judge(world, customers, keeps=plan.keeps, capped=plan.capped)
        report.verdict.holds_ended_s, report.verdict.rest_s = holds_ended_s, rest_s
        report.verdict.violations += report.seen_wrong
        if report.statuses["500"]:
            report.verdict.violations.append(f"{report.statuses['500']} answers were 500")
        if keep is not None and report.verdict.violations:
            await _keep(world, customers, report, keep / f"{plan.redis}-{plan.seed}")
        return report


@asynccontextmanager
async def _world(plan: Plan) -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="gateway-chaos-") as folder:
        directory = Path(folder).resolve()
        stores = Stores(directory, plan.redis)
        async with router() as upstream:
            world = World(stores, upstream)
            more = f", {plan.credits}" if plan.credits else ""
            try:
                await stores.start(GATEWAYS)
                await world.furnish(plan.seconds)
                for n in range(GATEWAYS):
                    own = more.replace(JOURNAL, f"journal: {directory}/g{n}/journal")
                    world.seats.append(Seat(directory / f"g{n}", n, stores, upstream, own))
                await world.open()
                yield world
            finally:
                await world.close()
                await stores.stop()


class Breakers:
    """Each: one fault after the other, with a little peace in between, as long as the plan says; then all is well."""

    def __init__(self, world: World, plan: Plan, report: Report) -> None:
        self._world = world
        self._plan = plan
        self._report = report
        self._ends_s = time.monotonic() + plan.seconds
        self._subjects = {subject(name): asyncio.Lock() for name in FAULTS}
        self._at_work = 0
        #: Nothing is broken.
        self.calm = asyncio.Event()
        self.calm.set()

    async def run(self, dice: Sequence[random.Random]) -> None:
        async with asyncio.TaskGroup() as group:
            for die in dice:
                group.create_task(self._break_things(die))

    async def _break_things(self, dice: random.Random) -> None:
        waiting: Sequence[str] = ()
        while time.monotonic() < self._ends_s:
            await asyncio.sleep(dice.uniform(0.5, 2.5))
            if not self._plan.faults:
                continue
            if not waiting:  # every one of them, in another order each time
                waiting = dice.sample(self._plan.faults, len(self._plan.faults))
            name, waiting = waiting[0], waiting[1:]
            async with self._subjects[subject(name)]:
                await self._break(name, dice)

    async def _break(self, name: str, dice: random.Random) -> None:
        began_s = time.monotonic()
        self._at_work += 1
        self.calm.clear()
        await FAULTS[name](self._world, dice)
        self._report.faults[name] += 1
        self._world.happened.append(Happening(name, began_s, time.monotonic()))
        self._at_work -= 1
        if not self._at_work:
            self.calm.set()


async def _top_up(world: World, dice: random.Random, stop: asyncio.Event, calm: asyncio.Event, report: Report) -> None:
    """Somebody gives credits by plain SQL, and looks how soon Redis has them."""
    topped = [org for org in world.orgs if org.topped]
    while not stop.is_set():
        await asyncio.sleep(dice.uniform(0.5, 1.5))
        org = dice.choice(topped)
        began_calm = calm.is_set()
        with contextlib.suppress(*AWAY):
            await world.stores.sql("UPDATE ai_credits SET credits = credits + 5 WHERE organization_id = $1", org.org_id)
            given_s = time.monotonic()
            rows = await world.stores.sql("SELECT version FROM gateway.account WHERE org_id = $1", org.org_id)
            if not began_calm:
                continue
            seen = await _seen(world, org.org_id, rows[0]["version"], lambda: calm.is_set() and not stop.is_set())
            if seen:
                report.seen_after_s.append(time.monotonic() - given_s)


async def _seen(world: World, org_id: str, version: int, calm: Callable[[], bool]) -> bool:
    """Redis has the org's account of `version`; False when something broke meanwhile, or nobody uses the org."""
    while calm():
        found = await world.stores.redis.do("HGET", f"{{ai_credits:org_{org_id}}}:a", "v")
        if not isinstance(found, bytes):
            return False
        if int(found) >= version:
            return True
        await asyncio.sleep(0.01)
    return False


async def _look_on(world: World, plan: Plan, stop: asyncio.Event, report: Report) -> None:
    """C1, and C4 where nothing can run over its hold, in every snapshot of the database, whatever goes on."""
    flat = {org.org_id for org in world.orgs if org.plan == "flat"}
    while not stop.is_set():
        await asyncio.sleep(0.5)
        with contextlib.suppress(*AWAY):
            books = await world.stores.sql(BOOKS)
            report.snapshots += 1
            report.seen_wrong += [f"during the run: {line}" for line in wrong_books(books)]
            if plan.capped:
                report.seen_wrong += [
                    f"C4, during the run: {row['org_id']} of flat prices was at {row['balance']}"
                    for row in books
                    if row["balance"] < 0 and row["org_id"] in flat
                ]


async def _rest(world: World) -> tuple[float, float]:
    """Nothing moves any more, or the time for it is over: seconds until nothing was held, and until all was at rest."""
    began_s = time.monotonic()
    held_s = await _until(holds_have_ended, world, began_s + REST_WITHIN_S) - began_s
    return held_s, await _until(at_rest, world, began_s + REST_WITHIN_S) - began_s


async def _until(condition: Callable[[World], Awaitable[bool]], world: World, deadline_s: float) -> float:
    while time.monotonic() < deadline_s and not await condition(world):
        await asyncio.sleep(0.05)
    return time.monotonic()


async def _keep(world: World, customers: Customers, report: Report, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seat in world.seats:
        for name, process in seat.lives.items():
            lines = "".join(json.dumps(line) + "\n" for line in process.output)
            (directory / f"{name}.log").write_text(lines)
    ledger = await world.stores.sql("SELECT l.* FROM gateway.ledger l ORDER BY seq")
    (directory / "ledger.txt").write_text("".join(f"{dict(row)}\n" for row in ledger))
    (directory / "deliveries.txt").write_text(
        "".join(f"{one} {customers.seen[one.attempt]}\n" for one in world.router.deliveries)
    )
    began_s = world.router.deliveries[0].at_s if world.router.deliveries else 0.0
    told = [f"{one.fault} {one.began_s:.3f} to {one.ended_s:.3f}\n" for one in world.happened]
    told += [f"{name} died {at_s:.3f}\n" for name, at_s in world.died_at_s.items()]
    told += [f"{line}\n" for line in report.verdict.violations]
    (directory / "happened.txt").write_text(f"first delivery {began_s:.3f}\n" + "".join(told))

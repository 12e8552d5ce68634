"""A fault at every step: whatever is cancelled, lost, late or repeated, a request is charged once and leaves nothing.

After every fault the house must come to rest (`assert_at_rest`): no hold, no lease, nothing unposted, Redis and the
ledger of one mind, at most one charge, and that the one which the outcome table names.
"""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis_client

from gateway import keys, limits
from gateway.admission import Hold, account_keys
from gateway.errors import StoreUnavailable
from gateway.ledger import migrate
from gateway.shield import shielded
from gateway.stores import Postgres, Reply
from gateway.types import Charge, Price, Quote, Usage
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis, Interrupted, Steps, refusing_writes
from tests.ledger.running import state
from tests.limits.given import demand
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House as WholeHouse
from tests.walk.house import in_process
from tests.walk.raw import Visit

CREDIT = 1_000_000
GIVEN = 1000 * CREDIT
DEMANDS = (
    demand("rph", "sliding", "requests", "org", ORG, 100_000, 3_600_000, 1),
    demand("tph", "sliding", "tokens", "org", ORG, 100_000_000, 3_600_000, 50),
    demand("parallel", "concurrent", "concurrent", "org", ORG, 3, 30_000, 1),
)
SLOTS = keys.counter(ORG, limits.counter_name(DEMANDS[2]))
#: Grows by a credit.
QUOTE = Quote(Price(0, CREDIT, CREDIT), CREDIT, CREDIT, CREDIT, CREDIT)
FLAT = Quote.flat(CREDIT)
#: The incarnation of a server that is no more.
GONE = b"gone"


def paid(ucredits: int) -> Charge:
    return Charge(ucredits, Usage(5, 2), keep_requests=True, basis="exact")


@dataclass
class FaultyHouse:
    house: House
    redis: FaultyRedis
    postgres: FaultyPostgres
    #: By request.
    owed: dict[str, int] = field(default_factory=dict)

    async def request(self, hold_id: str, quote: Quote = QUOTE) -> Hold:
        """A request that reaches its upstream half-way, and needs more of it than it holds."""
        self.owed[hold_id] = 0
        async with self.house.admission.hold(hold_id, ASKER, DEMANDS, quote) as hold:
            assert isinstance(hold, Hold), hold
            await self.house.admission.extend(hold, CREDIT)
            hold.charge = paid(hold.ucredits)
            self.owed[hold_id] = hold.ucredits
            await asyncio.sleep(0)
        return hold

    async def flush(self) -> None:
        """As the gateway does: until it works, and for every org that the sweeper finds."""
        for _ in range(3):
            with suppress(StoreUnavailable):
                await self.house.sweeper.sweep()
                await self.house.outbox.flush()

    async def assert_at_rest(self, what: object, before: set[asyncio.Task[Any]]) -> None:
        """Nothing is held, nothing leased, nothing unposted, nobody waited for; every request was charged once."""
        house, admission = self.house, self.house.admission
        await self._come_to_rest(before)
        settling = admission.settling
        assert (admission.open_count, settling.backlog_count, settling._ending) == (0, 0, {}), what
        assert settling.unconfirmed_count == 0, what
        left = await self.redis.call("EXISTS", keys.holds(ORG), keys.deadlines(ORG), keys.outbox(ORG), SLOTS)
        assert left == 0, what
        await books_are_right(self.postgres)
        now = await state(house)
        assert (now["held"], now["lost"], now["waiting"]) == (0, 0, 0), (what, now)
        charged: dict[str, int] = {}
        for request_id, kind, amount in await house.ledger():
            if kind != "grant":
                assert request_id not in charged, (what, request_id)
                charged[request_id] = -amount
        assert {rid: amount for rid, amount in charged.items() if amount} == {
            rid: amount for rid, amount in self.owed.items() if amount
        }, what
        balance = GIVEN - sum(charged.values())
        account = await house.account()
        assert account.get("h", 0) == account.get("u", 0) == 0, (what, account)
        if await self.redis.call("HGET", keys.account(ORG), "r") != GONE:  # else it is built anew before it is used
            assert account.get("p", balance) == balance, (what, account)

    async def _come_to_rest(self, before: set[asyncio.Task[Any]]) -> None:
        """As it does by itself, with nothing in the way any more."""
        house = self.house
        self.redis.away = False
        late = self.redis.late, self.postgres.late
        self.redis.arm(0, "")
        self.postgres.arm(0, "")
        await house.admission.drain(5)
        # What was delayed arrives after everything that was to make it good.
        self.redis.late, self.postgres.late = late
        await self.redis.let_late_ones_arrive()
        await self.postgres.let_late_ones_arrive()
        await self.flush()
        await house.losses.beat()
        await until(lambda: other_tasks() <= before)
        # With nobody who works a backlog off, as the gateway's own task does.
        await house.admission.drain(5)
        await house.settling._unconfirmed.ask(math.inf)
        await self.flush()
        await until(lambda: other_tasks() <= before)


@asynccontextmanager
async def faulty_house(redis_url: str, database_url: str, **credits: object) -> AsyncIterator[FaultyHouse]:
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = FaultyPostgres(database_url, timeout_ms=5_000, pool_max=4)
    redis.arm(0, "")
    postgres.arm(0, "")
    async with furnished(redis, postgres, **credits) as house:
        await house.credits(1000)
        yield FaultyHouse(house, redis, postgres)


@pytest.fixture
async def faulty(redis_url: str, database_url: str) -> AsyncIterator[FaultyHouse]:
    async with faulty_house(redis_url, database_url) as faulty:
        yield faulty


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


# Where a request may find Redis


async def as_it_was(faulty: FaultyHouse) -> None:
    """With a cap that is used up with this request, so that its extension needs another."""
    await faulty.house.accounts.retire(ORG)


async def evicted(faulty: FaultyHouse) -> None:
    """It has forgotten the balance, and this process that the org was ever active."""
    await faulty.redis.call("DEL", keys.account(ORG))
    faulty.house.admission._leases._active_marks.clear()


async def of_another_process(faulty: FaultyHouse) -> None:
    """It was restarted from what it had saved."""
    if await faulty.redis.call("EXISTS", keys.account(ORG)):
        await faulty.redis.call("HSET", keys.account(ORG), "r", GONE)


async def emptied(faulty: FaultyHouse) -> None:
    await faulty.redis.call("FLUSHALL")


async def away(faulty: FaultyHouse) -> None:
    faulty.redis.away = True


#: What Redis is like, and the section `credits`.
WAYS: dict[str, tuple[Callable[[FaultyHouse], Coroutine[Any, Any, None]], dict[str, object]]] = {
    "as it was": (as_it_was, {"cap_floor": 1, "cap_percent": 0}),
    "evicted": (evicted, {}),
    "of another process": (of_another_process, {}),
    "emptied": (emptied, {}),
    "optimistic": (emptied, {"on_state_loss": "optimistic"}),
    "away": (away, {}),
    "through": (as_it_was, {"write": "through"}),
    "through, away": (away, {"write": "through"}),
}
FAULTS = ("away", "connection lost", "reply lost", "arrives late")
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
@pytest.mark.parametrize(("turns", "times"), [(0, 1), (2, 1), (0, 2), (40, 1)])
async def test_a_cancellation_in_any_wait(redis_url: str, database_url: str, turns: int, times: int, way: str) -> None:
    make, credits = WAYS[way]
    async with faulty_house(redis_url, database_url, **credits) as faulty:
        before = other_tasks()
        await faulty.house.losses.beat()
        await faulty.request("warm")
        await faulty.assert_at_rest("no fault", before)
        for wait in itertools.count(1):
            await make(faulty)
            cancelled = await Interrupted(faulty.request(f"r{wait}"), wait, turns, times).run()
            await faulty.assert_at_rest(f"cancelled in wait {wait}", before)
            if not cancelled:
                break
        assert faulty.owed[f"r{wait}"] == 2 * CREDIT
        assert wait > 4


@every_way
@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_fails_at_any_command(redis_url: str, database_url: str, fault: str, way: str) -> None:
    """From the mark of the active org to `applied`, with everything that is asked on the way."""
    make, credits = WAYS[way]
    async with faulty_house(redis_url, database_url, **credits) as faulty:
        before = other_tasks()
        await faulty.house.losses.beat()
        await faulty.request("warm")
        for command in itertools.count(1):
            await make(faulty)
            faulty.redis.arm(command, fault)
            with suppress(StoreUnavailable):
                await faulty.request(f"r{command}")
            with suppress(StoreUnavailable):
                await faulty.house.outbox.flush()
            met = faulty.redis.sent >= command
            await faulty.assert_at_rest(f"{fault} at command {command}", before)
            if not met:
                break
        assert faulty.owed[f"r{command}"] == 2 * CREDIT


@every_way
@pytest.mark.parametrize("fault", ["before", "after", "arrives late"])
async def test_postgres_fails_at_any_statement(redis_url: str, database_url: str, fault: str, way: str) -> None:
    make, credits = WAYS[way]
    async with faulty_house(redis_url, database_url, **credits) as faulty:
        before = other_tasks()
        await faulty.house.losses.beat()
        await faulty.request("warm")
        for statement in itertools.count(1):
            await make(faulty)
            faulty.postgres.arm(statement, fault)
            with suppress(StoreUnavailable):
                await faulty.request(f"r{statement}")
            with suppress(StoreUnavailable):
                await faulty.house.outbox.flush()
            met = faulty.postgres.asked >= statement
            await faulty.assert_at_rest(f"{fault} at statement {statement}", before)
            if not met:
                break
        assert faulty.owed[f"r{statement}"] == 2 * CREDIT
        assert statement > 1


@pytest.mark.parametrize("fault", ["away", "reply lost"])
async def test_a_cancellation_while_the_settle_fails_loses_nothing(faulty: FaultyHouse, fault: str) -> None:
    """The cancellation hides the failure from the walk; the charge must be kept all the same."""
    before = other_tasks()
    await faulty.request("warm", FLAT)
    await faulty.house.outbox.flush()
    for times in (1, 2):
        hold_id = f"r{times}"

        async def request(hold_id: str = hold_id) -> None:
            async with faulty.house.admission.hold(hold_id, ASKER, DEMANDS, FLAT) as hold:
                assert isinstance(hold, Hold)
                hold.charge = paid(CREDIT)
                faulty.owed[hold_id] = CREDIT
                faulty.redis.arm(1, fault)

        # The first wait is the admission, the second the settle.
        assert await Interrupted(request(), 2, times=times).run()
        await faulty.assert_at_rest((fault, times), before)


async def test_a_settle_that_is_cut_off_by_its_bound_is_kept(faulty: FaultyHouse) -> None:
    before = other_tasks()
    await faulty.request("warm", FLAT)
    await faulty.house.outbox.flush()
    never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    admission = faulty.house.admission
    faulty.house.obey(settle_timeout_ms=50)
    async with admission.hold("r1", ASKER, DEMANDS, FLAT) as hold:
        assert isinstance(hold, Hold)
        hold.charge = paid(CREDIT)
        faulty.owed["r1"] = CREDIT
        faulty.redis.send = lambda *args: never  # type: ignore[method-assign]  # a server that says nothing
    del faulty.redis.send
    assert admission.settling.backlog_count == 1
    await faulty.assert_at_rest("timeout", before)


async def test_the_retrying_task_and_the_drain_never_drop_each_others_settle(faulty: FaultyHouse) -> None:
    """Both work the same backlog off while the gateway closes."""
    await faulty.request("warm", FLAT)
    count = 40
    for number in range(count):
        hold = Hold(f"r{number}", ASKER, (), FLAT, charge=paid(CREDIT))
        hold.keys = account_keys(hold)
        faulty.house.admission.settling.keep(hold)
    admission = faulty.house.admission
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(admission.drain(5))
    await faulty.house.outbox.flush()
    assert {rid for rid, kind, _ in await faulty.house.ledger() if kind == "settle"} >= {f"r{n}" for n in range(count)}


async def test_one_settle_that_always_fails_does_not_hold_up_the_others(faulty: FaultyHouse) -> None:
    house = faulty.house
    await faulty.request("warm", FLAT)
    stranger = type(ASKER)("globex", "pro", None, None, "api_key")
    async with house.admission.hold("poison", stranger, DEMANDS, Quote.flat(0)) as poisoned:
        assert isinstance(poisoned, Hold)
        await house.redis.call("SET", poisoned.keys[4], "x")
        await house.redis.call("DEL", poisoned.keys[4])
        await house.redis.call("LPUSH", poisoned.keys[4], "foreign")
    async with AsyncExitStack() as refusing:
        async with house.admission.hold("r1", ASKER, DEMANDS, FLAT) as hold:
            assert isinstance(hold, Hold)
            hold.charge = paid(CREDIT)
            await refusing.enter_async_context(refusing_writes(house.redis))
    assert house.admission.settling.backlog_count == 2
    await house.admission.settling.work_off()
    assert house.admission.settling.backlog_count == 1
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)


async def test_one_charge_that_the_ledger_refuses_does_not_hold_up_the_others(faulty: FaultyHouse) -> None:
    """Redis is away, so that they all go to PostgreSQL together."""
    house = faulty.house
    await faulty.request("warm", FLAT)
    faulty.redis.away = True
    for number in range(5):
        name = "\0" if number == 2 else f"r{number}"  # no text that PostgreSQL could store
        hold = Hold(name, ASKER, (), FLAT, charge=paid(CREDIT))
        hold.keys = account_keys(hold)
        house.settling.keep(hold)
    await house.settling._post(house.settling._owing())
    posted = [rid for rid, kind, _ in await house.ledger() if kind == "settle"]
    assert set(posted) >= {"r0", "r1", "r3", "r4"}
    assert [hold.hold_id for hold in house.settling._owing()] == ["\0"]


@pytest.mark.parametrize("charge", [paid(CREDIT), None])
async def test_settles_that_redis_does_not_take_before_the_end_are_in_the_ledger(
    faulty: FaultyHouse, charge: Charge | None
) -> None:
    """The lease that stays behind is swept by another gateway, which finds the request settled."""
    await faulty.request("warm", FLAT)
    await faulty.house.outbox.flush()
    admission = faulty.house.admission
    faulty.house.obey(lease_ms=20)
    async with AsyncExitStack() as refusing:
        async with admission.hold("r1", ASKER, (), FLAT) as hold:
            assert isinstance(hold, Hold)
            hold.charge = charge
            await refusing.enter_async_context(refusing_writes(faulty.redis))
        await admission.drain(0.05)
    assert admission.settling.backlog_count == 0

    async def swept() -> int:
        return await faulty.house.sweeper.sweep()

    await until(swept)
    await faulty.house.outbox.flush()
    warm, charged = 2 * CREDIT, CREDIT if charge else 0
    assert [-amount for rid, _, amount in await faulty.house.ledger() if rid == "r1"] == [charged]
    account = await faulty.house.account()
    assert (account["p"], account["u"], account["h"]) == (GIVEN - warm - charged, 0, 0)


async def test_shielded_runs_to_the_end_through_any_number_of_cancellations() -> None:
    release, ended = asyncio.Event(), False

    async def work() -> None:
        nonlocal ended
        await release.wait()
        ended = True

    task = asyncio.create_task(shielded(work(), 5))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


# The whole walk

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


async def answers(visit: Visit) -> None:
    await visit.read_head()
    await visit.send(HEAD + b"5\r\nhello\r\n")
    await visit.send(b"6\r\n world\r\n0\r\n\r\n")


@dataclass
class Visitor:
    """A client of the ASGI application: asks once, and leaves when it is told to."""

    secret: str
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    received: list[Any] = field(default_factory=list)
    _asked: bool = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.received.append(message)
        await asyncio.sleep(0)

    @property
    def complete(self) -> bool:
        return bool(self.received) and not self.received[-1].get("more_body", True)

    def scope(self) -> dict[str, Any]:
        return {
            "type": "http", "http_version": "1.1", "method": "POST",
            "path": "/echo", "raw_path": b"/echo", "query_string": b"",
            "headers": [(b"host", b"gateway"), (b"authorization", b"Bearer " + self.secret.encode()),
                        (b"content-length", b"2"), (b"x-session-id", b"talk")],
            "client": ("127.0.0.1", 1), "scheme": "http",
        }  # fmt: skip


@pytest.fixture
async def whole(tmp_path: Path, redis_url: str, database_url: str) -> AsyncIterator[WholeHouse]:
    postgres = Postgres(database_url, timeout_ms=10_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    redis = redis_client.Redis.from_url(redis_url)
    house = WholeHouse(tmp_path, redis_url, database_url, postgres, redis)
    house.limits = [
        {"name": "tph", "count": "tokens", "limit": 100_000, "window": "1h", "per": "org"},
        {"name": "parallel", "count": "concurrent", "limit": 5, "per": "org"},
    ]
    house.secret = await house.add_key(house.org_id, "ann")
    await house.credits(1000)
    yield house
    await redis.aclose()
    await postgres.close()


@pytest.mark.parametrize("way", ["the server stops", "the client leaves", "the server stops twice"])
async def test_a_walk_that_is_cancelled_in_any_wait(
    whole: WholeHouse, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with raw.upstream(answers) as upstream:
        whole.upstream_url = upstream.url
        async with in_process(whole) as gateway:
            proxy = gateway.app._proxy
            assert proxy is not None
            records: list[Any] = []
            monkeypatch.setattr(type(gateway.gateway._access_log), "write", lambda _, record: records.append(record))
            outcomes = set()
            charged = 0
            admission = gateway.gateway.admission
            for wait in itertools.count(1):
                visitor = Visitor(whole.secret)
                walk = proxy(visitor.scope(), visitor.receive, visitor.send)
                if way == "the client leaves":
                    met = await leaving(walk, visitor, wait)
                else:
                    met = await Interrupted(walk, wait, times=2 if way.endswith("twice") else 1).run()
                await until(lambda: not admission.open_count and admission.settling.idle)
                await whole.settled()
                record = records[-1]
                outcomes.add(record.outcome)
                owed = 0 if record.outcome in (None, "", "never_reached", "upstream_refused") else CREDIT
                assert (record.charged_ucredits or 0) == owed, (wait, record.outcome)
                if visitor.complete and not met:
                    assert record.outcome == "complete"
                charged += owed
                assert sum(amount for _, amount in await whole.charges()) == charged, (wait, record.outcome)
                assert await whole.balance() == 1000 * CREDIT - charged
                assert not [key async for key in whole.redis.scan_iter("*:l:parallel*")], wait
                if not met:
                    break
            assert wait > 6
            assert {"complete", "client_left" if way == "the client leaves" else "cut"} <= outcomes


async def leaving(walk: Coroutine[Any, Any, Any], visitor: Visitor, wait: int) -> bool:
    """Like `Interrupted`, by way of the client."""
    waits = 0

    def waiting() -> None:
        nonlocal waits
        waits += 1
        if waits == wait:
            visitor.leaves.set()

    async def watched() -> None:
        await Steps(walk, waiting)

    await asyncio.wait_for(asyncio.create_task(watched()), 20)
    return waits >= wait

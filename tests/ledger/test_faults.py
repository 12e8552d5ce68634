"""A fault at every step: whatever is cancelled, lost, late or repeated, a request is charged once and leaves nothing.

After every fault the house must come to rest (`assert_at_rest`): no hold, no lease, nothing unposted, Redis and the
ledger of one mind, at most one charge, and that the one which the outcome table names.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, suppress
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
from gateway.types import Charge, Usage
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis, Interrupted, Steps, refusing_writes
from tests.limits.given import demand
from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House as WholeHouse
from tests.walk.house import in_process
from tests.walk.raw import Visit

CREDIT = 1_000_000
PAID = Charge(CREDIT, Usage(5, 2), keep_requests=True, basis="exact")
DEMANDS = (
    demand("rph", "sliding", "requests", "org", ORG, 100, 3_600_000, 1),
    demand("tph", "sliding", "tokens", "org", ORG, 100_000, 3_600_000, 50),
    demand("parallel", "concurrent", "concurrent", "org", ORG, 3, 30_000, 1),
)
SLOTS = keys.counter(ORG, limits.counter_name(DEMANDS[2]))


@dataclass
class FaultyHouse:
    house: House
    redis: FaultyRedis
    postgres: FaultyPostgres
    charged: int = 0

    async def evict(self) -> None:
        """Redis has forgotten the balance, and this process that the org was ever active."""
        await self.redis.call("DEL", keys.account(ORG))
        self.house.admission._active_marks.clear()

    async def request(self, hold_id: str) -> Hold:
        """A request that reaches its upstream half-way."""
        async with self.house.admission.hold(hold_id, ASKER, DEMANDS, CREDIT) as hold:
            assert isinstance(hold, Hold)
            await asyncio.sleep(0)
            hold.charge = PAID
            await asyncio.sleep(0)
        return hold

    async def flush(self) -> None:
        """As the gateway does: until it works, and for every org that the sweeper finds."""
        for _ in range(5):
            with suppress(StoreUnavailable):
                await self.house.sweeper.sweep()
                await self.house.outbox.flush()

    async def assert_at_rest(self, hold_id: str, expected: set[int], what: object) -> None:
        """expected: what the request may have been charged."""
        self.redis.arm(0, "")
        self.postgres.fault = ""
        admission = self.house.admission
        await admission.drain(5)
        assert (admission.open_count, admission.settling.backlog_count, admission.settling._ending) == (0, 0, 0), what
        await self.flush()
        left = await self.redis.call("EXISTS", keys.holds(ORG), keys.deadlines(ORG), keys.outbox(ORG), SLOTS)
        assert left == 0, what
        rows = [(kind, -amount) for rid, kind, amount in await self.house.ledger() if rid == hold_id]
        assert len(rows) <= 1, (what, rows)
        charged = sum(amount for _, amount in rows)
        assert charged in expected, (what, rows)
        self.charged += charged
        balance = 1000 * CREDIT - self.charged
        account = await self.house.account()
        assert account.get("h", 0) == account.get("u", 0) == 0, (what, account)
        assert account.get("p", balance) == balance, (what, account)
        assert await self.house.postgres.rows("SELECT 1 FROM gateway.ledger HAVING sum(amount) = $1", balance), what


@pytest.fixture
async def faulty(redis_url: str, database_url: str) -> AsyncIterator[FaultyHouse]:
    redis = FaultyRedis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = FaultyPostgres(database_url, timeout_ms=5_000, pool_max=4)
    async with furnished(redis, postgres) as house:
        await house.credits(1000)
        yield FaultyHouse(house, redis, postgres)


def other_tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


@pytest.mark.parametrize("cached", [True, False], ids=["balance known", "balance loaded"])
@pytest.mark.parametrize(("turns", "times"), [(0, 1), (2, 1), (0, 2), (40, 1)])
async def test_a_cancellation_in_any_wait(faulty: FaultyHouse, turns: int, times: int, cached: bool) -> None:
    await faulty.request("warm")
    await faulty.assert_at_rest("warm", {CREDIT}, "no fault")
    before = other_tasks()
    for wait in itertools.count(1):
        if not cached:
            await faulty.evict()
        hold_id = f"r{wait}"
        interrupted = Interrupted(faulty.request(hold_id), wait, turns, times)
        cancelled = await interrupted.run()
        expected = {0, CREDIT} if cancelled else {CREDIT}
        await faulty.assert_at_rest(hold_id, expected, f"cancelled in wait {wait}")
        await until(lambda: other_tasks() <= before)
        if not cancelled:
            break
    assert wait > 4
    assert faulty.charged > CREDIT  # some were cancelled after the upstream had them


FAULTS = ("away", "connection lost", "reply lost", "arrives late")


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_fails_at_any_command(faulty: FaultyHouse, fault: str) -> None:
    """From the mark of the active org to `applied`, with the balance loaded on the way."""
    before = other_tasks()
    for command in itertools.count(1):
        await faulty.evict()
        faulty.redis.arm(command, fault)
        hold_id, expected = f"r{command}", {CREDIT}
        try:
            await faulty.request(hold_id)
        except StoreUnavailable:
            expected = {0}
        with suppress(StoreUnavailable):
            await faulty.house.outbox.flush()
        met = faulty.redis.sent >= command
        late, faulty.redis.fault_at = faulty.redis.late, 0
        await faulty.house.admission.drain(5)
        # What was delayed arrives after everything that was to make it good.
        faulty.redis.late = late
        await faulty.redis.let_late_ones_arrive()
        await faulty.assert_at_rest(hold_id, expected, f"{fault} at command {command}")
        await until(lambda: other_tasks() <= before)
        if not met:
            break
    assert command > 7


@pytest.mark.parametrize("fault", ["before", "after"])
async def test_postgres_fails_at_any_statement(faulty: FaultyHouse, fault: str) -> None:
    async def load() -> None:
        await faulty.evict()
        faulty.postgres.fault = fault
        with pytest.raises(StoreUnavailable):
            await faulty.request("load")

    async def flush() -> None:
        await faulty.request("flush")
        faulty.postgres.fault = fault
        with pytest.raises(StoreUnavailable):
            await faulty.house.outbox.flush()

    async def settle_that_misses() -> None:
        async with faulty.house.admission.hold("miss", ASKER, DEMANDS, CREDIT) as hold:
            assert isinstance(hold, Hold)
            await faulty.evict()
            hold.charge = PAID
            faulty.postgres.fault = fault
        assert faulty.house.admission.settling.backlog_count == 1

    for hold_id, step, charge in (("load", load, 0), ("flush", flush, CREDIT), ("miss", settle_that_misses, CREDIT)):
        await step()
        await faulty.assert_at_rest(hold_id, {charge}, f"{fault} {hold_id}")


@pytest.mark.parametrize("fault", ["away", "reply lost"])
async def test_a_cancellation_while_the_settle_fails_loses_nothing(faulty: FaultyHouse, fault: str) -> None:
    """The cancellation hides the failure from the walk; the charge must be kept all the same."""
    for times in (1, 2):
        hold_id = f"r{times}"
        async with faulty.house.admission.hold("warm" + hold_id, ASKER, (), CREDIT):
            pass

        async def request(hold_id: str = hold_id) -> None:
            async with faulty.house.admission.hold(hold_id, ASKER, DEMANDS, CREDIT) as hold:
                assert isinstance(hold, Hold)
                hold.charge = PAID
                faulty.redis.arm(1, fault)

        # The first wait is the admission, the second the settle.
        assert await Interrupted(request(), 2, times=times).run()
        await faulty.assert_at_rest(hold_id, {CREDIT}, (fault, times))


async def test_a_settle_that_is_cut_off_by_its_bound_is_kept(faulty: FaultyHouse) -> None:
    await faulty.request("warm")
    faulty.charged += CREDIT
    never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    admission = faulty.house.admission
    admission.settling._rules = type(admission._rules)(30_000, 10_000, 50, 1_000, 3600)
    async with admission.hold("r1", ASKER, DEMANDS, CREDIT) as hold:
        assert isinstance(hold, Hold)
        hold.charge = PAID
        faulty.redis.send = lambda *args: never  # type: ignore[method-assign]  # a server that says nothing
    del faulty.redis.send
    assert admission.settling.backlog_count == 1
    await faulty.assert_at_rest("r1", {CREDIT}, "timeout")


async def test_the_retrying_task_and_the_drain_never_drop_each_others_settle(faulty: FaultyHouse) -> None:
    """Both work the same backlog off while the gateway closes."""
    await faulty.request("warm")
    count = 40
    for number in range(count):
        hold = Hold(f"r{number}", ASKER, (), CREDIT, charge=PAID)
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
    await faulty.request("warm")
    stranger = type(ASKER)("globex", "pro", None, None, "api_key")
    async with house.admission.hold("poison", stranger, DEMANDS, 0) as poisoned:
        assert isinstance(poisoned, Hold)
        await house.redis.call("SET", poisoned.keys[4], "x")
        await house.redis.call("DEL", poisoned.keys[4])
        await house.redis.call("LPUSH", poisoned.keys[4], "foreign")
    async with AsyncExitStack() as refusing:
        async with house.admission.hold("r1", ASKER, DEMANDS, CREDIT) as hold:
            assert isinstance(hold, Hold)
            hold.charge = PAID
            await refusing.enter_async_context(refusing_writes(house.redis))
    assert house.admission.settling.backlog_count == 2
    await house.admission.settling.work_off()
    assert house.admission.settling.backlog_count == 1
    await house.outbox.flush()
    assert (await house.ledger())[-1] == ("r1", "settle", -CREDIT)


@pytest.mark.parametrize("charge", [PAID, None])
async def test_settles_that_redis_does_not_take_before_the_end_are_in_the_ledger(
    faulty: FaultyHouse, charge: Charge | None
) -> None:
    """The lease that stays behind is swept by another gateway, which finds the request settled."""
    await faulty.request("warm")
    await faulty.house.outbox.flush()
    admission = faulty.house.admission
    admission._rules = type(admission._rules)(20, 10_000, 2_000, 1_000, 3600)
    async with AsyncExitStack() as refusing:
        async with admission.hold("r1", ASKER, (), CREDIT) as hold:
            assert isinstance(hold, Hold)
            hold.charge = charge
            await refusing.enter_async_context(refusing_writes(faulty.redis))
        await admission.drain(0.05)
    assert admission.settling.backlog_count == 0

    async def swept() -> int:
        return await faulty.house.sweeper.sweep()

    await until(swept)
    await faulty.house.outbox.flush()
    charged = CREDIT if charge else 0
    assert [-amount for rid, _, amount in await faulty.house.ledger() if rid == "r1"] == [charged]
    account = await faulty.house.account()
    assert (account["p"], account["u"], account["h"]) == (999 * CREDIT - charged, 0, 0)


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

"""Random histories of one org over the real scripts and the real SQL; the books are right after every step.

Derandomized: the same histories in every run. When a change of the scripts is under way, raise EXAMPLES for a while.
"""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway import keys
from gateway.admission import Hold
from gateway.errors import StoreUnavailable
from gateway.ledger import Outbox
from gateway.types import Charge, Principal, Refusal
from tests.ledger.conftest import House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis

CREDIT = 1_000_000
EXAMPLES = 30
STEPS = 40
PRICES = st.sampled_from([CREDIT, 3 * CREDIT // 2, 3 * CREDIT, 1])
LOSSES = st.sampled_from(["away", "connection lost", "reply lost"])

numbers = itertools.count(1)


@dataclass
class Request:
    context: AbstractAsyncContextManager[Hold | Refusal]
    hold: Hold
    #: The last word on what it costs; None while it runs.
    charge: int | None = None
    swept: bool = False


class Stage:
    """The servers that all histories share; every history has an org of its own."""

    def __init__(self, redis_url: str, database_url: str) -> None:
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.redis_url, self.database_url = redis_url, database_url

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def open(self) -> None:
        self.do(self._open())

    async def _open(self) -> None:
        self.redis = FaultyRedis(self.redis_url, timeout_ms=2_000, connect_timeout_ms=1_000, scripts=every_script())
        self.postgres = FaultyPostgres(self.database_url, timeout_ms=5_000, pool_max=4)
        self.house: House = await self._stack.enter_async_context(furnished(self.redis, self.postgres))
        # A denial is to change nothing, so nothing is looked up again because of one.
        self.house.admission._recheck = lambda org_id: None

    def close(self) -> None:
        self.do(self._stack.aclose())
        self._runner.close()


class Books(RuleBasedStateMachine):
    """G given, S charged, H held: S + H <= G whatever happens, and Redis never believes that there is more."""

    stage: Stage

    def __init__(self) -> None:
        super().__init__()
        self.org = f"org{next(numbers)}"
        self.asker = Principal(self.org, "pro", None, None, "api_key")
        self.given = 0
        self.requests: dict[str, Request] = {}

    @property
    def house(self) -> House:
        return self.stage.house

    @initialize(credits=st.integers(0, 8))
    def open(self, credits: int) -> None:
        self.stage.do(self.house.credits(credits, self.org, "grant:first"))
        self.given = credits * CREDIT

    # What a client and its request do

    @rule(price=PRICES)
    def admit(self, price: int) -> None:
        self.stage.do(self._admit(price))

    async def _admit(self, price: int) -> None:
        known = await self._account()
        before = await self._dump()
        hold_id = f"r{next(numbers)}"
        context = self.house.admission.hold(hold_id, self.asker, (), price)
        verdict = await context.__aenter__()
        if isinstance(verdict, Refusal):
            await context.__aexit__(None, None, None)
            assert verdict.code in ("insufficient_credits", "credits_in_flight")
            if "p" in known:
                assert await self._dump() == before
            return
        self.requests[hold_id] = Request(context, verdict)

    @rule(price=PRICES, loss=LOSSES)
    def admit_without_reply(self, price: int, loss: str) -> None:
        self.stage.do(self._admit_without_reply(price, loss))

    async def _admit_without_reply(self, price: int, loss: str) -> None:
        self.house.admission._active_marks[self.org] = float("inf")  # its mark would be the first command
        self.stage.redis.arm(1, loss)
        with pytest.raises(StoreUnavailable):
            async with self.house.admission.hold(f"r{next(numbers)}", self.asker, (), price):
                pytest.fail("admitted")
        self.house.admission._active_marks.clear()

    def _pick(self, choice: int, wanted: Callable[[Request], bool]) -> Request | None:
        found = [request for request in self.requests.values() if wanted(request)]
        return found[choice % len(found)] if found else None

    @rule(choice=st.integers(0, 9), share=st.sampled_from([0, 1, 2]), loss=st.one_of(st.none(), LOSSES))
    def settle(self, choice: int, share: int, loss: str | None) -> None:
        """Never reached: nothing. Cut short: half. Complete: in full. Also when it was swept long ago."""
        if (request := self._pick(choice, lambda found: found.charge is None)) is not None:
            self.stage.do(self._settle(request, request.hold.ucredits * share // 2, loss))

    async def _settle(self, request: Request, charge: int, loss: str | None) -> None:
        request.hold.charge = Charge(charge, None, keep_requests=True, basis="exact")
        request.charge = charge
        if loss is not None:
            self.stage.redis.arm(1, loss)
        await request.context.__aexit__(None, None, None)

    @rule(choice=st.integers(0, 9))
    def repeat_a_settle(self, choice: int) -> None:
        if (request := self._pick(choice, lambda found: found.charge is not None)) is not None:
            self.stage.do(self.house.admission.settling.give_back(request.hold))

    @rule(choice=st.integers(0, 9))
    def repeat_an_admission(self, choice: int) -> None:
        self.stage.do(self._repeat_an_admission(choice))

    async def _repeat_an_admission(self, choice: int) -> None:
        if (request := self._pick(choice, lambda _: True)) is not None:
            verdict = (await self.house.admission._ask(request.hold))[0]
            kept = (request.hold.owner, request.hold.hold_id) in self.house.admission.settling._backlog
            assert verdict in ((b"DUP", b"GONE") if request.charge is None or kept else (b"GONE",))

    # What the gateway does beside

    @rule()
    def retry(self) -> None:
        self.stage.do(self.house.admission.settling.work_off())

    @rule(choice=st.integers(0, 9), renewed=st.booleans())
    def lease_ends(self, choice: int, renewed: bool) -> None:
        self.stage.do(self._lease_ends(choice, renewed))

    async def _lease_ends(self, choice: int, renewed: bool) -> None:
        request = self._pick(choice, lambda found: found.charge is None)
        if request is None:
            return
        await self.stage.redis.call("ZADD", keys.deadlines(self.org), "XX", 1, request.hold.hold_id)
        if renewed:
            await self.house.admission._heartbeat(request.hold)
            # A sweeper that had looked before the renewal finds it alive.
            assert await self.house.sweeper._end(self.org, request.hold.hold_id) == 0
        await self.house.sweeper.sweep()
        held = await self.stage.redis.call("HEXISTS", keys.holds(self.org), request.hold.hold_id)
        assert held == (renewed and not request.swept)
        request.swept = request.swept or not renewed

    @rule(fault=st.sampled_from(["", "", "before", "after", "not applied", "applied twice"]))
    def flush(self, fault: str) -> None:
        self.stage.do(self._flush(fault))

    async def _flush(self, fault: str) -> None:
        outbox = self.house.outbox
        outbox.mark(self.org)
        batch = (await outbox._read([self.org], 500))[0] if fault == "applied twice" else []
        if fault == "not applied":
            self.stage.redis.arm(2, "reply lost" if len(self.requests) % 2 else "away")
        elif fault in ("before", "after"):
            self.stage.postgres.fault = fault
        try:
            await outbox.flush()
        except StoreUnavailable:
            assert fault
        self.stage.postgres.fault = ""
        if batch:  # another gateway had read the same entries
            other = Outbox(self.stage.redis, self.stage.postgres, flush_ms=20, batch_max=500, mirror_ttl_s=3600)
            posted, balances = await other._post(batch)
            await other._apply(posted, {balance.org_id: balance for balance in balances})

    @rule(credits=st.integers(1, 4), heard=st.booleans())
    def top_up(self, credits: int, heard: bool) -> None:
        self.stage.do(self._top_up(credits, heard))

    async def _top_up(self, credits: int, heard: bool) -> None:
        await self.stage.postgres.rows(
            "UPDATE ai_credits SET credits = credits + $2 WHERE organization_id = $1", self.org, credits
        )
        self.given += credits * CREDIT
        if heard:
            await self._refresh()

    @rule()
    def refresh(self) -> None:
        self.stage.do(self._refresh())

    async def _refresh(self) -> None:
        self.house.accounts.on_notification(self.org)
        assert self.house.accounts._refreshing is not None
        await self.house.accounts._refreshing

    @precondition(lambda self: self.requests)
    @rule()
    def evict(self) -> None:
        self.stage.do(self._evict())

    async def _evict(self) -> None:
        account = await self._account()
        if account.get("u", 0) == account.get("h", 0) == 0:
            await self.stage.redis.call("DEL", keys.account(self.org))

    # What must hold

    @invariant()
    def books_are_right(self) -> None:
        self.stage.redis.arm(0, "")
        self.stage.do(self._check())

    async def _check(self) -> None:
        account = await self._account()
        holds = await self._holds()
        redis = self.stage.redis
        unposted = 0
        for _, fields in await redis.call("XRANGE", keys.outbox(self.org), "-", "+"):
            unposted += int(dict(zip(fields[::2], fields[1::2], strict=True))[b"d"])
        if "p" in account:
            assert account["u"] == unposted
            assert account["h"] == sum(holds.values())
        else:
            assert account.get("u", 0) == account.get("h", 0) == 0
        charged = sum(self._owed(request) for rid, request in self.requests.items() if rid not in holds)
        left = self.given - charged - sum(holds.values())
        assert left >= 0, "more was taken than there is"
        if "p" in account:
            assert account["p"] - account["u"] - account["h"] <= left, "Redis believes that there is more"
            if await redis.call("TTL", keys.account(self.org)) == -1:
                assert account["u"] or account["h"]
        await self._check_ledger()

    async def _check_ledger(self) -> None:
        rows = await self.stage.postgres.rows(
            "SELECT c.credits * 1000000 + a.micro AS balance, a.version,"
            " (SELECT sum(amount)::bigint FROM gateway.ledger l WHERE l.org_id = a.org_id) AS entries"
            " FROM ai_credits c JOIN gateway.account a ON a.org_id = c.organization_id WHERE a.org_id = $1",
            self.org,
        )
        assert rows[0]["balance"] == rows[0]["entries"]

    def _owed(self, request: Request) -> int:
        if request.charge is not None:
            return request.charge
        return request.hold.ucredits if request.swept else 0

    def teardown(self) -> None:
        """Once all has come to rest, Redis and the ledger agree, to the last micro-credit of every request."""
        if hasattr(self.stage, "house"):
            self.stage.redis.arm(0, "")
            self.stage.do(self._rest())

    async def _rest(self) -> None:
        for request in self.requests.values():
            if request.charge is None:
                await self._settle(request, request.hold.ucredits, None)
        await self.house.admission.drain(5)
        await self._flush("")
        await self._refresh()
        assert await self._holds() == {}
        charged = sum(request.charge or 0 for request in self.requests.values())
        account = await self._account()
        assert (account["p"], account["u"], account["h"]) == (self.given - charged, 0, 0)
        await self._check_ledger()
        posted: dict[str, int] = {}
        for request_id, kind, amount in await self.house.ledger(self.org):
            if kind in ("settle", "orphan"):
                posted[request_id] = posted.get(request_id, 0) - amount
        owed = {rid: request.charge for rid, request in self.requests.items() if request.charge}
        assert {rid: amount for rid, amount in posted.items() if amount} == owed

    async def _account(self) -> dict[str, int]:
        return await self.house.account(self.org)

    async def _holds(self) -> dict[str, int]:
        flat = await self.stage.redis.call("HGETALL", keys.holds(self.org))
        return {rid.decode(): int(text.partition(b":")[0]) for rid, text in zip(flat[::2], flat[1::2], strict=True)}

    async def _dump(self) -> list[bytes | None]:
        names = (keys.account, keys.holds, keys.deadlines, keys.outbox, keys.mirror)
        return [await self.stage.redis.call("DUMP", name(self.org)) for name in names]


@pytest.fixture
def stage(redis_url: str, database_url: str) -> Iterator[Stage]:
    stage = Stage(redis_url, database_url)
    stage.open()
    yield stage
    stage.close()


def test_random_histories_keep_the_books(stage: Stage) -> None:
    Books.stage = stage
    run_state_machine_as_test(
        Books,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )

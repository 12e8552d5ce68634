"""Random histories of one org over the real scripts and the real SQL; the books are right after every step.

Derandomized: the same histories in every run. When a change of the scripts is under way, raise EXAMPLES for a while.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, replace
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
from gateway.ledger import Outbox, books
from gateway.ledger.outbox import _by_org
from gateway.types import Charge, Price, Principal, Quote, Refusal
from tests.ledger.audit import books_are_right
from tests.ledger.conftest import House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis
from tests.ledger.running import state
from tests.waiting import until

CREDIT = 1_000_000
EXAMPLES = 40
STEPS = 40
PRICES = st.sampled_from([CREDIT, 3 * CREDIT // 2, 3 * CREDIT, 1])
LOSSES = st.sampled_from(["away", "connection lost", "reply lost"])
CODES = ("insufficient_credits", "request_exceeds_balance", "credits_in_flight")

numbers = itertools.count(1)


@dataclass
class Request:
    context: AbstractAsyncContextManager[Hold | Refusal]
    hold: Hold
    #: The last word on what it costs; None while it runs.
    charge: int | None = None


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
        self.arm_nothing()
        self.house: House = await self._stack.enter_async_context(
            furnished(self.redis, self.postgres, cap_floor=2, cap_percent=0, loss_grace="24h")
        )
        # Nothing happens by itself: histories are to be the same every time.
        self.house.freshness._wake = lambda: None  # type: ignore[method-assign]
        self.house.accounts._on_loss = lambda org_id, epoch: None
        asking = self.house.admission._asking
        asking._powers = replace(asking._powers, carry=_later)

    def arm_nothing(self) -> None:
        self.redis.arm(0, "")
        self.redis.away = False
        self.postgres.arm(0, "")

    def close(self) -> None:
        self.do(self._stack.aclose())
        self._runner.close()


async def _later(org_id: str) -> None:
    """Charges are posted by the rule that says so, and by no refusal."""


class Books(RuleBasedStateMachine):
    """G given, S charged, H held: S + H <= G whatever happens, and neither store believes that there is more."""

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
        self.stage.do(self._open(credits))

    async def _open(self, credits: int) -> None:
        await self.house.credits(credits, self.org, "grant:first")
        self.given = credits * CREDIT
        # Whatever is lost from now on, this process is waited for.
        await books.beat(self.stage.postgres, self.house.losses.instance)

    # What a client and its request do

    @rule(price=PRICES, least=st.sampled_from([1, 2]), away=st.sampled_from([False, False, True]))
    def admit(self, price: int, least: int, away: bool) -> None:
        """least: half of it would do. away: Redis is, for this one and its end."""
        self.stage.do(self._admit(price, price // least, away))

    async def _admit(self, price: int, least: int, away: bool) -> None:
        before = await self._dump()
        hold_id = f"r{next(numbers)}"
        quote = Quote(Price(price // 2), price, max(1, least), price, CREDIT)
        context = self.house.admission.hold(hold_id, self.asker, (), quote)
        self.stage.redis.away = away
        verdict = await context.__aenter__()
        self.stage.redis.away = False
        if isinstance(verdict, Refusal):
            await context.__aexit__(None, None, None)
            assert verdict.code in CODES
            assert await self._dump() == before
            return
        assert verdict.where == ("postgres" if away else "redis")
        assert least <= verdict.ucredits <= price
        self.requests[hold_id] = Request(context, verdict)

    @rule(price=PRICES, loss=st.sampled_from(["connection lost", "reply lost"]))
    def admit_without_reply(self, price: int, loss: str) -> None:
        self.stage.do(self._admit_without_reply(price, loss))

    async def _admit_without_reply(self, price: int, loss: str) -> None:
        marks = self.house.admission._leases._active_marks
        marks[self.org] = math.inf  # its mark would be the first command
        self.stage.redis.arm(1, loss)
        with pytest.raises(StoreUnavailable):
            async with self.house.admission.hold(f"r{next(numbers)}", self.asker, (), Quote.flat(price)):
                pytest.fail("admitted")
        marks.clear()

    def _pick(self, choice: int, wanted: Callable[[Request], bool]) -> Request | None:
        found = [request for request in self.requests.values() if wanted(request)]
        return found[choice % len(found)] if found else None

    @rule(choice=st.integers(0, 9), more=PRICES)
    def extend(self, choice: int, more: int) -> None:
        if (request := self._pick(choice, lambda found: found.charge is None)) is not None:
            self.stage.do(self._extend(request, more))

    async def _extend(self, request: Request, more: int) -> None:
        before = request.hold.ucredits
        granted = await self.house.admission.extend(request.hold, more)
        assert 0 <= granted <= more and request.hold.ucredits == before + granted

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
            self.stage.do(self.house.settling.give_back(request.hold))

    @rule(choice=st.integers(0, 9))
    def repeat_an_admission(self, choice: int) -> None:
        self.stage.do(self._repeat_an_admission(choice))

    async def _repeat_an_admission(self, choice: int) -> None:
        """A copy of it that comes late."""
        request = self._pick(choice, lambda found: found.hold.where == "redis")
        if request is not None and await self.stage.redis.call("EXISTS", request.hold.keys[4]):
            verdict = (await self.house.admission._asking.ask(request.hold, 1))[0]
            kept = (request.hold.owner, request.hold.hold_id) in self.house.settling._backlog
            assert verdict in ((b"DUP", b"GONE") if request.charge is None or kept else (b"GONE",))

    # What the gateway does beside

    @rule()
    def retry(self) -> None:
        self.stage.do(self.house.settling.work_off())

    @rule()
    def retry_past_redis(self) -> None:
        self.stage.do(self.house.settling._post(self.house.settling._owing()))

    @rule()
    def confirm(self) -> None:
        self.stage.do(self.house.settling._unconfirmed.ask(math.inf))

    @rule(choice=st.integers(0, 9))
    def beat(self, choice: int) -> None:
        if (request := self._pick(choice, lambda found: found.charge is None)) is not None:
            self.stage.do(self.house.admission._leases.beat([request.hold]))

    @rule(choice=st.integers(0, 9), renewed=st.booleans())
    def lease_ends(self, choice: int, renewed: bool) -> None:
        self.stage.do(self._lease_ends(choice, renewed))

    async def _lease_ends(self, choice: int, renewed: bool) -> None:
        """At the last moment: all of it was used by then, so that the sweeper gives none of it to others."""
        request = self._pick(choice, lambda found: found.charge is None)
        if request is None:
            return
        hold = request.hold
        hold.used_ucredits = hold.ucredits
        await self.house.admission._leases.beat([hold])
        if hold.where == "postgres":
            if not renewed:
                await self.stage.postgres.rows(
                    "UPDATE gateway.hold SET deadline = now() - interval '1 s' WHERE request_id = $1", hold.hold_id
                )
            await self.house.sweeper.sweep_postgres()
            return
        await self.stage.redis.call("ZADD", keys.deadlines(self.org), "XX", 1, hold.hold_id)
        if renewed:
            await self.house.admission._leases.beat([hold])
            # A sweeper that had looked before the renewal finds it alive.
            assert await self.house.sweeper._end(self.org, hold.hold_id) == 0
        before = await self.stage.redis.call("HEXISTS", keys.holds(self.org), hold.hold_id)
        await self.house.sweeper.sweep()
        held = await self.stage.redis.call("HEXISTS", keys.holds(self.org), hold.hold_id)
        assert held == (before and renewed)

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
            self.stage.postgres.arm(1, fault)
        try:
            await outbox.flush()
        except StoreUnavailable:
            assert fault
        self.stage.arm_nothing()
        if batch:  # another gateway had read the same entries
            other = Outbox(self.stage.redis, self.stage.postgres, flush_ms=20, batch_max=500, mirror_ttl_s=3600)
            posted, balances = await other._post(batch)
            await other._apply(_by_org(posted), {balance.org_id: balance for balance in balances})

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
        await self.house.accounts.refresh(self.org)

    @rule()
    def retire(self) -> None:
        self.stage.do(self.house.accounts.retire(self.org))

    # What Redis may do

    @precondition(lambda self: self.requests)
    @rule()
    def evict(self) -> None:
        self.stage.do(self._evict())

    async def _evict(self) -> None:
        account = await self._account()
        if account.get("u", 0) == account.get("h", 0) == 0:
            await self.stage.redis.call("DEL", keys.account(self.org))

    @precondition(lambda self: self.requests)
    @rule()
    def lose(self) -> None:
        """As FLUSHALL, for this org."""
        self.stage.do(self._lose())

    async def _lose(self) -> None:
        if found := await self.stage.redis.call("KEYS", f"{keys.tag(self.org)}:*"):
            await self.stage.redis.call("DEL", *found)

    @precondition(lambda self: self.requests)
    @rule()
    def restart(self) -> None:
        """From what it had saved, and that was all."""
        self.stage.do(self._restart())

    async def _restart(self) -> None:
        if await self.stage.redis.call("EXISTS", keys.account(self.org)):
            await self.stage.redis.call("HSET", keys.account(self.org), "r", "gone")

    @rule()
    def tell(self) -> None:
        """Whatever was lost until now is over."""
        self.stage.do(self._tell())

    async def _tell(self) -> None:
        losses = self.house.losses
        await losses.beat()
        await until(lambda: not losses.waiting_count)

    # What must hold

    @invariant()
    def books_are_right(self) -> None:
        self.stage.arm_nothing()
        self.stage.do(self._check())

    async def _check(self) -> None:
        account, holds = await self._account(), await self._holds()
        ours = await self._is_ours()
        unposted = await self._unposted()
        if ours:
            assert account["u"] == unposted
            assert account["h"] == sum(holds.values())
            if await self.stage.redis.call("TTL", keys.account(self.org)) == -1:
                assert account["u"] or account["h"]
        spoken_for = sum(self._owed(request) for request in self.requests.values())
        left = self.given - spoken_for
        assert left >= 0, "more was taken than there is"
        await books_are_right(self.stage.postgres)
        now = await state(self.house, self.org)
        if not now:
            return
        balance = now["credits"] * CREDIT + now["micro"]
        there = max(0, balance - now["cap"] - now["lost"] - now["held"])
        here = 0
        if ours:
            owed = account["u"] + account["h"]
            here = max(0, min(account["p"] - account.get("s", 0) - owed, account["c"] - owed))
        assert here + there <= left, "the stores believe that there is more"

    def _owed(self, request: Request) -> int:
        return request.hold.ucredits if request.charge is None else request.charge

    def teardown(self) -> None:
        """Once all has come to rest, Redis and the ledger agree, to the last micro-credit of every request."""
        if hasattr(self.stage, "house"):
            self.stage.arm_nothing()
            self.stage.do(self._rest())

    async def _rest(self) -> None:
        for request in self.requests.values():
            if request.charge is None:
                await self._settle(request, request.hold.ucredits, None)
        await self.house.admission.drain(5)
        await self._tell()
        await self._flush("")
        await self.house.settling._unconfirmed.ask(math.inf)
        await self._flush("")
        assert self.house.settling.unconfirmed_count == 0
        await self.house.accounts.load(self.org, "pro")
        assert await self._holds() == {}
        charged = sum(request.charge or 0 for request in self.requests.values())
        account = await self._account()
        assert (account["p"], account["u"], account["h"]) == (self.given - charged, 0, 0)
        await books_are_right(self.stage.postgres)
        now = await state(self.house, self.org)
        assert (now["held"], now["lost"], now["waiting"]) == (0, 0, 0)
        posted: dict[str, int] = {}
        for request_id, kind, amount in await self.house.ledger(self.org):
            if kind in ("settle", "orphan"):
                posted[request_id] = posted.get(request_id, 0) - amount
        owed = {rid: request.charge for rid, request in self.requests.items() if request.charge}
        assert {rid: amount for rid, amount in posted.items() if amount} == owed

    async def _account(self) -> dict[str, int]:
        return await self.house.account(self.org)

    async def _is_ours(self) -> bool:
        """There is an account that may be used as it is."""
        born_on = await self.stage.redis.call("HGET", keys.account(self.org), "r")
        return born_on is not None and born_on != b"gone"

    async def _unposted(self) -> int:
        unposted = 0
        for _, fields in await self.stage.redis.call("XRANGE", keys.outbox(self.org), "-", "+"):
            unposted += int(dict(zip(fields[::2], fields[1::2], strict=True))[b"d"])
        return unposted

    async def _holds(self) -> dict[str, int]:
        flat = await self.stage.redis.call("HGETALL", keys.holds(self.org))
        return {rid.decode(): int(text.partition(b":")[0]) for rid, text in zip(flat[::2], flat[1::2], strict=True)}

    async def _dump(self) -> list[bytes | int | None]:
        """What a denial changes nothing of. A cap may have been raised for it in vain."""
        account = await self._account()
        names = (keys.holds, keys.deadlines, keys.outbox)
        dumped = [await self.stage.redis.call("DUMP", name(self.org)) for name in names]
        return [account.get("h", 0), account.get("u", 0), *dumped]


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

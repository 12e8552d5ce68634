"""Two pockets, held against coins that are moved one by one; and a balance that is always what both have in them.

Derandomized: the same histories in every run. When the functions are under way, raise EXAMPLES for a while.
"""

import asyncio
import itertools
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gateway.ledger import books, grants, migrate
from gateway.stores import Postgres
from gateway.types import Entry
from tests.ledger.audit import books_are_right, entries
from tests.ledger.planned import CREDIT, HOUR_MS, insert, plan

EXAMPLES = 40
STEPS = 25
#: What is moved at once. By hand only whole credits can be.
COIN = CREDIT // 2
COINS = st.integers(1, 12)

numbers = itertools.count(1)


class Pockets:
    """Coin by coin. `spent`: where each came from, the last one on top."""

    def __init__(self) -> None:
        self.plan = self.purchased = 0
        self.spent: list[str] = []

    def charge(self, coins: int) -> None:
        for _ in range(coins):
            if self.plan:
                self.plan -= 1
                self.spent.append("plan")
            else:
                self.purchased -= 1
                self.spent.append("purchased")

    def refund(self, coins: int) -> None:
        for _ in range(coins):
            if self.spent and self.spent.pop() == "plan":
                self.plan += 1
            else:
                self.purchased += 1
        self._pay_debt()

    def by_hand(self, coins: int) -> None:
        self.purchased += coins
        self._pay_debt()

    def grant(self, kind: str, coins: int, protected: int) -> int:
        """What it brings, and for a reset in place of what; returns what expired."""
        gone = max(0, self.plan - protected) if kind == "reset" else 0
        self.plan -= gone
        self.plan += max(0, coins - self.plan - self.purchased) if kind == "top_up" else coins
        # What was spent of an earlier grant comes back as purchased: nobody knows any more where it came from.
        self.spent.clear()
        self._pay_debt()
        return gone

    def _pay_debt(self) -> None:
        """What is owed is owed by both."""
        paid = min(self.plan, max(0, -self.purchased))
        self.plan -= paid
        self.purchased += paid


class Stage:
    """The database that all histories share; every history has an org of its own."""

    def __init__(self, database_url: str) -> None:
        self._runner = asyncio.Runner()
        self.postgres = Postgres(database_url, timeout_ms=5_000, pool_max=2)
        self.do(self.postgres.open())
        self.do(migrate(self.postgres))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work)

    def close(self) -> None:
        self.do(self.postgres.close())
        self._runner.close()


class Histories(RuleBasedStateMachine):
    stage: Stage

    def __init__(self) -> None:
        super().__init__()
        self.org = f"org{next(numbers)}"
        self.model = Pockets()
        self.now_ms = 1_800_000_000_000
        #: Grants that were made: of which plan, for the hour that began when.
        self.given: set[tuple[str, int]] = set()
        self.held: dict[str, int] = {}
        self.cap = 0
        self.orphaned: dict[str, int] = {}
        self.do(insert(self.stage.postgres, 0, self.org))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.stage.do(work)

    def post(self, *entries: tuple[str, str, int]) -> None:
        """Of kind, request and coins; twice, as an outbox may."""
        batch = [Entry(self.org, request, kind, coins * COIN) for kind, request, coins in entries]
        for _ in range(2):
            self.do(books.post(self.stage.postgres, batch))

    def spend(self, coins: int) -> None:
        if coins > 0:
            self.model.charge(coins)
        else:
            self.model.refund(-coins)

    @rule(coins=COINS)
    def charge(self, coins: int) -> None:
        self.post(("settle", f"r{next(numbers)}", -coins))
        self.spend(coins)

    @rule(coins=COINS)
    def sweep(self, coins: int) -> None:
        request = f"r{next(numbers)}"
        self.post(("orphan", request, -coins))
        self.orphaned[request] = coins
        self.spend(coins)

    @precondition(lambda self: self.orphaned)
    @rule(share=st.integers(0, 4))
    def settle_what_was_swept(self, share: int) -> None:
        """It cost less, or more, than the sweeper thought."""
        request, coins = self.orphaned.popitem()
        true = coins * share // 2
        self.post(("settle", request, -true))
        self.spend(true - coins)

    @rule(coins=st.integers(-12, 12))
    def correct(self, coins: int) -> None:
        self.post(("correction", f"r{next(numbers)}", coins))
        self.spend(-coins)

    @rule(charged=COINS, back=COINS)
    def charge_and_correct_at_once(self, charged: int, back: int) -> None:
        """In one batch, what is given back has not been spent."""
        self.post(("settle", f"r{next(numbers)}", -charged), ("correction", f"r{next(numbers)}", back))
        self.spend(charged - back)

    @rule(credits=st.integers(-6, 6))
    def change_by_hand(self, credits: int) -> None:
        self.do(
            self.stage.postgres.rows(
                "UPDATE ai_credits SET credits = credits + $2 WHERE organization_id = $1", self.org, credits
            )
        )
        self.model.by_hand(2 * credits)

    @rule(credits=st.integers(1, 6))
    def purchase(self, credits: int) -> None:
        self.do(books.grant(self.stage.postgres, self.org, credits, grant_id=f"g{next(numbers)}"))
        self.model.by_hand(2 * credits)

    @rule(coins=COINS)
    def hold(self, coins: int) -> None:
        request = f"h{next(numbers)}"
        taken = self.do(
            books.take_hold(self.stage.postgres, self.org, request, coins * COIN, 1, 0, instance="i1", lease_ms=60_000)
        )
        if taken.status == "OK":
            self.held[request] = taken.held_ucredits // COIN

    @precondition(lambda self: self.held)
    @rule(share=st.integers(0, 2))
    def end(self, share: int) -> None:
        request, coins = self.held.popitem()
        self.post(("settle", request, -(coins * share // 2)))
        self.spend(coins * share // 2)

    @rule(need=COINS)
    def let_redis_owe(self, need: int) -> None:
        state = self.do(books.raise_cap(self.stage.postgres, self.org, 1, "b1", need * COIN, 0, 60_000))
        self.cap = state.cap_ucredits // COIN

    @rule(kind=st.sampled_from(["reset", "reset", "top_up", "add"]), credits=st.integers(0, 6), hours=st.integers(0, 3))
    def ask_for_a_grant(self, kind: str, credits: int, hours: int) -> None:
        """By a plan of that name. Mostly in a later period."""
        self.now_ms += hours * HOUR_MS
        facts = replace(
            self.do(grants.look(self.stage.postgres, self.org)), created_ms=self.now_ms, clock_ms=self.now_ms
        )
        before = len(self.ledger())
        self.do(grants.turn(self.stage.postgres, self.org, kind, plan(kind, credits), facts))
        posted = [kind for kind, _ in self.ledger()[before:]]
        if (kind, self.now_ms) in self.given:
            assert posted == []
            return
        self.given.add((kind, self.now_ms))
        purchased = self.model.purchased
        gone = self.model.grant(kind, 2 * credits, self.cap + sum(self.held.values()))
        assert posted == (["expire", "grant"] if gone else ["grant"])
        assert self.model.purchased >= purchased

    def ledger(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = self.do(entries(self.stage.postgres, self.org))
        return found

    @invariant()
    def pockets_are_as_the_coins_say(self) -> None:
        found = self.do(grants.read_pockets(self.stage.postgres, self.org))
        assert found is not None
        assert (found.plan_ucredits, found.purchased_ucredits) == (self.model.plan * COIN, self.model.purchased * COIN)
        assert found.plan_ucredits >= 0
        state = self.do(books.read(self.stage.postgres, [self.org]))[self.org]
        assert found.plan_ucredits + found.purchased_ucredits == state.ucredits

    def teardown(self) -> None:
        self.do(books_are_right(self.stage.postgres))


@pytest.fixture
def stage(database_url: str) -> Iterator[Stage]:
    stage = Stage(database_url)
    yield stage
    stage.close()


def test_random_histories_keep_the_pockets_apart(stage: Stage) -> None:
    Histories.stage = stage
    run_state_machine_as_test(
        Histories,
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

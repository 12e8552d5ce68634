"""`python -m bench.credits`: what credits add to a request, and how long a charge is on its way.

Everything of the gateway that handles credits (gateway.money), on an embedded Valkey and an embedded PostgreSQL:

    cost       gateway CPU of a request that holds and is charged: without credits, with `behind`, with `through`
    lag        from the end of a request until PostgreSQL has its charge, at a steady 500 requests a second
    growth     lag and cost again with 1,000,000 rows in the ledger, then with 100,000 orgs

Medians over rounds that alternate, where they are compared. Wall time on a shared machine: compare rows of one run.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop

from bench.ledger import ACTIVE_ORGS, ORGS_MAX, ROWS_MAX, add_orgs, add_rows, print_table
from gateway import limits
from gateway.admission import Hold
from gateway.config import load_text
from gateway.embedded import EmbeddedPostgres, EmbeddedValkey
from gateway.ledger import migrate
from gateway.money import Money
from gateway.stores import Postgres, Redis, Script
from gateway.telemetry import configure_logging
from gateway.types import Charge, Demand, Limit, Principal, Quote

UCREDITS = 1_000_000
TOGETHER = 32
PACE_PER_S = 500
PACED_S = 10
PAID = Charge(UCREDITS, None, keep_requests=True, basis="exact")
FREE = Charge(0, None, keep_requests=True, basis="exact")
RPM = Demand(Limit("rpm", "sliding", "requests", "org", 100_000_000, 60_000), "", 1)
CONFIG = """
upstreams: {{ router: {{ targets: [demo] }} }}
identity: [ {{ api_key: {{}} }} ]
plans: {{ trial: {{ credits: 100, policy: trial }} }}
routes: [ {{ path: /, upstream: router }} ]
credits: {{ write: {write} }}
"""

_numbers = itertools.count()


class Gateway:
    """The rooms that handle credits, at work."""

    def __init__(self, money: Money) -> None:
        self.money = money
        #: By request, when its answer had ended; then, in ms, how long PostgreSQL took to have the charge.
        self._ended_s: dict[str, float] = {}
        self.lags_ms: list[float] = []
        noted = money.settling.confirmed

        def confirmed(org_id: str, request_ids: Sequence[str]) -> None:
            now_s = time.perf_counter()
            self.lags_ms += [(now_s - self._ended_s.pop(one)) * 1e3 for one in request_ids if one in self._ended_s]
            noted(org_id, request_ids)

        money.settling.confirmed = confirmed  # type: ignore[method-assign]

    async def request(self, quote: Quote, charge: Charge) -> None:
        number = next(_numbers)
        hold_id = f"r{number}"
        asker = Principal(f"o{number % ACTIVE_ORGS}", "trial", None, None, "api_key")
        async with self.money.admission.hold(hold_id, asker, (RPM,), quote) as hold:
            assert isinstance(hold, Hold), hold
            hold.charge = charge
            self._ended_s[hold_id] = time.perf_counter()

    async def cpu_us(self, quote: Quote, charge: Charge, count: int) -> float:
        """Of this process, for each of `count` requests, TOGETHER at once."""
        began_s = time.process_time()
        for _ in range(count // TOGETHER):
            await asyncio.gather(*(self.request(quote, charge) for _ in range(TOGETHER)))
        return (time.process_time() - began_s) * 1e6 / (count // TOGETHER * TOGETHER)

    async def paced(self, quote: Quote, charge: Charge) -> list[float]:
        """The lags of PACE_PER_S requests a second for PACED_S seconds."""
        self.lags_ms.clear()
        began_s, tasks = time.perf_counter(), []
        for number in range(PACE_PER_S * PACED_S):
            await asyncio.sleep(max(0.0, began_s + number / PACE_PER_S - time.perf_counter()))
            tasks.append(asyncio.create_task(self.request(quote, charge)))
        await asyncio.gather(*tasks)
        await self.money.outbox.flush()
        return sorted(self.lags_ms)


@asynccontextmanager
async def gateway(redis_url: str, postgres: Postgres, write: str) -> AsyncIterator[Gateway]:
    scripts = [Script(name, limits.script_text(name)) for name in (*limits.LOOPS, *limits.PLAIN)]
    redis = Redis(redis_url, timeout_ms=5_000, connect_timeout_ms=1_000, scripts=scripts)
    redis.start()
    money = Money(load_text(CONFIG.format(write=write), {"trial.yaml": "policy: trial"}), redis, redis, postgres)
    await money.open()
    tasks = [asyncio.create_task(work()) for _, work in money.work]
    try:
        yield Gateway(money)
    finally:
        await money.drain(5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await money.close()
        await redis.close()


async def main(rounds: int, calls: int) -> None:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        valkey, database = EmbeddedValkey(folder / "valkey"), EmbeddedPostgres(folder / "postgres")
        redis_url, database_url = await valkey.start(), await database.start()
        stack.push_async_callback(valkey.stop)
        stack.push_async_callback(database.stop)
        postgres = Postgres(database_url, timeout_ms=60_000, pool_max=16)
        await postgres.open()
        stack.push_async_callback(postgres.close)
        await migrate(postgres)
        await add_orgs(postgres, ACTIVE_ORGS)
        behind = await stack.enter_async_context(gateway(redis_url, postgres, "behind"))
        through = await stack.enter_async_context(gateway(redis_url, postgres, "through"))
        await _cost(behind, through, rounds, calls)
        await _lag(behind, postgres)


async def _cost(behind: Gateway, through: Gateway, rounds: int, calls: int) -> None:
    flat, free = Quote.flat(UCREDITS), Quote.flat(0)
    rows: dict[str, Callable[[], Awaitable[float]]] = {
        "one limit, no credits": lambda: behind.cpu_us(free, FREE, calls),
        "one limit, a credit, `behind`": lambda: behind.cpu_us(flat, PAID, calls),
        "one limit, a credit, `through`": lambda: through.cpu_us(flat, PAID, calls // 8),
    }
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, measure in rows.items():
            found[name].append(await measure())
    cells = [(name, f"{statistics.median(of):.0f}", f"{min(of):.0f}..{max(of):.0f}") for name, of in found.items()]
    print_table(("admitted and settled", "gateway CPU us", "range"), cells)


async def _lag(behind: Gateway, postgres: Postgres) -> None:
    async def as_it_is() -> None:
        return None

    rows = []
    for name, grow in (
        (f"{ACTIVE_ORGS} orgs", as_it_is),
        (f"{ROWS_MAX} rows more", lambda: add_rows(postgres, ROWS_MAX)),
        (f"{ORGS_MAX} orgs", lambda: add_orgs(postgres, ORGS_MAX)),
    ):
        await grow()
        lags = await behind.paced(Quote.flat(UCREDITS), PAID)
        cost_us = await behind.cpu_us(Quote.flat(UCREDITS), PAID, TOGETHER * 50)
        rows.append((name, len(lags), *(f"{_at(lags, part):.0f}" for part in (0.5, 0.99, 1)), f"{cost_us:.0f}"))
    head = (f"ledger, {PACE_PER_S} requests/s", "charges", "lag ms p50", "p99", "longest", "gateway CPU us")
    print_table(head, rows)


def _at(ordered: Sequence[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.credits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2_000)
    chosen = parser.parse_args()
    configure_logging("pretty", "warning")
    uvloop.run(main(chosen.rounds, chosen.calls))

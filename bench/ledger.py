"""`python -m bench.ledger`: what posting costs, and how it grows.

On an embedded PostgreSQL that waits for its disk, as `gateway run` has it, through the functions the gateway calls:

    posting    entries per second by the size of a transaction, for entries of many orgs
    growth     the same with 10 and 1,000,000 rows in the ledger, and with 10 and 100,000 orgs
    through    holds and charges written one by one, as `write: through` does: of one org, and of many at once

Rounds of what is compared alternate; medians are shown. Wall time on a shared machine: compare rows of one run.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import uvloop

from gateway.embedded import EmbeddedPostgres
from gateway.ledger import books, migrate
from gateway.stores import Postgres
from gateway.telemetry import configure_logging
from gateway.types import Entry

UCREDITS = 1_000_000
ROWS_MAX, ORGS_MAX = 1_000_000, 100_000
ACTIVE_ORGS = 200
TOGETHER = 16

_numbers = itertools.count()


async def _execute(postgres: Postgres, statement: str) -> None:
    await postgres.rows(statement, timeout_ms=600_000)


async def add_orgs(postgres: Postgres, count: int) -> None:
    """Orgs o0, o1, ... each with a million credits, `count` in all."""
    await _execute(
        postgres,
        "INSERT INTO ai_credits (organization_id, credits)"
        f" SELECT 'o' || n, 1000000 FROM generate_series(0, {count - 1}) AS n ON CONFLICT DO NOTHING",
    )
    # As autovacuum would soon: until then plans are those for a handful of orgs.
    for table in ("ai_credits", "gateway.account"):
        await _execute(postgres, f"ANALYZE {table}")


async def add_rows(postgres: Postgres, count: int) -> None:
    """So many entries of nothing, spread over the active orgs."""
    await _execute(
        postgres,
        "INSERT INTO gateway.ledger (org_id, request_id, kind, amount, meta)"
        f" SELECT 'o' || n % {ACTIVE_ORGS}, 'old' || n, 'settle', 0, '{{\"model\": \"m\"}}'"
        f" FROM generate_series(1, {count}) AS n",
    )
    await _execute(postgres, "ANALYZE gateway.ledger")


async def posted_per_s(postgres: Postgres, batch: int, batches: int) -> float:
    meta = {"route": "POST /v1/chat/completions", "model": "gpt", "input_tokens": 60, "output_tokens": 20}
    began_s = time.perf_counter()
    for _ in range(batches):
        numbers = [next(_numbers) for _ in range(batch)]
        entries = [Entry(f"o{number % ACTIVE_ORGS}", f"r{number}", "settle", -UCREDITS, meta) for number in numbers]
        await books.post(postgres, entries)
    return batch * batches / (time.perf_counter() - began_s)


async def through_ms(postgres: Postgres, requests: int, orgs: int) -> tuple[float, float]:
    """Milliseconds of a hold and its charge at the median, and requests per second, TOGETHER at once."""
    took_ms: list[float] = []

    async def one(number: int) -> None:
        org, name = f"o{number % orgs}", f"t{number}"
        began_s = time.perf_counter()
        await books.take_hold(postgres, org, name, UCREDITS, UCREDITS, UCREDITS, instance="bench", lease_ms=30_000)
        await books.post(postgres, [Entry(org, name, "settle", -UCREDITS)])
        took_ms.append((time.perf_counter() - began_s) * 1e3)

    async def worker(share: int) -> None:
        for _ in range(share):
            await one(next(_numbers))

    began_s = time.perf_counter()
    await asyncio.gather(*(worker(requests // TOGETHER) for _ in range(TOGETHER)))
    return statistics.median(took_ms), len(took_ms) / (time.perf_counter() - began_s)


async def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        server = EmbeddedPostgres(Path(folder))
        postgres = Postgres(await server.start(), timeout_ms=60_000, pool_max=TOGETHER)
        try:
            await postgres.open()
            await migrate(postgres)
            await add_orgs(postgres, ACTIVE_ORGS)
            await _posting(postgres, rounds)
            await _through(postgres, rounds)
            await _growth(postgres, rounds)
        finally:
            await postgres.close()
            await server.stop()


async def _posting(postgres: Postgres, rounds: int) -> None:
    found: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for batch, batches in ((1, 200), (50, 40), (500, 10)):
            found[batch].append(await posted_per_s(postgres, batch, batches))
    print_table(("entries in a transaction", "entries/s"), [(size, f"{_median(of):.0f}") for size, of in found.items()])


async def _through(postgres: Postgres, rounds: int) -> None:
    found: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(rounds):
        for orgs in (1, ACTIVE_ORGS):
            found[orgs].append(await through_ms(postgres, 320, orgs))
    rows = [
        (orgs, f"{_median([a for a, _ in of]):.1f}", f"{_median([b for _, b in of]):.0f}") for orgs, of in found.items()
    ]
    print_table((f"orgs, {TOGETHER} requests at once", "hold and charge, ms p50", "requests/s"), rows)


async def _growth(postgres: Postgres, rounds: int) -> None:
    async def as_it_is() -> None:
        return None

    rows = []
    for name, grow in (
        ("as above", as_it_is),
        (f"{ROWS_MAX} rows more", lambda: add_rows(postgres, ROWS_MAX)),
        (f"{ORGS_MAX} orgs", lambda: add_orgs(postgres, ORGS_MAX)),
    ):
        await grow()
        speeds = [await posted_per_s(postgres, 500, 10) for _ in range(rounds)]
        rows.append((name, f"{_median(speeds):.0f}", f"{min(speeds):.0f}..{max(speeds):.0f}"))
    print_table(("ledger", "entries/s, 500 in a transaction", "range"), rows)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """On standard output, as Markdown."""
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    configure_logging("pretty", "warning")
    uvloop.run(main(parser.parse_args().rounds))

"""`python -m bench.limits`: what an admission costs, on the server and in the gateway, by the number of its limits.

Each row is one request's admission and settlement with a credit hold, on a server started for it: the embedded Valkey
and, where there is one, the machine's `redis-server`. Server time is `commandstats` (usec per EVALSHA, as the server
counts it), gateway time the CPU of this process per call. The rounds of all rows alternate; their median is shown.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from gateway import keys, limits
from gateway.admission import Admission, Hold, Powers, Rules, Settling
from gateway.embedded import EmbeddedValkey
from gateway.stores import INCARNATION, Redis, Script
from gateway.telemetry import configure_logging
from gateway.types import Balance, Charge, Demand, Limit, Principal, Quote, Refusal, Usage

ORG = "bench"
ASKER = Principal(ORG, "pro", "ann", "key_1", "api_key")
UCREDITS = 1_000_000
TOGETHER = 32
MINUTE_MS = 60_000
INSTALL = Script("install", limits.script_text("install"))
PAID = Charge(UCREDITS, Usage(60, 20), keep_requests=True, basis="exact")


def demands(count: int) -> tuple[Demand, ...]:
    """`count` limits as policies have them: what never refuses, for the org and for each of its users, keys, models."""
    kinds = (
        Demand(Limit("rpm", "sliding", "requests", "org", 10_000_000, MINUTE_MS), "", 1),
        Demand(Limit("tpm", "sliding", "tokens", "org", 1_000_000_000, MINUTE_MS), "", 100),
        Demand(Limit("rps", "gcra", "requests", "org", 10_000_000, 1_000, 10_000_000), "", 1),
        Demand(Limit("parallel", "concurrent", "concurrent", "org", 100_000, 30_000), "", 1),
    )
    return tuple(Demand(kinds[n % 4].limit, "" if n < 4 else f"s{n // 4:06}", kinds[n % 4].cost) for n in range(count))


FULL = (Demand(Limit("full", "sliding", "requests", "org", 100, MINUTE_MS), "", 1),)


@dataclass(frozen=True, slots=True)
class Figures:
    """Microseconds per call."""

    server: float
    gateway: float


class Bench:
    """One server and the admission in front of it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        rules = Rules(30_000, 10_000, 2_000, 1_000_000, 3_600, unconfirmed_entries_max=10_000_000)

        async def nothing(*_: object) -> Any:
            return None

        def ignored(_: str) -> None:
            return None

        powers = Powers(
            load=nothing,
            raise_cap=nothing,
            begin_period=nothing,
            turn_period=nothing,
            carry=nothing,
            recheck=ignored,
            refresh=ignored,
            recover=nothing,
            post=nothing,
            install=nothing,
            take_in_postgres=nothing,
            extend_in_postgres=nothing,
            renew_in_postgres=nothing,
            instances=lambda: 1,
            mark_dirty=ignored,
        )
        self._admission = Admission(redis, rules, Settling(redis, rules, powers), powers)

    async def round(self, wanted: Sequence[Demand], calls: int) -> tuple[Figures, Figures]:
        """Of `calls` admissions, and of their settlements."""
        await self._redis.call("FLUSHALL")
        balance = Balance(ORG, calls * UCREDITS * 2, 1)
        _, birth = await self._install(balance)
        # As after a first request: the account has a cap, and it is far away.
        await self._install(replace(balance, version=2, cap_ucredits=balance.ucredits, birth=birth.decode()))
        admitting = settling = Figures(0, 0)
        for at in range(0, calls, TOGETHER):
            batch = [
                self._admission.hold(uuid.uuid4().hex, ASKER, tuple(wanted), Quote.flat(UCREDITS))
                for _ in range(min(TOGETHER, calls - at))
            ]
            verdicts, one = await self._measured([holding.__aenter__() for holding in batch])
            admitting = Figures(admitting.server + one.server, admitting.gateway + one.gateway)
            for verdict in verdicts:
                if isinstance(verdict, Hold):
                    verdict.charge = PAID
            held = [
                holding for holding, verdict in zip(batch, verdicts, strict=True) if not isinstance(verdict, Refusal)
            ]
            _, one = await self._measured([holding.__aexit__(None, None, None) for holding in held])
            settling = Figures(settling.server + one.server, settling.gateway + one.gateway)
        return _per_call(admitting, calls), _per_call(settling, calls)

    async def _install(self, balance: Balance) -> list[bytes]:
        script_keys = [keys.account(ORG), keys.holds(ORG), keys.outbox(ORG), keys.mirror(ORG)]
        reply: list[bytes] = await self._redis.run(
            INSTALL, script_keys, [*limits.state_row(balance), 3_600, 0, INCARNATION]
        )
        return reply

    async def _measured(self, works: list) -> tuple[list, Figures]:  # type: ignore[type-arg]
        await self._redis.call("CONFIG", "RESETSTAT")
        began_s = time.process_time()
        results = await asyncio.gather(*works)
        spent_us = (time.process_time() - began_s) * 1e6
        stats = (await self._redis.call("INFO", "commandstats")).decode()
        server_us = sum(
            int(line.partition("usec=")[2].partition(",")[0])
            for line in stats.splitlines()
            if line.startswith("cmdstat_evalsha:")
        )
        return results, Figures(server_us, spent_us)


def _per_call(total: Figures, calls: int) -> Figures:
    return Figures(total.server / calls, total.gateway / calls)


async def main(rounds: int, calls: int) -> None:
    rows = {"credits only": demands(0), "1 limit": demands(1), "4 limits": demands(4), "12 limits": demands(12)}
    rows["refused by 1 limit"] = FULL
    async with AsyncExitStack() as stack:
        benches = {"embedded Valkey": await _bench(stack, None)}
        if (system := shutil.which("redis-server")) is not None:
            benches["redis-server"] = await _bench(stack, Path(system))
        found: dict[tuple[str, str], list[tuple[Figures, Figures]]] = defaultdict(list)
        for _ in range(rounds):
            for server, bench in benches.items():
                for name, wanted in rows.items():
                    found[server, name].append(await bench.round(wanted, calls))
    print("| us per call | | admit: server | admit: gateway | settle: server | settle: gateway |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for (server, name), figures in found.items():
        cells = [statistics.median(getattr(pair[step], side) for pair in figures) for step in (0, 1) for side in _SIDES]
        print(f"| {server} | {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")


_SIDES = ("server", "gateway")


async def _bench(stack: AsyncExitStack, binary: Path | None) -> Bench:
    server = EmbeddedValkey(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))), binary=binary)
    url = await server.start()
    stack.push_async_callback(server.stop)
    redis = Redis(url, timeout_ms=5_000, connect_timeout_ms=1_000)
    redis.start()
    stack.push_async_callback(redis.close)
    await redis.connected()
    return Bench(redis)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.limits", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2_000)
    chosen = parser.parse_args()
    configure_logging("json", "error")
    uvloop.run(main(chosen.rounds, chosen.calls))

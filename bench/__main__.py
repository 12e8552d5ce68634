"""`python -m bench`: every server once, then rounds A B C A B C; prints the tables of README.md. Linux only."""

import argparse
import asyncio
import platform
import shutil
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench import load, machine, proxies, report, servers
from bench.report import Sample
from gateway.telemetry import configure_logging

#: A streamed answer: so many events, so far apart, on so many connections.
EVENTS = 100
GAP_MS = 5
STREAMS = 20
WARM_UP_S = 1
#: The outbox has posted what a row left behind before the next row begins.
PAUSE_S = 0.25
DIRECT, NGINX, ENVOY = "direct", "nginx", "Envoy"
OWN, PLAIN = "transport alone", "httpx alone"


@dataclass(frozen=True, slots=True)
class Row:
    """Who is asked, and whose CPU time counts."""

    name: str
    server: servers.Listening
    key: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured, and by whom."""

    rounds: int
    seconds: int
    connections: int
    wrk: str | None


def arguments() -> Plan:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of one row in one round")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument(
        "--generator", choices=("auto", "wrk", "own"), default="auto", help="auto: wrk when it is there"
    )
    chosen = parser.parse_args()
    if not (1 <= chosen.rounds <= 100 and 1 <= chosen.seconds <= 600 and 1 <= chosen.connections <= 1024):
        parser.error("rounds are 1 to 100, seconds 1 to 600, connections 1 to 1024")
    wrk = None if chosen.generator == "own" else load.wrk_path()
    if chosen.generator == "wrk" and wrk is None:
        parser.error("there is no wrk on PATH")
    return Plan(chosen.rounds, chosen.seconds, chosen.connections, wrk)


async def main(plan: Plan) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    measured_core, other_core = machine.cores()
    folder = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    try:
        with machine.on_core(other_core):  # whatever is not told otherwise
            async with AsyncExitStack() as stack:
                await _measure(plan, folder, measured_core, stack)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _measure(plan: Plan, folder: Path, core: int | None, stack: AsyncExitStack) -> None:
    _say("starting servers")
    stores = await stack.enter_async_context(servers.stores(folder))
    keys = await servers.keys_for_plans(stores)
    upstream = await stack.enter_async_context(servers.upstream(folder, None))
    gateway = await stack.enter_async_context(servers.gateway(folder, core, stores, upstream.port))
    rss_idle = machine.rss_bytes(gateway.pid)
    rows = [Row(DIRECT, upstream, keys["full"])]
    for name, server in await _compared(folder, core, upstream.port, stack):
        rows.append(Row(name, server, keys["full"]))
    rows.append(Row("gateway, nothing limited", gateway, keys["bare"]))
    rows.append(Row("gateway, full walk", gateway, keys["full"]))
    bases = [row.name for row in rows if row.name in (NGINX, ENVOY, OWN)]
    requests = await _rounds(plan, rows, stores, folder, stream=False)
    streams = await _rounds(plan, rows, stores, folder, stream=True)
    print(_head(plan))
    print(f"\n{report.cost(requests, 'request', bases)}")
    print(f"\n{STREAMS} streams of {EVENTS} events, {GAP_MS} ms apart; one request's share is in each event\n")
    print(report.cost(streams, "event", bases))
    print(f"\nHow much longer than {DIRECT} an event is under way, from the upstream's write to the client's read\n")
    print(report.delay(streams, DIRECT))
    for name in (NGINX, ENVOY):
        if name not in bases:
            print(f"\n{name}: absent, it is not installed")
    rss_after = machine.rss_bytes(gateway.pid)
    print(f"\nGateway memory (RSS): idle {rss_idle / 2**20:.0f} MiB, after the load {rss_after / 2**20:.0f} MiB")
    if any(sample.bad for found in (requests, streams) for samples in found.values() for sample in samples):
        sys.exit("bench: some answers were bad, so the figures mean nothing")


async def _compared(
    folder: Path, core: int | None, upstream_port: int, stack: AsyncExitStack
) -> list[tuple[str, servers.Listening]]:
    """What stands beside the gateway in the tables."""
    found = []
    if (program := proxies.nginx_path()) is not None:
        found.append((NGINX, await stack.enter_async_context(proxies.nginx(folder, core, program, upstream_port))))
    if (program := proxies.envoy_path()) is not None:
        found.append((ENVOY, await stack.enter_async_context(proxies.envoy(folder, core, program, upstream_port))))
    for name, kind in ((OWN, "own"), (PLAIN, "httpx")):
        found.append((name, await stack.enter_async_context(proxies.engine(folder, core, kind, upstream_port))))
    return found


async def _rounds(
    plan: Plan, rows: list[Row], stores: servers.Stores, folder: Path, *, stream: bool
) -> dict[str, list[Sample]]:
    """Every row once a round, in the same order; the first second of each row is not counted."""
    samples: dict[str, list[Sample]] = {row.name: [] for row in rows}
    for row in rows:
        await load.run(_target(row, stream), _connections(plan, stream), WARM_UP_S, plan.wrk, folder)
    for number in range(1, plan.rounds + 1):
        _say(f"{'streams' if stream else 'requests'}: round {number} of {plan.rounds}")
        for row in rows:
            await asyncio.sleep(PAUSE_S)
            samples[row.name].append(await _sample(plan, row, stores, folder, stream))
    return samples


async def _sample(plan: Plan, row: Row, stores: servers.Stores, folder: Path, stream: bool) -> Sample:
    pids = (row.server.pid, stores.redis_pid, stores.postgres_pid)
    before = [machine.cpu_ns(pid) for pid in pids]
    result = await load.run(_target(row, stream), _connections(plan, stream), plan.seconds, plan.wrk, folder)
    spent_us = [(machine.cpu_ns(pid) - earlier) / 1000 for pid, earlier in zip(pids, before, strict=True)]
    count = (result.events if stream else result.requests) or 1
    server_us, redis_us, postgres_us = (spent / count for spent in spent_us)
    return Sample(server_us, redis_us, postgres_us, count / result.seconds, result.p50_ms, result.p99_ms, result.bad)


def _target(row: Row, stream: bool) -> load.Target:
    return load.Target(servers.HOST, row.server.port, row.key, *((EVENTS, GAP_MS) if stream else ()))


def _connections(plan: Plan, stream: bool) -> int:
    return STREAMS if stream else plan.connections


def _head(plan: Plan) -> str:
    generator = "own generator" if plan.wrk is None else "wrk (streams: own generator)"
    return (
        f"{time.strftime('%d %b %Y')} · {machine.cpu_name()} · Python {platform.python_version()} · "
        f"uvloop {version('uvloop')} · {generator}, {plan.connections} connections, "
        f"{plan.rounds} rounds of {plan.seconds} s"
    )


def _say(words: str) -> None:
    print(f"bench: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    plan = arguments()
    configure_logging("json", "warning")
    try:
        asyncio.run(main(plan))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)

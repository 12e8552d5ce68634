"""The load: closed loops over keep-alive connections, from wrk when it is there, else from a generator of our own.

Ours is a process too (`python -m bench.load`, one JSON object in, one out): what it costs must not be counted as cost
of whoever started it. It counts and times events as well, so streams are always its work.
"""

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import httptools
import uvloop

from bench import exchange

#: Bounds a run whatever the clock says; latencies are kept in memory.
REQUESTS_MAX = 2_000_000
#: After the time is over every connection may finish what it has begun.
FINISH_S = 15.0
WRK_SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True, slots=True)
class Target:
    """Where a load goes to, and what it asks for: a stream of `events`, `gap_ms` apart; 0 events: a plain answer."""

    host: str
    port: int
    key: str
    events: int = 0
    gap_ms: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What one load saw. bad: answers that were not 200, and connections that broke. p50, p99: of the whole answer;
    of a stream how long each event was under way, from the upstream's write to the generator's read."""

    requests: int
    bad: int
    seconds: float
    p50_ms: float
    p99_ms: float
    events: int


def wrk_path() -> str | None:
    return shutil.which("wrk")


async def run(target: Target, connections: int, seconds: int, wrk: str | None, folder: Path) -> Result:
    """`connections` loops have asked `target` for `seconds`. Raises RuntimeError when the generator fails."""
    if wrk is not None and not target.events:
        body = folder / "request.json"
        body.write_bytes(exchange.request_body())
        url = f"http://{target.host}:{target.port}{exchange.PATH}"
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(WRK_SCRIPT), url]
        fields = [f"{name}: {value}" for name, value in exchange.request_fields(target.key).items()]
        return _result(await _output([*command, "--", str(body), *fields]))
    order = json.dumps({"target": asdict(target), "connections": connections, "seconds": seconds})
    return _result(await _output([sys.executable, "-m", "bench.load", order]))


async def _output(command: Sequence[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")
    return output.decode()


def _result(output: str) -> Result:
    """Of the last line; wrk says more before it."""
    return Result(**json.loads(output.strip().splitlines()[-1]))


class _Run:
    """What the connections of one load share."""

    def __init__(self, target: Target, seconds: int) -> None:
        body = exchange.request_body(target.events, target.gap_ms)
        fields = {"host": f"{target.host}:{target.port}", **exchange.request_fields(target.key)}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.request = f"POST {exchange.PATH} HTTP/1.1\r\n{head}content-length: {len(body)}\r\n\r\n".encode() + body
        self.deadline = time.perf_counter() + seconds
        self.latencies_s: list[float] = []
        self.delays_s: list[float] = []
        self.bad = 0
        self.events = 0

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.deadline or len(self.latencies_s) >= REQUESTS_MAX


class _Asking(asyncio.Protocol):
    """One connection: asks again as soon as it has its answer, until the run is over."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._asked_at = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._run.bad += 1
            self.done.set_result(None)

    def on_body(self, body: bytes) -> None:
        if events := body.count(exchange.EVENT_END):
            self._run.events += events
            now_ns = time.monotonic_ns()
            self._run.delays_s.extend((now_ns - written_ns) / 1e9 for written_ns in exchange.written_ns(body))

    def on_message_complete(self) -> None:
        run = self._run
        run.latencies_s.append(time.perf_counter() - self._asked_at)
        if self._parser.get_status_code() != 200:
            run.bad += 1
        if run.over:
            assert self._transport is not None
            self.done.set_result(None)
            self._transport.close()
        else:
            self._ask()

    def _ask(self) -> None:
        assert self._transport is not None
        self._asked_at = time.perf_counter()
        self._transport.write(self._run.request)


async def _load(target: Target, connections: int, seconds: int) -> Result:
    loop = asyncio.get_running_loop()
    run = _Run(target, seconds)
    started = time.perf_counter()
    asking = []
    for _ in range(connections):
        _, protocol = await loop.create_connection(lambda: _Asking(run), target.host, target.port)
        asking.append(protocol)
    async with asyncio.timeout(seconds + FINISH_S):
        await asyncio.gather(*(protocol.done for protocol in asking))
    lasted = time.perf_counter() - started
    sorted_ms = sorted(spent * 1000 for spent in (run.delays_s if target.events else run.latencies_s)) or [0.0]
    p50, p99 = (sorted_ms[int(len(sorted_ms) * share)] for share in (0.5, 0.99))
    return Result(len(run.latencies_s), run.bad, lasted, p50, p99, run.events)


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    print(json.dumps(asdict(uvloop.run(_load(Target(**order["target"]), order["connections"], order["seconds"])))))

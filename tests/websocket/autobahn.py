"""The Autobahn testsuite against an echo server, direct and through a gateway, compared case by case.

    python -m tests.websocket.autobahn PYTHON2 [CASES ...]

PYTHON2 is a Python 2.7 that can import `autobahntestsuite`, the only one it runs on (docs/websocket.md). CASES are
patterns as the testsuite has them; all of them otherwise, which takes half an hour.
"""

import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis.asyncio as redis_client
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from gateway.ledger import migrate
from gateway.stores import Postgres
from tests import servers
from tests.walk.house import House, in_process

WSTEST = "from autobahntestsuite.wstest import run; run()"
ROUTES = "\n  - { path: /*, upstream: ai_router, websocket: { message_bytes_max: 64MiB } }\n"
#: What must be the same of every case; durations and addresses are not.
SUMMARY = ("behavior", "behaviorClose", "remoteCloseCode")
DETAILS = ("result", "remoteCloseReason", "localCloseCode", "droppedByMe", "wasClean", "wasNotCleanReason")


async def run(python2: str, cases: Sequence[str], reports: Path, redis_url: str, postgres_url: str) -> None:
    """The testsuite has left its `reports` on both."""
    postgres = Postgres(postgres_url, timeout_ms=10_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    redis = redis_client.Redis.from_url(redis_url)
    async with serve(_echo, "127.0.0.1", 0, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        house = House(reports, redis_url, postgres_url, postgres, redis, f"http://127.0.0.1:{port}", price=0)
        house.secret = await house.add_key(house.org_id)
        # Of the fields that the testsuite sends, Origin is one whose value can be given.
        house.settings = {"routes": ROUTES, "identity": "[ api_key: { headers: [origin] } ]"}
        async with in_process(house) as gateway:
            both = (
                {"agent": "direct", "url": house.upstream_url.replace("http", "ws")},
                {"agent": "gateway", "url": gateway.address.replace("http", "ws"), "origin": house.secret},
            )
            spec = {"outdir": str(reports), "cases": list(cases) or ["*"], "options": {"version": 18}, "servers": both}
            (reports / "spec.json").write_text(json.dumps(spec))
            await _run(python2, str(reports / "spec.json"))
    await redis.aclose()
    await postgres.close()


async def _echo(websocket: ServerConnection) -> None:
    with suppress(ConnectionClosed):
        async for message in websocket:
            await websocket.send(message)


async def _run(python2: str, spec: str) -> None:
    wstest = await asyncio.create_subprocess_exec(
        python2, "-c", WSTEST, "-m", "fuzzingclient", "-s", spec, stdout=asyncio.subprocess.DEVNULL
    )
    if await wstest.wait():
        raise RuntimeError("the testsuite did not run to its end")


def differences(reports: Path) -> Iterator[str]:
    """Every case that did not come out alike."""
    index: dict[str, dict[str, Any]] = json.loads((reports / "index.json").read_text())
    for case, expected in index["direct"].items():
        mine, its = _outcome(reports, index["gateway"][case]), _outcome(reports, expected)
        if mine != its:
            yield f"{case}: direct {its}, through the gateway {mine}"
    for agent, outcomes in index.items():
        behaviors = Counter(outcome["behavior"] for outcome in outcomes.values())
        sys.stderr.write(f"{agent}: {len(outcomes)} cases, {dict(behaviors)}\n")


def _outcome(reports: Path, summary: dict[str, Any]) -> dict[str, Any]:
    details: dict[str, Any] = json.loads((reports / summary["reportfile"]).read_text())
    return {name: summary[name] for name in SUMMARY} | {name: details.get(name) for name in DETAILS}


def main() -> None:
    python2, *cases = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, servers.valkey() as redis_url, servers.postgres() as postgres_url:
        reports = Path(folder)
        asyncio.run(run(python2, cases, reports, redis_url, postgres_url))
        differing = list(differences(reports))
    sys.stderr.write("".join(f"{line}\n" for line in differing) + f"{len(differing)} differ\n")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()

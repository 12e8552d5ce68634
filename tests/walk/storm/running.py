"""Sets a storm up: the gateway in this process, the upstream and the clients in processes of their own."""

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.walk import raw
from tests.walk.house import House, Running, in_process
from tests.walk.storm.clients import Plan, Report

ROUTES = """
  - { path: /v1/chat/completions, method: POST, upstream: ai_router, dialect: openai, usage: openai_chat }
  - { path: /drained/*, upstream: ai_router, on_disconnect: drain, drain_timeout: 2s }
  - { path: /*, upstream: ai_router }
"""
#: Each ends in the id. The first is read before it is forwarded when tokens are limited, the others never are; the
#: third goes on when its client leaves.
CHAT, PLAIN, DRAINED = "/v1/chat/completions?id=", "/storm/", "/drained/"
TOKENS = {"name": "tpm", "count": "tokens", "limit": 1_000_000_000_000, "window": "1h", "per": "org"}
ROOT = Path(__file__).resolve().parents[3]


class Nowhere(io.StringIO):
    """A stream for lines that nobody will read."""

    def write(self, text: str) -> int:
        return len(text)


@asynccontextmanager
async def storm_gateway(house: House, monkeypatch: pytest.MonkeyPatch, **settings: str) -> AsyncIterator[Running]:
    """A gateway whose clients wait for a connection as long as it takes. It writes no access log: tens of thousands of
    lines would be kept until the test is over."""
    house.settings.update(routes=ROUTES, trusted="[127.0.0.0/8]", queue_timeout="20s", connect="20s", **settings)
    monkeypatch.setattr("gateway.app.access_stream", Nowhere)
    async with in_process(house) as gateway:
        yield gateway


@dataclass(frozen=True, slots=True)
class StormUpstream:
    """An upstream.py in a process of its own."""

    url: str

    async def record(self) -> dict[str, Any]:
        """What it has seen until now."""
        async with raw.connection(self.url) as (reader, writer):
            writer.write(b"GET /record HTTP/1.1\r\nHost: upstream\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.rpartition(b"Content-Length: ")[2])
            told: dict[str, Any] = json.loads(await reader.readexactly(size))
            return told


@asynccontextmanager
async def storm_upstream() -> AsyncIterator[StormUpstream]:
    process = await _start("upstream")
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        yield StormUpstream(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        await process.wait()


async def storm(plan: Plan) -> Report:
    """The plan has been carried out."""
    process = await _start("clients", json.dumps(asdict(plan)))
    try:
        told, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0
    return Report(**json.loads(told))


async def _start(name: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"tests.walk.storm.{name}",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

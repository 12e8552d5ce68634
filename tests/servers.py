"""Servers that tests run against: the embedded ones, or Redis and PostgreSQL of this machine."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg

from gateway.embedded import EmbeddedDemoRouter, EmbeddedPostgres, EmbeddedValkey


def system_redis() -> Path | None:
    """The machine's own `redis-server`; None when there is none."""
    found = shutil.which("redis-server")
    return None if found is None else Path(found)


def system_postgres() -> Path | None:
    """The directory of the machine's own `postgres` and `initdb`, the newest if there are several; None when absent."""
    found = shutil.which("postgres")
    candidates = [] if found is None else [Path(found).resolve().parent]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    return next((path for path in candidates if os.access(path / "initdb", os.X_OK)), None)


@contextmanager
def valkey(binary: Path | None = None) -> Iterator[str]:
    """The URL of a server with data of its own, gone with the block. binary: a Redis to run instead."""
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        server = EmbeddedValkey(Path(folder), binary=binary)
        try:
            yield asyncio.run(server.start())
        finally:
            asyncio.run(server.stop())


@contextmanager
def postgres(bin_dir: Path | None = None) -> Iterator[str]:
    """The URL of a server with data of its own, gone with the block. bin_dir: a PostgreSQL to run instead."""
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        server = EmbeddedPostgres(Path(folder), bin_dir=bin_dir, durable=False)
        try:
            yield asyncio.run(server.start())
        finally:
            asyncio.run(server.stop())


@contextmanager
def demo_router(*flags: str) -> Iterator[str]:
    """The base URL of a demo AI router in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        server = EmbeddedDemoRouter(Path(folder), flags=flags)
        try:
            yield asyncio.run(server.start())
        finally:
            asyncio.run(server.stop())


async def execute(url: str, statement: str) -> None:
    """The statement ran on a connection of its own."""
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()

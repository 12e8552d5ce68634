"""PostgreSQL as it fails: whatever it is, the store is unavailable, and the next call has a connection that works."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from gateway.errors import StoreUnavailable
from gateway.stores import Postgres
from tests.waiting import until


@asynccontextmanager
async def half_closing(url: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A way to the server on which its last words arrive and its hanging up does not; and all that it has said."""
    parts = urlsplit(url)
    said: list[bytes] = []
    tasks: set[asyncio.Task[None]] = set()

    async def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, target = await asyncio.open_connection(parts.hostname, parts.port)

        async def back() -> None:
            while data := await answers.read(65_536):
                said.append(data)
                writer.write(data)

        task = asyncio.create_task(back())
        tasks.add(task)
        while data := await reader.read(65_536):
            target.write(data)
        task.cancel()
        target.transport.abort()
        writer.transport.abort()

    server = await asyncio.start_server(visit, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    credentials = parts.netloc.rpartition("@")[0]
    try:
        yield parts._replace(netloc=f"{credentials}@127.0.0.1:{port}").geturl(), said
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_connection_that_the_server_has_ended_and_not_closed_yet_is_a_failure_of_the_store(
    database_url: str,
) -> None:
    async with half_closing(database_url) as (url, said):
        postgres = Postgres(url, timeout_ms=2_000, pool_max=1)
        await postgres.open()
        try:
            found = await postgres.row("SELECT pg_backend_pid() AS pid")
            assert found is not None
            other: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database_url)
            await other.execute("SELECT pg_terminate_backend($1)", found["pid"])
            await other.close()
            await until(lambda: b"terminating connection" in b"".join(said))
            await asyncio.sleep(0)  # the words have arrived in our own socket; one turn reads them
            with pytest.raises(StoreUnavailable):
                await postgres.row("SELECT 1")
            assert len(await postgres.rows("SELECT 2")) == 1
        finally:
            await postgres.close()

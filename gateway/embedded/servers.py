"""Both embedded servers together: what `run` uses for stores nobody configured."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.valkey import EmbeddedValkey
from gateway.shield import shielded

_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class EmbeddedUrls:
    """Where the servers answer, passwords included; None for one that was not asked for."""

    redis: str | None
    postgres: str | None


@asynccontextmanager
async def embedded(
    state_dir: Path, *, valkey: bool, postgres: bool, progress: Callable[[str], None]
) -> AsyncIterator[EmbeddedUrls]:
    """The servers asked for run while the block does, and have ended when it is left.

    They start side by side. `progress` is told in a few words what is being waited for. Raises EmbeddedError when
    one does not start; the other has ended then.
    """
    cache = EmbeddedValkey(state_dir) if valkey else None
    database = EmbeddedPostgres(state_dir) if postgres else None
    if cache is not None:
        progress("starting Valkey")
    if database is not None:
        first = "" if database.created else " (first time: creating its data)"
        progress(f"starting PostgreSQL{first}")
    try:
        starts = [asyncio.ensure_future(_start(server)) for server in (cache, database)]
        try:
            redis_url, postgres_url = await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        yield EmbeddedUrls(redis_url, postgres_url)
    finally:
        await shielded(_stop(database, cache), _STOP_TIMEOUT_S)


async def _start(server: EmbeddedValkey | EmbeddedPostgres | None) -> str | None:
    return None if server is None else await server.start()


async def _stop(database: EmbeddedPostgres | None, cache: EmbeddedValkey | None) -> None:
    """The ledger first: what it still writes may be read from the cache."""
    try:
        if database is not None:
            await database.stop()
    finally:
        if cache is not None:
            await cache.stop()

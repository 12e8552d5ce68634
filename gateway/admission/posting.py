"""Charges that go to PostgreSQL past Redis."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import structlog

from gateway.errors import StoreRefused
from gateway.types import Balance, Entry

#: Entries in one transaction.
TOGETHER = 500

log = structlog.get_logger("gateway.settling")

Post = Callable[[Sequence[Entry]], Awaitable[Sequence[Balance]]]


async def posted(post: Post, entries: Sequence[Entry]) -> AsyncIterator[tuple[Sequence[Entry], dict[str, Balance]]]:
    """Part by part, entries that are in the ledger now, and the state of every org among them after that. One that the
    ledger refuses is left out, for a person to look at; it never keeps back the others. Raises StoreUnavailable."""
    for at in range(0, len(entries), TOGETHER):
        async for part in _posted(post, entries[at : at + TOGETHER]):
            yield part


async def _posted(post: Post, batch: Sequence[Entry]) -> AsyncIterator[tuple[Sequence[Entry], dict[str, Balance]]]:
    try:
        states = {balance.org_id: balance for balance in await post(batch)}
    except StoreRefused as exc:
        if len(batch) == 1:
            log.error("the ledger refuses a charge", org=batch[0].org_id, hold=batch[0].request_id, error=str(exc))
            return
    else:
        yield batch, states
        return
    middle = len(batch) // 2
    for half in (batch[:middle], batch[middle:]):
        async for part in _posted(post, half):
            yield part

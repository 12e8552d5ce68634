"""Giving back what was taken, even while being cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def shielded(work: Coroutine[Any, Any, Any], timeout_s: float) -> None:
    """`work` has run to its end, or was cancelled after `timeout_s`, whatever happened to the caller meanwhile.

    Cancellations that arrive during the wait are remembered and re-raised afterwards, so nothing is settled or
    closed in a task that nobody awaits. Errors of `work` pass through; overrunning the bound raises TimeoutError.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        remaining_s = deadline - loop.time()
        if remaining_s <= 0:
            task.cancel()
        try:
            await asyncio.wait({task}, timeout=remaining_s if remaining_s > 0 else None)
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # retrieved: the cancellation outranks it
        raise cancelled
    if task.cancelled():
        raise TimeoutError(f"not given back within {timeout_s} s")
    task.result()

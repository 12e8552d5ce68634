"""Waiting for a condition, never for a time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.005


async def until(condition: Callable[[], object | Awaitable[object]], timeout_s: float = 10.0) -> None:
    """The condition holds. Fails when it does not come to hold within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        holds = condition()
        if inspect.isawaitable(holds):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"did not come true within {timeout_s} s"
        await asyncio.sleep(POLL_S)

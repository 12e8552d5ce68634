"""What identity tests start from: a request's head, clocks that stand still until told, key material."""

import asyncio
from collections.abc import Callable

from gateway.types import Facts


def facts(*headers: tuple[str, str], peer_ip: str = "203.0.113.9", client_ip: str = "203.0.113.9") -> Facts:
    """A request with these fields, in this order."""
    fields = tuple((name.lower().encode(), value.encode("latin-1")) for name, value in headers)
    return Facts("req_1", "POST", "/v1/chat/completions", b"/v1/chat/completions", fields, client_ip, peer_ip)


class Time:
    """A clock in milliseconds; `pass_ms` moves it."""

    def __init__(self, now_ms: int = 1_000_000) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms

    def pass_ms(self, span_ms: int) -> None:
        self.now_ms += span_ms


async def until(condition: Callable[[], bool]) -> None:
    """The condition holds; fails after two seconds."""
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0)


class Gate:
    """Makes an awaited call wait until `open` is set, and counts how many have begun."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.begun = 0

    async def __call__(self) -> None:
        self.begun += 1
        await self.open.wait()

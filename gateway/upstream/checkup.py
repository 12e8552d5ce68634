"""Active health checks: a plain GET to each target, on a connection of its own, again and again.

Owns when a target is asked and what counts as well. What follows from it is standing.py's.
"""

import asyncio
import random
from typing import Protocol

import httpx

from gateway.upstream.standing import JITTER
from gateway.upstream.targets import Target

#: Of a check's answer; the rest is not waited for.
BODY_BYTES_MAX = 65_536


class CheckRules(Protocol):
    """What is read of `config.HealthCheck`."""

    @property
    def path(self) -> str: ...
    @property
    def interval_ms(self) -> int: ...
    @property
    def timeout_ms(self) -> int: ...
    @property
    def failures(self) -> int: ...


class Checkup:
    """The health checks of one target."""

    def __init__(self, target: Target, transport: httpx.AsyncBaseTransport, rules: CheckRules) -> None:
        """transport: not the one that requests wait for, or a busy target would look like a dead one."""
        self._target = target
        self._transport = transport
        self._rules = rules
        self._path = rules.path.encode("ascii")

    async def run(self) -> None:
        """Checks until cancelled."""
        interval_s = self._rules.interval_ms / 1000
        while True:
            self._target.standing.checked(await self.fault(), self._rules.failures)
            await asyncio.sleep(interval_s * (1 - JITTER * random.random()))

    async def fault(self) -> str | None:
        """What is wrong with the target; None when it answers 2xx within the timeout."""
        try:
            async with asyncio.timeout(self._rules.timeout_ms / 1000):
                status = await self._status()
        except TimeoutError:
            return f"no answer within {self._rules.timeout_ms} ms"
        except httpx.TransportError as exc:
            return str(exc) or type(exc).__name__
        return None if 200 <= status < 300 else f"answered {status}"

    async def _status(self) -> int:
        target = self._target
        request = httpx.Request(
            "GET",
            target.url(self._path),
            headers=[(b"Host", target.authority), (b"User-Agent", b"gateway-health-check"), (b"Accept", b"*/*")],
            stream=httpx.ByteStream(b""),
            extensions={"target": target.prefix + self._path},
        )
        response = await self._transport.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            seen_bytes = 0
            async for chunk in response.stream:
                seen_bytes += len(chunk)
                if seen_bytes > BODY_BYTES_MAX:
                    break
        finally:
            await response.stream.aclose()
        return response.status_code

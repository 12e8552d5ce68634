"""What the gateway can do right now, found out by asking, never remembered from boot.

ok        everything answers
degraded  requests are served, something behind them is away (an upstream, or a store while the other stands in)
down      no request can be admitted (both stores are away, or one without which none may be)
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from gateway.errors import GatewayError

#: Probes are shared by everybody who asks within this time, so that asking often costs the stores nothing.
REPORT_TTL_S = 0.5
PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Probe:
    """One dependency. `ask` returns in a few words what it found, and raises GatewayError when it does not answer."""

    name: str
    ask: Callable[[], Awaitable[str]]
    #: What its absence makes of the whole: `down` or `degraded`.
    without: str
    #: The probe that stands in for it: without both, the whole is down.
    or_else: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    ok: bool
    says: str
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Report:
    """All findings of one moment."""

    status: str
    findings: Mapping[str, Finding]

    @property
    def can_serve(self) -> bool:
        return self.status != "down"


class Health:
    """Asks all probes together. State: the last report, and whether the gateway is draining."""

    def __init__(self, probes: tuple[Probe, ...]) -> None:
        self._probes = probes
        self._asking: asyncio.Task[Report] | None = None
        self._asked_s = 0.0
        #: SIGTERM came: no new work, please.
        self.draining = False

    async def report(self) -> Report:
        """A report at most REPORT_TTL_S old."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked_s > REPORT_TTL_S):
            self._asking = asyncio.create_task(self._ask_all())
            self._asked_s = now
        return await asyncio.shield(self._asking)

    async def _ask_all(self) -> Report:
        found = await asyncio.gather(*(self._ask(probe) for probe in self._probes))
        missing = {probe.name: probe for probe, finding in zip(self._probes, found, strict=True) if not finding.ok}
        is_down = any(probe.without == "down" or probe.or_else in missing for probe in missing.values())
        status = "down" if is_down else "degraded" if missing else "ok"
        return Report(status, {probe.name: finding for probe, finding in zip(self._probes, found, strict=True)})

    async def _ask(self, probe: Probe) -> Finding:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                ok, says = True, await probe.ask()
        except GatewayError as exc:
            ok, says = False, str(exc)
        except TimeoutError:
            ok, says = False, f"no answer within {PROBE_TIMEOUT_S:g} s"
        return Finding(ok, says, round((time.perf_counter() - started) * 1000, 3))

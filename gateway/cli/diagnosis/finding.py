"""One thing the doctor looked at, and how examinations are run: bounded in time, and none can end another."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum

from gateway.errors import GatewayError, StoreUnavailable

#: One question to a server: longer than any request may wait, so that slow and dead are told apart.
ASK_TIMEOUT_MS = 3_000
#: One whole examination.
EXAMINATION_TIMEOUT_S = 30.0
#: Beyond this, clocks differ enough for a key or a token to be judged wrongly.
CLOCK_OFFSET_MS_MAX = 1_000
#: An answer that takes more than this share of its deadline has no room left.
DEADLINE_SHARE_MAX = 0.5


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """`name` is `area.what`, stable; `says` what was found; `hint` what to do about it."""

    name: str
    status: Status
    says: str
    hint: str = ""


def ok(name: str, says: str) -> Finding:
    return Finding(name, Status.OK, says)


def warning(name: str, says: str, hint: str) -> Finding:
    return Finding(name, Status.WARNING, says, hint)


def problem(name: str, says: str, hint: str) -> Finding:
    return Finding(name, Status.PROBLEM, says, hint)


async def collect(area: str, examination: AsyncIterator[Finding]) -> list[Finding]:
    """What the examination found; when it is cut short, what it found until then and that it was."""
    findings: list[Finding] = []
    try:
        async with asyncio.timeout(EXAMINATION_TIMEOUT_S):
            async for finding in examination:
                findings.append(finding)
    except GatewayError as exc:
        findings.append(problem(area, f"could not be examined further: {reason(exc)}", "see the findings above it"))
    except TimeoutError:
        says = f"could not be examined within {EXAMINATION_TIMEOUT_S:.0f} s"
        findings.append(problem(area, says, "it answers too slowly to be of use; look at its load and the network"))
    except Exception as exc:
        # Whatever is wrong with one neighbour, the others are still reported.
        says = f"could not be examined further: {type(exc).__name__}: {exc}"
        findings.append(problem(area, says, "correct its address in gateway.yaml"))
    return findings


def reason(exc: GatewayError) -> str:
    """What the other side said, rather than what a client of the gateway would be told."""
    return exc.detail if isinstance(exc, StoreUnavailable) and exc.detail else str(exc)


def clock_finding(name: str, whose: str, offset_ms: int) -> Finding:
    """offset_ms: how far this machine's clock is ahead of the other."""
    ahead = f"this machine's clock is {abs(offset_ms)} ms {'ahead of' if offset_ms > 0 else 'behind'} {whose}"
    if abs(offset_ms) <= CLOCK_OFFSET_MS_MAX:
        return ok(name, ahead)
    return warning(
        name, ahead, "keep both in step (chrony or systemd-timesyncd): the expiry of keys and tokens errs so"
    )


def latency_finding(name: str, latency_ms: float, deadline_ms: int, key: str) -> Finding:
    """key: the deadline's key in gateway.yaml."""
    says = f"answers in {latency_ms:.1f} ms; a request waits at most {deadline_ms} ms"
    if latency_ms <= deadline_ms * DEADLINE_SHARE_MAX:
        return ok(name, says)
    return warning(name, says, f"move it closer, relieve it, or raise {key}: requests will be refused with 503")

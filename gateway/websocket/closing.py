"""Why the gateway itself ends a WebSocket, and what it tells the two ends (RFC 6455 §7.4, IANA's registry of codes)."""

from dataclasses import dataclass

from websockets.frames import CloseCode

from gateway.types import Refusal


@dataclass(frozen=True, slots=True)
class Closing:
    """One reason. `why` is stable, part of the public surface: the log's word, and what the upstream reads."""

    why: str
    client_code: int
    upstream_code: int
    #: What the client reads; at most 123 bytes of it.
    reason: str


def _both(code: int, why: str, message: str) -> Closing:
    return Closing(why, code, code, f"{why}: {message}")


#: Nothing is wrong with what the ends did; a client that still wants something may connect again.
IDLE = _both(CloseCode.GOING_AWAY, "idle_timeout", "nothing was sent for too long")
LIFETIME = _both(CloseCode.GOING_AWAY, "lifetime_over", "connect again")
SHUTTING_DOWN = _both(CloseCode.GOING_AWAY, "shutting_down", "connect again")


def too_big(message_bytes_max: int) -> Closing:
    """For a message of either end."""
    return _both(CloseCode.MESSAGE_TOO_BIG, "message_too_big", f"more than {message_bytes_max} bytes")


def not_admitted(refusal: Refusal) -> Closing:
    """For a message of the client: 1013 when the same message may be admitted later, 1008 when waiting will not help.
    The upstream is only told that this client goes away."""
    later = refusal.retry_after_ms is not None and refusal.should_retry is not False
    code = CloseCode.TRY_AGAIN_LATER if later else CloseCode.POLICY_VIOLATION
    advice = f"{refusal.code}; retry-after-ms={refusal.retry_after_ms}" if later else refusal.code
    return Closing(refusal.code, code, CloseCode.GOING_AWAY, f"{advice}: {refusal.message}")

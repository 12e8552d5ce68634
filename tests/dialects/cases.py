"""Every refusal the gateway gives, and the golden file of each in every dialect.

After a wanted change of the wire, write the files anew and read the diff: `python -m tests.dialects.cases`.
"""

from pathlib import Path

from gateway import errors
from gateway.dialects import DIALECTS, Rendered
from gateway.types import Refusal
from tests.dialects.judged import NOW_S, judged

REQUEST_ID = "0198c0de-0000-7000-8000-000000000001"
GOLDEN = Path(__file__).parent / "golden"

LIMIT = {
    "limit": "rpm",
    "scope": "org",
    "unit": "requests",
    "used": 60,
    "max": 60,
    "requested": 1,
    "violated_policies": ["rpm", "user-rpm"],
}

REFUSALS: dict[str, Refusal] = {
    "ambiguous_path": errors.AmbiguousPath().refusal(),
    "bad_request": errors.BadRequest("`n` must be a whole number from 1 to 1024.").refusal(),
    "bad_websocket_handshake": Refusal(400, "bad_websocket_handshake", "A handshake has no body.", None, False),
    "body_too_large": errors.BodyTooLarge().refusal(),
    "credits_in_flight": Refusal(
        429, "credits_in_flight", "The remaining credits are held.", 1000, None, {"required_credits": 1.0}
    ),
    "credits_unavailable": errors.UnknownBalance().refusal(),
    "gateway_error": errors.GatewayError().refusal(),
    "idempotency_key_reused": Refusal(422, "idempotency_key_reused", "A new request needs a new key.", None, False),
    "insufficient_credits": Refusal(
        402,
        "insufficient_credits",
        "This organization has no credits left.",
        None,
        False,
        {"required_credits": 1.0, "available_credits": 0.0},
    ),
    "invalid_api_key": errors.Unauthenticated().refusal(),
    "method_not_allowed": Refusal(405, "method_not_allowed", "Not this method.", details={"allow": ["GET", "POST"]}),
    "rate_limit_exceeded": Refusal(
        429, "rate_limit_exceeded", "Limit 'rpm' is reached.", 1234, None, LIMIT, judged(1234)
    ),
    "rate_limit_exceeded_for_long": Refusal(
        429, "rate_limit_exceeded", "Come back later.", 60_001, True, LIMIT, judged(60_001)
    ),
    "request_exceeds_balance": Refusal(
        402,
        "request_exceeds_balance",
        "This request may cost more than all the credits of this organization.",
        None,
        False,
        {"required_credits": 3.0, "available_credits": 1.5, "held_credits": 0.5},
    ),
    "request_exceeds_limit": Refusal(400, "request_exceeds_limit", "This never fits.", None, False, {"limit": "tpm"}),
    "request_finished": Refusal(
        409,
        "request_finished",
        "The request with this Idempotency-Key has ended.",
        None,
        False,
        {
            "first": {
                "request_id": "0198c0de-0000-7000-8000-000000000000",
                "status": 200,
                "outcome": "complete",
                "charged_credits": 1,
                "at": "2026-01-02T03:04:05.678+00:00",
            }
        },
    ),
    "request_in_progress": Refusal(409, "request_in_progress", "It is running; come back.", 1000, True),
    "request_timeout": errors.RequestTimeout().refusal(),
    "shutting_down": errors.ShuttingDown().refusal(),
    "store_unavailable": errors.StoreUnavailable().refusal(),
    "too_many_failures": Refusal(429, "too_many_failures", "Too many failures.", 500),
    "unknown_model_price": Refusal(
        403,
        "unknown_model_price",
        "The model 'gpt-0' has no price on this gateway.",
        None,
        False,
        {"model": "gpt-0", "param": "model"},
    ),
    "unknown_plan": Refusal(403, "unknown_plan", "This plan is not configured.", None, False, {"plan": "gold"}),
    "unknown_route": errors.UnknownRoute().refusal(),
    "upstream_broke": errors.UpstreamBroke().refusal(),
    "upstream_busy": errors.UpstreamBusy().refusal(),
    "upstream_timeout": errors.UpstreamTimeout().refusal(),
    "upstream_unreachable": errors.UpstreamUnreachable().refusal(),
    "websocket_not_allowed": Refusal(403, "websocket_not_allowed", "Not here.", None, False),
    "websocket_version": Refusal(426, "websocket_version", "Version 13 is spoken.", None, False),
}


def wire(rendered: Rendered) -> bytes:
    """`rendered` much as it stands on the wire, for people to read."""
    head = b"".join(b"%b: %b\n" % field for field in rendered.headers)
    return b"HTTP/1.1 %d\n%b\n%b\n" % (rendered.status, head, rendered.body)


def path(dialect: str, case: str) -> Path:
    return GOLDEN / dialect / f"{case}.http"


def write() -> None:
    """The golden files say what the dialects say now."""
    for dialect, module in DIALECTS.items():
        (GOLDEN / dialect).mkdir(parents=True, exist_ok=True)
        for stale in (GOLDEN / dialect).glob("*.http"):
            stale.unlink()
        for case, refusal in REFUSALS.items():
            path(dialect, case).write_bytes(wire(module.render(refusal, REQUEST_ID, NOW_S)))


if __name__ == "__main__":
    write()

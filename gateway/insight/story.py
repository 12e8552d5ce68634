"""What became of a request, told from its line in the access log alone: no configuration, no store is asked."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from gateway.insight.logline import Judged, Line
from gateway.types import UCREDITS_PER_CREDIT, Outcome

#: What ended a request before its limits were asked, by the code it was refused with.
_BEFORE = {
    "unknown_route": "No route of the gateway serves this path, so nobody was asked who it was from.",
    "method_not_allowed": "The path belongs to a route, but not for this method.",
    "ambiguous_path": "The path can be read in more than one way, and another server might take it for one that "
    "another route serves. It was not forwarded.",
    "invalid_api_key": "Its credential was missing, or no identity source took it for valid.",
    "too_many_failures": "Its network had sent too many requests without a valid credential or target, and the gateway "
    "did not ask who this one was from.",
    "unknown_plan": "The plan of its organization is not in the gateway's configuration.",
    "bad_request": "Something in it that the gateway must read could not be read: its body or its session id.",
    "body_too_large": "Its body is larger than the route allows.",
    "request_timeout": "Its body did not arrive in time.",
    "websocket_not_allowed": "It asked for a WebSocket on a route that takes none.",
    "websocket_version": "It asked for another version of the WebSocket protocol than 13.",
    "bad_websocket_handshake": "It asked for a WebSocket, but not as the protocol demands.",
    "store_unavailable": "A store that the gateway must ask did not answer in time, so it was not let through.",
    "credits_unavailable": "The organization's balance was not in Redis, and PostgreSQL could not be asked for it.",
    "shutting_down": "The gateway was shutting down.",
    "client_left": "The client closed its connection before the gateway had decided.",
    "gateway_error": "The gateway failed; its own log says how, under this request id.",
}
_OUTCOMES = {
    Outcome.NEVER_REACHED: "The upstream never saw it",
    Outcome.UPSTREAM_REFUSED: "The upstream answered with an error, or not at all",
    Outcome.COMPLETE: "It was answered in full",
    Outcome.UPSTREAM_BROKE: "The upstream broke off its answer",
    Outcome.CLIENT_LEFT: "The client left before the answer was complete",
    Outcome.CUT: "The gateway cut the answer off",
}
_BASES = {
    "exact": "what it used is known exactly",
    "estimated": "the answer did not say what it used, so the estimate stands",
    "under_estimate": "it used at least this much: the answer ended early",
    "released": "nothing is owed",
}


@dataclass(frozen=True, slots=True)
class Story:
    """One request."""

    request_id: str
    #: `admitted`, or the code it was refused with or failed with.
    decision: str
    status: int
    #: The limit that refused it.
    limit: str | None
    sentences: tuple[str, ...]
    #: What the line cannot tell.
    untold: tuple[str, ...]


def tell(line: Line) -> Story:
    """The request's story."""
    return Story(
        line.request_id,
        "admitted" if line.admitted else line.decision,
        line.status,
        line.limit,
        tuple(_sentences(line)),
        tuple(_untold(line)),
    )


def _sentences(line: Line) -> Iterator[str]:
    yield f"{line.method} {line.path} from {line.client_ip}, answered with {line.status} at {_clock(line.ended_at_us)}."
    if line.route is not None:
        yield f"It took the route {line.route}."
    if line.org is not None:
        yield _who(line)
    if line.overrides:
        values = ", ".join(f"{name} = {value}" for name, value in sorted(line.overrides.items()))
        yield f"The org had values of its own in place of its policy's: {values}."
    yield from map(_limit, line.limits)
    yield from _admitted(line) if line.admitted else _refused(line)
    if line.error is not None:
        yield f"The gateway noted: {line.error}"


def _who(line: Line) -> str:
    who = f"org {line.org}"
    if line.user is not None:
        who = f"user {line.user} of {who}"
    how = f" with {line.key}" if line.key is not None else ""
    policy = f", policy {line.policy}" if line.policy is not None else ""
    said = ""
    if line.stream is not None:
        output = "no maximum" if line.max_output_tokens is None else f"at most {line.max_output_tokens} tokens"
        how_sent = "as a stream, " if line.stream else ""
        said = (
            f" It asked for {line.asked_model or 'no model'}, {output} of output, {how_sent}in {line.body_bytes} bytes."
        )
    return f"It came from {who}{how} ({line.identity}); plan {line.plan}{policy}.{said}"


def _limit(judged: Judged) -> str:
    whose = f" (portion {judged.subject})" if judged.subject else ""
    name = f"Limit {judged.name}{whose}"
    at = (
        f" when Redis judged the denial at {_clock(judged.denied_at_us)} that was remembered"
        if judged.denied_at_us
        else ""
    )
    text = f"{name}: {judged.used} of {judged.limit} were used{at}, and it needed {judged.cost}"
    if judged.retry_ms:
        would = "it would have been refused, were this no shadow" if judged.shadow else "it did not fit"
        return f"{text}: {would}; it would have fitted {judged.retry_ms / 1000:g} s later."
    if judged.cost == 0:
        return f"{text}: its session was counted already."
    text += ": it fitted"
    if judged.warned:
        text += ", and the client was warned"
    if judged.actual is not None and judged.actual != judged.cost:
        text += f"; in the end it took {judged.actual}"
    return f"{text}."


def _refused(line: Line) -> Iterator[str]:
    match line.decision:
        case "rate_limit_exceeded":
            denying = [judged for judged in line.limits if judged.retry_ms and not judged.shadow]
            others = [judged.name for judged in denying if judged.name != line.limit]
            also = f" It did not fit {' and '.join(others)} either." if others else ""
            wait_ms = max((judged.retry_ms for judged in denying), default=0)
            yield f"Refused by limit {line.limit}, until {wait_ms / 1000:g} s later.{also}"
            if any(judged.denied_at_us for judged in denying):
                yield "The gateway remembered this denial and answered without asking Redis again."
        case "request_exceeds_limit":
            yield f"Refused by limit {line.limit}: it needs more than that ever allows at once. Waiting does not help."
        case "insufficient_credits":
            yield "Refused: the organization had too few credits for its price."
        case "credits_in_flight":
            yield "Refused: the organization's credits were held by its requests in flight."
        case code:
            known = _BEFORE.get(code, "It ended before it was admitted.")
            yield f"Refused with {code}: {known}"


def _admitted(line: Line) -> Iterator[str]:
    yield "Admitted." + (f" It was turn {line.turn} of its session." if line.turn is not None else "")
    if line.outcome is not None:
        text = _OUTCOMES[line.outcome]
        if line.input_tokens is not None:
            text += f", {line.input_tokens} tokens in and {line.output_tokens} out"
        yield f"{text}; {_BASES.get(line.basis or '', 'nobody knows what it used')}."
    if line.messages_in is not None:
        yield f"A WebSocket: {line.messages_in} messages of the client's and {line.messages_out} of the upstream's."
    if line.charged_ucredits is not None:
        left = "" if line.available_ucredits is None else f"; {_credits(line.available_ucredits)} were left beside it"
        yield f"It was charged {_credits(line.charged_ucredits)} credits{left}."
    if line.decision not in ("admitted", "client_left"):
        yield f"It ended as {line.decision}."


def _untold(line: Line) -> Iterator[str]:
    if line.route is None:
        yield "which route it was meant for"
    if line.org is None:
        yield "whose it was: it ended before anybody was known"
    elif not line.admitted and not line.limits and line.decision in ("store_unavailable", "client_left"):
        yield "what its limits had used: no answer of Redis's was waited for"
    if line.decision in ("insufficient_credits", "credits_in_flight"):
        yield "the balance, and the price that it was too small for: see `gateway credits ledger`"
    if line.decision == "request_exceeds_limit":
        yield "how much it needed, and of how much: see `gateway explain` with its body"
    if any(judged.denied_at_us for judged in line.limits):
        yield "what its other limits had used: only the remembered denial was looked at"
    if line.admitted and line.limits and line.settled_at_us is None and line.shared_settled_at_us is None:
        yield "when it was settled: the stores took that only after its line was written"
    if line.messages_in:
        yield "how its messages were judged one by one"
    if line.limits:
        yield "the units and windows of its limits: see `gateway check`"


def _clock(at_us: int) -> str:
    return datetime.fromtimestamp(at_us / 1_000_000, UTC).isoformat(" ", "milliseconds").replace("+00:00", "Z")


def _credits(ucredits: int) -> str:
    return f"{ucredits / UCREDITS_PER_CREDIT:.15g}"

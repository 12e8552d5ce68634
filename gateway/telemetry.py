"""What the gateway tells of itself: metric names, the log's form, and the one access-log line of each request.

No secret and no body ever gets here: a Record has no field for one, session ids appear as their digest, and a path
without its query.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, TextIO

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

#: Access lines are written together, at most this much later.
FLUSH_S = 0.05

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(slots=True)
class Record:
    """What became of one request; the walk fills it in as it goes."""

    request_id: str
    method: str
    path: str
    client_ip: str
    started_ns: int = field(default_factory=time.perf_counter_ns)
    hold_id: str | None = None
    route: str | None = None
    org_id: str | None = None
    user_id: str | None = None
    key_id: str | None = None
    plan: str | None = None
    source: str | None = None
    session_digest: str | None = None
    turn: int | None = None
    model: str | None = None
    stream: bool | None = None
    status: int = 0
    #: `admitted`, or the code of the refusal or failure.
    decision: str = "none"
    #: A row of the outcome table, for requests that were admitted.
    outcome: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    charged_ucredits: int | None = None
    basis: str | None = None
    available_ucredits: int | None = None
    #: For a refusal: the limit that denied.
    limit: str | None = None
    response_bytes: int = 0
    error: str | None = None
    #: Milliseconds since the request's head was read, at the end of each phase.
    phases_ms: dict[str, float] = field(default_factory=dict)

    def phase(self, name: str) -> None:
        """The phase `name` ends now."""
        self.phases_ms[name] = (time.perf_counter_ns() - self.started_ns) // 1000 / 1000


class Metrics:
    """Counters of one process. Every label has a bounded set of values: routes, codes and plans are from config."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self.requests = Counter(
            "gateway_requests",
            "Requests answered, by route, status and decision (admitted, or the refusal's code).",
            ("route", "status", "decision"),
            registry=self.registry,
        )
        self.phase_seconds = Histogram(
            "gateway_phase_seconds",
            "Seconds from the request's head to the end of each phase of the walk.",
            ("phase",),
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.outcomes = Counter(
            "gateway_outcomes", "Admitted requests, by how they ended.", ("outcome", "basis"), registry=self.registry
        )
        self.charged = Counter(
            "gateway_charged_ucredits", "Micro-credits charged, by plan.", ("plan",), registry=self.registry
        )
        self.tokens = Counter(
            "gateway_tokens", "Tokens metered, by plan and direction.", ("plan", "direction"), registry=self.registry
        )
        # `labels` takes a lock and builds strings at every call; what it returns never changes.
        self._requests = cache(self.requests.labels)
        self._phase_seconds = cache(self.phase_seconds.labels)
        self._outcomes = cache(self.outcomes.labels)
        self._charged = cache(self.charged.labels)
        self._tokens = cache(self.tokens.labels)

    def watch(self, name: str, help_text: str, read: Callable[[], int], **labels: str) -> None:
        """Each scrape asks `read`. The same name may be watched once for each set of label values."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, help_text, tuple(labels), registry=self.registry)
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def observe(self, record: Record) -> None:
        self._requests(record.route or "none", record.status, record.decision).inc()
        for phase, elapsed_ms in record.phases_ms.items():
            self._phase_seconds(phase).observe(elapsed_ms / 1000)
        if record.outcome is not None:
            self._outcomes(record.outcome, record.basis or "none").inc()
        if record.plan is not None:
            if record.charged_ucredits:
                self._charged(record.plan).inc(record.charged_ucredits)
            if record.input_tokens:
                self._tokens(record.plan, "input").inc(record.input_tokens)
            if record.output_tokens:
                self._tokens(record.plan, "output").inc(record.output_tokens)


class AccessLog:
    """One line per request on `stream`, JSON or, for people, pretty."""

    def __init__(self, stream: TextIO, *, pretty: bool) -> None:
        self._stream = stream
        self._render = _pretty if pretty else _json
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None

    def write(self, record: Record) -> None:
        record.phase("total")
        self._lines.append(self._render(record))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._lines = self._lines, []
        if lines:
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()


_encoder = msgspec.json.Encoder()


def _fields(record: Record) -> dict[str, Any]:
    values: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "event": "request",
        "request_id": record.request_id,
        "hold_id": record.hold_id,
        "method": record.method,
        "path": record.path,
        "route": record.route,
        "status": record.status,
        "decision": record.decision,
        "limit": record.limit,
        "outcome": record.outcome,
        "org": record.org_id,
        "user": record.user_id,
        "key": record.key_id,
        "plan": record.plan,
        "identity": record.source,
        "client_ip": record.client_ip,
        "session": record.session_digest,
        "turn": record.turn,
        "model": record.model,
        "stream": record.stream,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "charged_ucredits": record.charged_ucredits,
        "basis": record.basis,
        "available_ucredits": record.available_ucredits,
        "response_bytes": record.response_bytes,
        "error": record.error,
        "ms": record.phases_ms,
    }
    return {name: value for name, value in values.items() if value is not None}


def _json(record: Record) -> str:
    return _encoder.encode(_fields(record)).decode()


_COLOURS = {2: "\x1b[32m", 3: "\x1b[36m", 4: "\x1b[33m", 5: "\x1b[31m"}


def _pretty(record: Record) -> str:
    colour = _COLOURS.get(record.status // 100, "")
    who = f"{record.org_id}/{record.plan}" if record.org_id else record.client_ip
    notes = [record.decision if record.outcome is None else record.outcome]
    if record.limit:
        notes.append(f"limit={record.limit}")
    if record.turn is not None:
        notes.append(f"turn={record.turn}")
    if record.input_tokens is not None:
        notes.append(f"tokens={record.input_tokens}+{record.output_tokens}")
    if record.charged_ucredits is not None:
        notes.append(f"charged={record.charged_ucredits / 1_000_000:g}")
    if record.available_ucredits is not None:
        notes.append(f"left={record.available_ucredits / 1_000_000:g}")
    if record.error:
        notes.append(record.error)
    clock = datetime.now().strftime("%H:%M:%S")
    return (
        f"{clock} {colour}{record.status}\x1b[0m {record.method} {record.path} {who} "
        f"{' '.join(notes)} \x1b[2m{record.phases_ms['total']:.1f} ms {record.request_id}\x1b[0m"
    )


def wants_pretty(log_format: str, stream: TextIO) -> bool:
    """`auto` is pretty on a terminal, JSON anywhere else."""
    return log_format == "pretty" or (log_format == "auto" and stream.isatty())


def configure_logging(log_format: str, level: str, stream: TextIO = sys.stderr) -> None:
    """structlog writes the gateway's own events to `stream`, in the same form as the access log."""
    renderer: Callable[..., Any] = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty())
        if wants_pretty(log_format, stream)
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )


def access_stream() -> TextIO:
    """Where access lines go: standard output, apart from the gateway's own events."""
    return sys.stdout

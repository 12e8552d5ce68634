"""What the gateway tells of itself: metric names, the log's form, and the one access-log line of each request.

No secret and no body ever gets here: a Record has no field for one, session ids appear as their digest, and a path
without its query.
"""

import asyncio
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, TextIO

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

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
    policy: str | None = None
    source: str | None = None
    session_digest: str | None = None
    turn: int | None = None
    #: Its record was there when the request was judged; None where no limit counts sessions.
    session_known: bool | None = None
    #: What the answer said, else what the request asked for.
    model: str | None = None
    #: What the request asked for, where the answer said something else; empty: nothing.
    requested_model: str | None = None
    stream: bool | None = None
    #: Fields and claims that some limit depends on, as far as the request has them.
    headers: dict[str, str] | None = None
    claims: Mapping[str, str] | None = None
    #: What the org had instead of its policy's limits, by name.
    overrides: Mapping[str, int] | None = None
    #: The size of the body, where it was known when the request was judged; of one that was read (`stream` is not None)
    #: the largest of its max-token fields.
    body_bytes: int | None = None
    max_output_tokens: int | None = None
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
    #: Every limit that was judged: name, cost, used before, limit; and `retry_ms` where it did not fit, `shadow`,
    #: `warned`, `subject`, `actual` once it was settled; `denied_at_us` where the denial was remembered.
    limits: list[dict[str, Any]] = field(default_factory=list)
    #: Redis's time of the admission or refusal, and of the settlement, in us since 1970; and of the limits that no org
    #: owns, which are asked first. Of a remembered denial it is reckoned.
    judged_at_us: int | None = None
    settled_at_us: int | None = None
    shared_judged_at_us: int | None = None
    shared_settled_at_us: int | None = None
    #: `redis`, or `local` while Redis is away and this process counts its share by itself.
    judged_by: str = "redis"
    #: What the hold came to in the end, for a price by the token.
    held_ucredits: int | None = None
    #: The maximum that the request's body was changed to name.
    max_tokens_set: int | None = None
    response_bytes: int = 0
    #: Of a WebSocket: what passed, the code of the first close frame, and why the gateway ended it, if it did.
    messages_in: int | None = None
    messages_out: int | None = None
    request_bytes: int | None = None
    close_code: int | None = None
    closed_for: str | None = None
    error: str | None = None
    #: Milliseconds since the request's head was read, at the end of each phase.
    phases_ms: dict[str, float] = field(default_factory=dict)

    def phase(self, name: str) -> None:
        """The phase `name` ends now."""
        self.phases_ms[name] = (time.perf_counter_ns() - self.started_ns) // 1000 / 1000


class Metrics(Collector):
    """Counters of one process. Every label has a bounded set of values: routes, codes and plans are from config.

    Requests are tallied here and become samples when somebody scrapes: prometheus_client's own counters take a lock and
    several calls for each of the dozen that one request moves.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._charged_ucredits: Counter[str] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._limits: Counter[tuple[str, str]] = Counter()
        self._judged_locally: Counter[str] = Counter()
        self._phases: dict[str, _Distribution] = {}
        self.registry.register(self)

    def watch(self, name: str, help_text: str, read: Callable[[], int], **labels: str) -> None:
        """Each scrape asks `read`. The same name may be watched once for each set of label values."""
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, help_text, tuple(labels), registry=self.registry)
        (gauge.labels(**labels) if labels else gauge).set_function(read)

    def refused(self, status: int) -> None:
        """A request was refused before its head could be read, or its client let in."""
        self._requests["none", str(status), "refused_unread"] += 1

    def observe(self, record: Record) -> None:
        self._requests[record.route or "none", str(record.status), record.decision] += 1
        for phase, elapsed_ms in record.phases_ms.items():
            distribution = self._phases.get(phase)
            if distribution is None:
                distribution = self._phases[phase] = _Distribution()
            distribution.add(elapsed_ms / 1000)
        for judged in record.limits:
            if "retry_ms" in judged:
                self._limits[judged["name"], "would_refuse" if "shadow" in judged else "refused"] += 1
            elif "warned" in judged:
                self._limits[judged["name"], "warned"] += 1
        if record.judged_by == "local":
            self._judged_locally["admitted" if record.outcome is not None else "refused"] += 1
        if record.outcome is not None:
            self._outcomes[record.outcome, record.basis or "none"] += 1
        if record.plan is not None:
            if record.charged_ucredits:
                self._charged_ucredits[record.plan] += record.charged_ucredits
            if record.input_tokens:
                self._tokens[record.plan, "input"] += record.input_tokens
            if record.output_tokens:
                self._tokens[record.plan, "output"] += record.output_tokens

    def collect(self) -> Iterator[Metric]:
        """The tallies as of now. Called by the registry."""
        requests = CounterMetricFamily(
            "gateway_requests",
            "Requests answered, by route, status and decision (admitted, or the refusal's code).",
            labels=("route", "status", "decision"),
        )
        outcomes = CounterMetricFamily(
            "gateway_outcomes", "Admitted requests, by how they ended.", labels=("outcome", "basis")
        )
        charged = CounterMetricFamily("gateway_charged_ucredits", "Micro-credits charged, by plan.", labels=("plan",))
        limits = CounterMetricFamily(
            "gateway_limit_verdicts",
            "Limits that did not fit, would not have if they were no shadows, or were nearly used up.",
            labels=("limit", "verdict"),
        )
        local = CounterMetricFamily(
            "gateway_limits_judged_locally",
            "Requests whose limits this process judged by itself, because Redis was away.",
            labels=("verdict",),
        )
        tokens = CounterMetricFamily(
            "gateway_tokens", "Tokens metered, by plan and direction.", labels=("plan", "direction")
        )
        for labels, count in self._requests.items():
            requests.add_metric(labels, count)
        for ending, count in self._outcomes.items():
            outcomes.add_metric(ending, count)
        for plan, ucredits in self._charged_ucredits.items():
            charged.add_metric((plan,), ucredits)
        for direction, count in self._tokens.items():
            tokens.add_metric(direction, count)
        for judgement, count in self._judged_locally.items():
            local.add_metric((judgement,), count)
        for verdict, count in self._limits.items():
            limits.add_metric(verdict, count)
        phases = HistogramMetricFamily(
            "gateway_phase_seconds",
            "Seconds from the request's head to the end of each phase of the walk.",
            labels=("phase",),
        )
        for phase, distribution in self._phases.items():
            phases.add_metric((phase,), distribution.buckets(), distribution.sum_s)
        yield from (requests, phases, outcomes, charged, tokens, limits, local)


class _Distribution:
    """How many values fell into each of LATENCY_BUCKETS_S and beyond."""

    __slots__ = ("_counts", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, value_s: float) -> None:
        self._counts[bisect_left(LATENCY_BUCKETS_S, value_s)] += 1
        self.sum_s += value_s

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and number of values up to it, as Prometheus has them."""
        bounds = (*(str(float(bound)) for bound in LATENCY_BUCKETS_S), "+Inf")
        return list(zip(bounds, accumulate(self._counts), strict=True))


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
        "at": datetime.now(UTC),
        "event": "request",
        "request_id": record.request_id,
        "hold_id": record.hold_id,
        "method": record.method,
        "path": record.path,
        "route": record.route,
        "status": record.status,
        "decision": record.decision,
        "limit": record.limit,
        "limits": record.limits or None,
        "judged_at_us": record.judged_at_us,
        "settled_at_us": record.settled_at_us,
        "shared_judged_at_us": record.shared_judged_at_us,
        "shared_settled_at_us": record.shared_settled_at_us,
        "judged_by": record.judged_by if record.judged_by != "redis" else None,
        "outcome": record.outcome,
        "org": record.org_id,
        "user": record.user_id,
        "key": record.key_id,
        "plan": record.plan,
        "policy": record.policy,
        "identity": record.source,
        "client_ip": record.client_ip,
        "session": record.session_digest,
        "turn": record.turn,
        "session_known": record.session_known,
        "headers": record.headers or None,
        "claims": record.claims or None,
        "overrides": record.overrides or None,
        "model": record.model,
        "requested_model": record.requested_model,
        "stream": record.stream,
        "body_bytes": record.body_bytes,
        "max_output_tokens": record.max_output_tokens,
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "charged_ucredits": record.charged_ucredits,
        "basis": record.basis,
        "held_ucredits": record.held_ucredits,
        "max_tokens_set": record.max_tokens_set,
        "available_ucredits": record.available_ucredits,
        "response_bytes": record.response_bytes,
        "request_bytes": record.request_bytes,
        "messages_in": record.messages_in,
        "messages_out": record.messages_out,
        "close_code": record.close_code,
        "closed_for": record.closed_for,
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

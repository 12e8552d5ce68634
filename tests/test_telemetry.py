"""What is counted adds up, and a scrape reads like one of prometheus_client's own counters."""

import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime

import prometheus_client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry import LATENCY_BUCKETS_S, AccessLog, Metrics, Record

Sample = tuple[str, frozenset[tuple[str, str]]]


def record(**known: object) -> Record:
    made = Record("id", "POST", "/v1/chat", "192.0.2.1")
    for name, value in known.items():
        setattr(made, name, value)
    return made


def scraped(registry: prometheus_client.CollectorRegistry) -> dict[Sample, float]:
    families = text_string_to_metric_families(prometheus_client.generate_latest(registry).decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def of(records: Iterable[Record]) -> dict[Sample, float]:
    metrics = Metrics()
    for one in records:
        metrics.observe(one)
    return scraped(metrics.registry)


@given(st.lists(st.floats(0, 200_000) | st.sampled_from(LATENCY_BUCKETS_S).map(lambda bound_s: bound_s * 1000)))
def test_phases_fall_into_the_buckets_that_a_histogram_of_the_library_has(elapsed_ms: list[float]) -> None:
    registry = prometheus_client.CollectorRegistry()
    histogram = prometheus_client.Histogram(
        "gateway_phase_seconds", "", ("phase",), buckets=LATENCY_BUCKETS_S, registry=registry
    )
    for elapsed in elapsed_ms:
        histogram.labels("admit").observe(elapsed / 1000)
    found = of(record(phases_ms={"admit": elapsed}) for elapsed in elapsed_ms)
    assert {sample: value for sample, value in found.items() if "phase_seconds" in sample[0]} == scraped(registry)


def test_what_requests_cost_and_how_they_ended_is_added_up() -> None:
    paid = {"plan": "pro", "outcome": "complete", "basis": "exact", "charged_ucredits": 5, "decision": "admitted"}
    found = of(
        (
            record(route="/v1/chat", status=200, input_tokens=7, output_tokens=3, **paid),
            record(route="/v1/chat", status=200, input_tokens=1, output_tokens=0, **paid),
            record(status=404, decision="unknown_route"),
        )
    )
    assert found == {
        ("gateway_requests_total", frozenset({("route", "/v1/chat"), ("status", "200"), ("decision", "admitted")})): 2,
        ("gateway_requests_total", frozenset({("route", "none"), ("status", "404"), ("decision", "unknown_route")})): 1,
        ("gateway_outcomes_total", frozenset({("outcome", "complete"), ("basis", "exact")})): 2,
        ("gateway_charged_ucredits_total", frozenset({("plan", "pro")})): 10,
        ("gateway_tokens_total", frozenset({("plan", "pro"), ("direction", "input")})): 8,
        ("gateway_tokens_total", frozenset({("plan", "pro"), ("direction", "output")})): 3,
    }


def test_every_metric_is_named_before_the_first_request() -> None:
    families = text_string_to_metric_families(prometheus_client.generate_latest(Metrics().registry).decode())
    assert {(family.name, family.type) for family in families} == {
        ("gateway_requests", "counter"),
        ("gateway_phase_seconds", "histogram"),
        ("gateway_outcomes", "counter"),
        ("gateway_charged_ucredits", "counter"),
        ("gateway_tokens", "counter"),
        ("gateway_limit_verdicts", "counter"),
        ("gateway_limits_judged_locally", "counter"),
    }


def test_verdicts_of_limits_are_counted_by_name() -> None:
    metrics = Metrics()
    judged = [
        {"name": "rpm", "cost": 1, "used": 9, "limit": 10, "warned": True},
        {"name": "tpm", "cost": 5, "used": 9, "limit": 10, "retry_ms": 70},
        {"name": "tried", "cost": 1, "used": 1, "limit": 1, "retry_ms": 70, "shadow": True},
        {"name": "quiet", "cost": 1, "used": 0, "limit": 10},
    ]
    metrics.observe(record(limits=judged))
    families = text_string_to_metric_families(prometheus_client.generate_latest(metrics.registry).decode())
    counted = {
        (sample.labels["limit"], sample.labels["verdict"]): sample.value
        for family in families
        if family.name == "gateway_limit_verdicts"
        for sample in family.samples
    }
    assert counted == {("rpm", "warned"): 1, ("tpm", "refused"): 1, ("tried", "would_refuse"): 1}


async def test_an_access_line_says_when_the_request_ended() -> None:
    lines = io.StringIO()
    access_log = AccessLog(lines, pretty=False)
    before = datetime.now(UTC)
    access_log.write(record(status=200))
    after = datetime.now(UTC)
    access_log.flush()
    line = json.loads(lines.getvalue())
    assert before <= datetime.fromisoformat(line["at"]) <= after

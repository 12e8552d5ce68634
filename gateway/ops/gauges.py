"""What each scrape asks of the running rooms: queues, connections, backlogs. Nothing here is counted twice."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter

from gateway.admission import Admission, Settling
from gateway.floodgate import Floodgate
from gateway.ledger import Outbox, Sweeper
from gateway.overrides import Overrides
from gateway.telemetry import Metrics
from gateway.upstream import Upstreams, UpstreamStats


def watch_gauges(
    metrics: Metrics,
    *,
    admission: Admission,
    settling: Settling,
    outbox: Outbox,
    sweeper: Sweeper,
    upstreams: Upstreams,
    floodgate: Floodgate,
    overrides: Overrides,
) -> None:
    """Every scrape of `metrics` shows these rooms as they are at that moment."""
    watch = metrics.watch
    watch("gateway_open_requests", "Requests that hold something now.", lambda: admission.open_count)
    watch("gateway_settle_backlog", "Settles no store could take yet.", lambda: settling.backlog_count)
    watch("gateway_outbox_posted", "Ledger entries posted by this process.", lambda: outbox.posted_count)
    watch("gateway_holds_swept", "Holds of lost gateways ended.", lambda: sweeper.swept_count)
    text = "Client networks whose failures are remembered."
    watch("gateway_unauthenticated_networks", text, lambda: floodgate.networks_count)
    watch("gateway_limit_overrides", "Limits that apply to one org only.", lambda: overrides.count)
    for name in upstreams.stats():
        _watch_upstream(metrics, upstreams, name)


def _watch_upstream(metrics: Metrics, upstreams: Upstreams, name: str) -> None:
    watch, stats = metrics.watch, upstreams.stats

    def figure(read: Callable[[UpstreamStats], int]) -> Callable[[], int]:
        return lambda: read(stats()[name])

    text = "Connections to an upstream, and requests that wait for one."
    for state in ("idle", "in_use", "waiting"):
        watch("gateway_upstream_connections", text, figure(attrgetter(state)), upstream=name, state=state)
    text = "Requests on their way to an upstream, and requests in line for it."
    for state in ("in_flight", "queued"):
        watch("gateway_upstream_requests", text, figure(attrgetter(state)), upstream=name, state=state)
    for number, target in enumerate(stats()[name].targets):
        labels = {"upstream": name, "target": target.origin}
        text = "1 for a target that is given requests, 0 for one that is left alone."
        watch("gateway_upstream_target_healthy", text, figure(partial(_is_healthy, number)), **labels)
        watch("gateway_upstream_target_requests", "Requests at a target.", figure(partial(_at, number)), **labels)


def _is_healthy(target_number: int, stats: UpstreamStats) -> int:
    return stats.targets[target_number].state == "healthy"


def _at(target_number: int, stats: UpstreamStats) -> int:
    return stats.targets[target_number].in_flight

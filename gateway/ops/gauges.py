"""What each scrape asks of the running rooms: queues, connections, backlogs. Nothing here is counted twice."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Protocol

from gateway.admission import Admission, Settling
from gateway.floodgate import Floodgate
from gateway.idempotency import Idempotency
from gateway.journal import Journal
from gateway.ledger import Accounts, Losses, Outbox, PostgresHolds, Sweeper
from gateway.overrides import Overrides
from gateway.telemetry import Metrics
from gateway.upstream import Upstreams, UpstreamStats


class MoneyRooms(Protocol):
    """The rooms that handle credits, as money.py has wired them."""

    admission: Admission
    settling: Settling
    accounts: Accounts
    outbox: Outbox
    sweeper: Sweeper
    losses: Losses
    holds: PostgresHolds
    idempotency: Idempotency
    journal: Journal | None


def watch_gauges(
    metrics: Metrics,
    *,
    rooms: MoneyRooms,
    upstreams: Upstreams,
    floodgate: Floodgate,
    overrides: Overrides,
) -> None:
    """Every scrape of `metrics` shows these rooms as they are at that moment."""
    watch = metrics.watch
    _watch_money(metrics, rooms)
    text = "Client networks whose failures are remembered."
    watch("gateway_unauthenticated_networks", text, lambda: floodgate.networks_count)
    watch("gateway_limit_overrides", "Limits that apply to one org only.", lambda: overrides.count)
    for name in upstreams.stats():
        _watch_upstream(metrics, upstreams, name)


def _watch_money(metrics: Metrics, rooms: MoneyRooms) -> None:
    watch = metrics.watch
    watch("gateway_open_requests", "Requests that hold something now.", lambda: rooms.admission.open_count)
    watch("gateway_settle_backlog", "Settles no store could take yet.", lambda: rooms.settling.backlog_count)
    text = "Charges that Redis was told and PostgreSQL may not have yet."
    watch("gateway_unconfirmed_charges", text, lambda: rooms.settling.unconfirmed_count)
    watch("gateway_outbox_posted", "Ledger entries posted by this process.", lambda: rooms.outbox.posted_count)
    watch("gateway_holds_swept", "Holds of lost gateways ended.", lambda: rooms.sweeper.swept_count)
    watch("gateway_postgres_holds", "Holds taken in PostgreSQL by this process.", lambda: rooms.holds.taken_count)
    text = "Times that PostgreSQL was asked to let Redis owe more."
    watch("gateway_cap_raises", text, lambda: rooms.accounts.raised_count)
    text = "Orgs whose state Redis lost and of which this process has not told all it knows."
    watch("gateway_lost_orgs", text, lambda: rooms.losses.waiting_count)
    watch("gateway_losses_told", "Losses of an org of which this process told all.", lambda: rooms.losses.told_count)
    watch("gateway_processes", "Gateway processes that live.", lambda: rooms.losses.instances_count)
    text = "Ends of requests under an Idempotency-Key that PostgreSQL was not told of yet."
    watch("gateway_untold_ends", text, lambda: rooms.idempotency.kept_count)
    if (journal := rooms.journal) is not None:
        text = "Open holds and unconfirmed charges in the journal of this process."
        watch("gateway_journal_lines", text, lambda: journal.needed_count)
        watch("gateway_journal_segments", "Files that the journal consists of.", lambda: journal.segments_count)


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

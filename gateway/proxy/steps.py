"""What the walk is given: the rooms, opened and wired by `app.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.admission import Admission
from gateway.config import RouteTable
from gateway.headers import Network
from gateway.identity import Identity
from gateway.policy import PolicySet
from gateway.session import Sessions
from gateway.telemetry import AccessLog, Metrics
from gateway.upstream import Upstreams


@dataclass(frozen=True, slots=True)
class Steps:
    """One set for all requests of a process."""

    routes: RouteTable
    identity: Identity
    policies: PolicySet
    admission: Admission
    sessions: Sessions
    upstreams: Upstreams
    metrics: Metrics
    access_log: AccessLog
    trusted_proxies: Sequence[Network]
    client_idle_ms: int
    #: The gateway's name in `Via`; None adds no such field.
    via: str | None

"""What the walk is given: the rooms, opened and wired by `app.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.admission import Admission
from gateway.config import Credits, RouteTable
from gateway.floodgate import Floodgate
from gateway.headers import Network
from gateway.idempotency import Idempotency
from gateway.identity import Identity
from gateway.overrides import Overrides
from gateway.policy import PolicySet
from gateway.session import Sessions
from gateway.telemetry import AccessLog, Metrics
from gateway.upstream import Upstreams


@dataclass(frozen=True, slots=True)
class Steps:
    """One set for all requests of a process."""

    routes: RouteTable
    floodgate: Floodgate
    identity: Identity
    policies: PolicySet
    credits: Credits
    overrides: Overrides
    admission: Admission
    sessions: Sessions
    upstreams: Upstreams
    metrics: Metrics
    access_log: AccessLog
    trusted_proxies: Sequence[Network]
    #: Fields, in lower case, that some limit depends on: `policy.headers_needed`.
    noted_headers: frozenset[bytes]
    client_idle_ms: int
    #: The gateway's name in `Via`; None adds no such field.
    via: str | None
    #: Answers and refusals say what is left of the limits.
    limit_headers: bool
    #: For the routes that take an Idempotency-Key.
    idempotency: Idempotency

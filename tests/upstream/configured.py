"""What `Upstreams` reads of a configuration, with values that suit a test."""

from dataclasses import dataclass
from typing import Literal

from gateway.upstream import Timeouts


@dataclass(frozen=True)
class Ejection:
    failures: int = 3
    backoff_ms: int = 1_000
    backoff_max_ms: int = 30_000


@dataclass(frozen=True)
class HealthCheck:
    path: str = "/health"
    interval_ms: int = 10
    timeout_ms: int = 1_000
    failures: int = 2


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...]
    timeouts: Timeouts = Timeouts()
    host: Literal["target", "client"] = "target"
    connections_max: int = 8
    requests_max: int | None = None
    queue_max: int = 1_024
    queue_timeout_ms: int = 2_000
    ejection: Ejection = Ejection()
    health_check: HealthCheck | None = None
    keepalive_ms: int = 4_000
    tls_verify: bool = True
    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s

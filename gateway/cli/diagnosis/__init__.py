"""What `gateway doctor` looks at: one module per neighbour of the gateway, each an examination that yields findings."""

from gateway.cli.diagnosis.configuration import examine_configuration
from gateway.cli.diagnosis.finding import Finding, Status, collect
from gateway.cli.diagnosis.postgres import examine_postgres
from gateway.cli.diagnosis.redis import examine_redis
from gateway.cli.diagnosis.upstreams import examine_jwks, examine_targets

__all__ = [
    "Finding",
    "Status",
    "collect",
    "examine_configuration",
    "examine_jwks",
    "examine_postgres",
    "examine_redis",
    "examine_targets",
]

"""Room: the upstream side. Forwards a request and relays the answer as it comes; knows nothing of who asks or pays."""

from gateway.upstream.forward import Answer, Forwarding
from gateway.upstream.relayed import Tunnel
from gateway.upstream.targets import UpstreamConfig
from gateway.upstream.timeouts import Timeouts
from gateway.upstream.tls import tls_context
from gateway.upstream.transport import Stats, Transport
from gateway.upstream.upstreams import TargetStats, Upstreams, UpstreamStats

__all__ = [
    "Answer",
    "Forwarding",
    "Stats",
    "TargetStats",
    "Timeouts",
    "Transport",
    "Tunnel",
    "UpstreamConfig",
    "UpstreamStats",
    "Upstreams",
    "tls_context",
]

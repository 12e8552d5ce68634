"""Room: the upstream side. Forwards a request and relays the answer as it comes; knows nothing of who asks or pays."""

from gateway.upstream.forward import Answer, Forwarding, Upstreams
from gateway.upstream.targets import UpstreamConfig
from gateway.upstream.timeouts import Timeouts
from gateway.upstream.transport import Stats, Transport, tls_context

__all__ = [
    "Answer",
    "Forwarding",
    "Stats",
    "Timeouts",
    "Transport",
    "UpstreamConfig",
    "Upstreams",
    "tls_context",
]

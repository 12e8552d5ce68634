"""What crosses the gateway in each direction and why, and what is said about the client. Pure."""

from gateway.headers.crossing import Field, to_client, to_upstream, trailers
from gateway.headers.forwarded import forwarded, via
from gateway.headers.names import ATTACHED, END_TO_END, FORWARDED, HOP_BY_HOP, NOT_IN_TRAILERS
from gateway.headers.networks import HOPS_MAX, Network, client_ip, is_trusted, network_of

__all__ = [
    "ATTACHED",
    "END_TO_END",
    "FORWARDED",
    "HOPS_MAX",
    "HOP_BY_HOP",
    "NOT_IN_TRAILERS",
    "Field",
    "Network",
    "client_ip",
    "forwarded",
    "is_trusted",
    "network_of",
    "to_client",
    "to_upstream",
    "trailers",
    "via",
]

"""Room: the client's side. Reads what clients send, writes what they get, and notices when they leave."""

from gateway.downstream.client import HIGH_WATER_BYTES, Client, Patience, Receive, Send, too_large
from gateway.downstream.connection import Bounds, connection_type
from gateway.downstream.facts import fresh_id, read_facts
from gateway.downstream.head import EXTENSION, Head
from gateway.downstream.request import HEAD_BYTES_MAX

__all__ = [
    "EXTENSION",
    "HEAD_BYTES_MAX",
    "HIGH_WATER_BYTES",
    "Bounds",
    "Client",
    "Head",
    "Patience",
    "Receive",
    "Send",
    "connection_type",
    "fresh_id",
    "read_facts",
    "too_large",
]

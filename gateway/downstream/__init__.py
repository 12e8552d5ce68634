"""Room: the client's side. Reads what clients send, writes what they get, and notices when they leave."""

from gateway.downstream.client import HIGH_WATER_BYTES, Client, Patience, Receive, Send, too_large
from gateway.downstream.facts import fresh_id, read_facts
from gateway.downstream.head import EXTENSION, Head

__all__ = [
    "EXTENSION",
    "HIGH_WATER_BYTES",
    "Client",
    "Head",
    "Patience",
    "Receive",
    "Send",
    "fresh_id",
    "read_facts",
    "too_large",
]

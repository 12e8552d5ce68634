"""Room: a WebSocket between its two ends. The ends agree on everything themselves, and the bytes of their frames pass
as they are; here it is checked that both mean it, bounded, counted, and brought to an end.

Does not own the connections, who may ask, nor what anything costs: the walk hands those in.
"""

from gateway.websocket.handshake import PROTOCOL, is_handshake, proven, refused
from gateway.websocket.relay import Ended, Relay
from gateway.websocket.way import AdmitMessage, Message, Side

__all__ = [
    "PROTOCOL",
    "AdmitMessage",
    "Ended",
    "Message",
    "Relay",
    "Side",
    "is_handshake",
    "proven",
    "refused",
]

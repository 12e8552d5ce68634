"""Who is at the other end: addresses, the networks they lie in, and the client behind trusted proxies. Pure.

A dual-stack socket reports an IPv4 peer as `::ffff:10.0.0.1`, while networks are written as `10.0.0.0/8`, and either
may be written either way: both spellings mean the same host here (RFC 4291 §2.5.5.2).
"""

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from gateway.types import HeaderList

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

#: The most hops of X-Forwarded-For that are looked at.
HOPS_MAX = 32

_MAPPED_PREFIX_BITS = 96
_MAPPED = 0xFFFF << 32
#: What stands before an IPv4 address written as an IPv6 one: mapped, or translated (RFC 6052 §2.1), where a whole
#: Internet of IPv4 clients would otherwise look like one network.
_IPV4_INSIDE = (_MAPPED.to_bytes(16)[:12], bytes.fromhex("0064ff9b0000000000000000"))
_IPV6_NETWORK_BYTES = 8


def is_trusted(peer_ip: str, networks: Sequence[Network]) -> bool:
    """Whether the socket's peer lies in `networks`; text that is no address lies in none."""
    if not networks:
        return False
    peer = _address(peer_ip)
    return peer is not None and _within(peer, networks)


def client_ip(peer_ip: str, headers: HeaderList, trusted_networks: Sequence[Network]) -> str:
    """The client's address: the rightmost hop of X-Forwarded-For that is not a trusted proxy.

    Read from the right, because every hop to the left of an untrusted one is that one's invention. A malformed hop,
    or the HOPS_MAX-th, ends the reading at the last hop that was good. IPv4-mapped IPv6 becomes IPv4; a peer_ip that
    is no IP address is returned as it is.
    """
    if not trusted_networks and ":" not in peer_ip:
        return peer_ip  # the usual case of a gateway at the edge; nothing to read, nothing to normalise
    client = _address(peer_ip)
    if client is None:
        return peer_ip
    if _within(client, trusted_networks):
        lines = [value for name, value in headers if name == b"x-forwarded-for"]
        # Split from the right only: what is beyond the bound is not even cut.
        hops = b",".join(lines).rsplit(b",", HOPS_MAX)[-HOPS_MAX:] if lines else []
        for hop in reversed(hops):
            address = _hop_address(hop)
            if address is None:
                break
            client = address
            if not _within(client, trusted_networks):
                break
    return str(client)


def network_of(client_ip: str) -> bytes:
    """What one client can be expected to have for itself: 4 bytes, its IPv4 address, or 8, its IPv6 /64.

    Within a /64 a single host takes whatever address it likes (RFC 8981), so nothing narrower holds it. An IPv4 address
    inside an IPv6 one is itself; a zone (RFC 4007) is nothing. b"" for what is no address: the peer of a Unix socket.
    """
    # Not ip_address: a tenth of its cost, and this is for requests in a flood.
    try:
        if ":" not in client_ip:
            return socket.inet_pton(socket.AF_INET, client_ip)
        address = socket.inet_pton(socket.AF_INET6, client_ip.partition("%")[0])
    except (OSError, ValueError):
        return b""
    return address[12:] if address.startswith(_IPV4_INSIDE) else address[:_IPV6_NETWORK_BYTES]


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(_contains(network, address) for network in networks)


def _contains(network: Network, address: Address) -> bool:
    if isinstance(address, IPv4Address) and isinstance(network, IPv6Network):
        # Short prefixes are IPv6's own: `::/0` means every host that speaks it, not every host.
        return network.prefixlen >= _MAPPED_PREFIX_BITS and IPv6Address(_MAPPED | int(address)) in network
    return address in network


def _hop_address(hop: bytes) -> Address | None:
    """One element of X-Forwarded-For: an address, with a port or brackets as some proxies write it."""
    text = hop.strip(b" \t").decode("latin-1")
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port)):
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not _is_port(":" + port):
            return None
    # A zone (RFC 4007) is free text with a meaning on one machine only: no address of a client.
    return None if "%" in text else _address(text)


def _is_port(text: str) -> bool:
    return text[:1] == ":" and text[1:].isascii() and text[1:].isdigit() and len(text) <= 6


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address

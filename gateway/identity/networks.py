"""Whether an address lies in one of some networks. Pure.

A dual-stack socket reports an IPv4 peer as `::ffff:10.0.0.1`, while networks are written as `10.0.0.0/8`: both
spellings mean the same host here (RFC 4291 §2.5.5.2).
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address

_MAPPED_PREFIX_BITS = 96


class Networks:
    """An immutable set of networks; `"10.0.0.1" in networks`. Text that is not an address lies in none."""

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[IPv4Network | IPv6Network]) -> None:
        plain = [_unmapped(network) for network in networks]
        self._v4 = tuple(network for network in plain if isinstance(network, IPv4Network))
        self._v6 = tuple(network for network in plain if isinstance(network, IPv6Network))

    def __contains__(self, address: str) -> bool:
        try:
            host = ip_address(address)
        except ValueError:
            return False
        if not isinstance(host, IPv4Address):
            if host.ipv4_mapped is None:
                return any(host in network for network in self._v6)
            host = host.ipv4_mapped
        return any(host in network for network in self._v4)


def _unmapped(network: IPv4Network | IPv6Network) -> IPv4Network | IPv6Network:
    if isinstance(network, IPv4Network) or network.prefixlen < _MAPPED_PREFIX_BITS:
        return network
    mapped = network.network_address.ipv4_mapped
    return network if mapped is None else IPv4Network((mapped, network.prefixlen - _MAPPED_PREFIX_BITS))

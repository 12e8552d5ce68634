"""Which peers lie in the listed networks, in either spelling."""

from ipaddress import ip_network

import pytest

from gateway.headers import is_trusted


@pytest.mark.parametrize(
    ("network", "address", "inside"),
    [
        ("10.0.0.0/8", "10.255.255.255", True),
        ("10.0.0.0/8", "11.0.0.0", False),
        ("10.0.0.0/8", "::ffff:10.1.2.3", True),
        ("10.0.0.0/8", "::ffff:a01:203", True),
        ("10.0.0.0/8", "::ffff:11.1.2.3", False),
        ("10.0.0.0/8", "::10.1.2.3", False),
        ("10.0.0.0/8", "64:ff9b::10.1.2.3", False),
        ("::ffff:10.0.0.0/104", "10.1.2.3", True),
        ("::ffff:10.0.0.0/104", "::ffff:10.1.2.3", True),
        ("::ffff:10.0.0.0/104", "11.1.2.3", False),
        ("2001:db8::/32", "2001:db8:1::1", True),
        ("2001:db8::/32", "2001:db9::1", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("::/0", "2001:db8::1", True),
        ("0.0.0.0/0", "2001:db8::1", False),
        ("127.0.0.1/32", "127.0.0.1", True),
        ("10.0.0.0/8", "", False),
        ("10.0.0.0/8", "10.0.0.1:443", False),
        ("10.0.0.0/8", "010.0.0.1", False),
        ("10.0.0.0/8", "localhost", False),
    ],
)
def test_an_address_is_inside_or_not(network: str, address: str, inside: bool) -> None:
    assert is_trusted(address, (ip_network(network),)) is inside


def test_one_of_several_networks_is_enough() -> None:
    networks = (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
    assert is_trusted("10.1.1.1", networks) and is_trusted("2001:db8::1", networks)
    assert not is_trusted("192.0.2.1", networks)


def test_no_networks_hold_nobody() -> None:
    assert not is_trusted("127.0.0.1", ())
    assert not is_trusted("::1", ())

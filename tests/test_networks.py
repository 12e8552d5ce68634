"""Which peers lie in the listed networks, in either spelling, and which network a client is counted in."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.headers import is_trusted, network_of


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


@pytest.mark.parametrize(
    "same",
    [
        ["203.0.113.9", "::ffff:203.0.113.9", "::ffff:cb00:7109", "::FFFF:203.0.113.9%eth0", "64:ff9b::203.0.113.9"],
        ["2001:db8::1", "2001:db8::", "2001:db8:0:0:ffff:ffff:ffff:ffff", "2001:DB8::1"],
        ["2001:db8:0:1::", "2001:db8:0:1::1"],
        ["fe80::1%eth0", "fe80::2%eth1", "fe80::3"],
        ["::1", "::2", "::203.0.113.9"],
        ["64:ff9b:1::203.0.113.9", "64:ff9b:1::198.51.100.1"],
        ["::fffe:203.0.113.9", "::fffe:198.51.100.1", "::1"],
        ["0.0.0.0"],
        ["203.0.113.8"],
    ],
)
def test_addresses_of_one_network_are_one_and_others_are_not(same: list[str]) -> None:
    assert len({network_of(address) for address in same}) == 1
    assert len(network_of(same[0])) == (8 if ":" in same[0] else 4)
    others = {"203.0.113.9", "203.0.113.10", "2001:db8:0:2::", "2001:db9::1", "febf::1"} - set(same)
    assert network_of(same[0]) not in {network_of(other) for other in others}


NO_ADDRESS = (
    *("", "testclient", "/run/gateway.sock", "203.0.113", "203.0.113.9.", "203.0.113.9:443", "203.0.113.09"),
    *("203.0.113.256", " 203.0.113.9", "203.0.113.9\n", "203.0.113.9\0", "203.0.113.9%eth0", "0x7f.1", "\uff11.2.3.4"),
    *(
        "[::1]",
        ":",
        ":::",
        "%eth0",
        "2001:db8::g",
        "2001:db8::1/64",
        "1:2:3:4:5:6:7",
        "::1\0",
        "é",
        "\udcff",
        "a" * 9_999,
    ),
)


@pytest.mark.parametrize("text", NO_ADDRESS)
def test_what_is_no_address_has_no_network(text: str) -> None:
    assert network_of(text) == b""


addresses = st.ip_addresses() | st.sampled_from(
    ["::ffff:0:0/96", "64:ff9b::/96", "64:ff9b::/64", "2001:db8::/56"]
).flatmap(lambda network: st.ip_addresses(network=network))


@given(addresses)
def test_every_spelling_of_an_address_has_the_network_that_the_standard_library_says(
    address: IPv4Address | IPv6Address,
) -> None:
    expected = address.packed
    if address in ip_network("::ffff:0:0/96") or address in ip_network("64:ff9b::/96"):
        expected = expected[12:]
    spellings = {str(address), address.exploded, str(address).upper()}
    assert {network_of(spelling) for spelling in spellings} == {expected if len(expected) == 4 else expected[:8]}


@given(st.text(max_size=40) | st.text("0123456789abcdef:.%", max_size=40))
def test_text_has_a_network_exactly_when_it_is_an_address(text: str) -> None:
    try:
        ip_address(text.partition("%")[0] if ":" in text else text)
    except ValueError:
        assert network_of(text) == b""
    else:
        assert network_of(text)

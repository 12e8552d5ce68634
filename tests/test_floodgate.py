"""The limiter in front of identity: exact against a bucket of fractions, honest, and bounded whoever comes."""

import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.floodgate import Floodgate, Rules
from tests.identity.given import Time

RULES = Rules(failures=60, window_ms=60_000, burst=3, networks_max=1_000)
CLIENT, OTHER = "203.0.113.9", "198.51.100.1"


class Gate:
    """A floodgate and its clock."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.time = Time()
        self.gate = Floodgate(rules, self.time)

    def retry_ms(self, client_ip: str) -> int | None:
        """None: it passes."""
        refusal = self.gate.refusal(client_ip)
        if refusal is None:
            return None
        assert (refusal.status, refusal.code, refusal.should_retry) == (429, "too_many_failures", None)
        assert refusal.retry_after_ms is not None and refusal.retry_after_ms > 0
        return refusal.retry_after_ms

    def fail(self, client_ip: str, times: int = 1) -> None:
        for _ in range(times):
            self.gate.failed(client_ip)

    def keeps_its_bounds(self, networks_max: int) -> bool:
        table, line = self.gate._empty_at, self.gate._line
        return len(table) == self.gate.networks_count <= networks_max and sorted(table) == sorted(line)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def ipv4(number: int) -> str:
    return str(IPv4Address(number))


def ipv6(network: int) -> str:
    """An address in the /64 of that number."""
    return str(IPv6Address(network << 64 | 1))


# What is allowed


def test_a_network_may_fail_as_often_as_burst_says_and_then_once_for_each_share_of_the_window(gate: Gate) -> None:
    for _ in range(3):
        assert gate.retry_ms(CLIENT) is None
        gate.fail(CLIENT)
    for _ in range(5):
        assert gate.retry_ms(CLIENT) == 1_000
        gate.time.pass_ms(999)
        assert gate.retry_ms(CLIENT) == 1
        gate.time.pass_ms(1)
        assert gate.retry_ms(CLIENT) is None
        gate.fail(CLIENT)


def test_asking_books_nothing(gate: Gate) -> None:
    gate.fail(CLIENT, times=2)
    assert [gate.retry_ms(CLIENT) for _ in range(100)] == [None] * 100
    gate.fail(CLIENT)
    assert [gate.retry_ms(CLIENT) for _ in range(100)] == [1_000] * 100


def test_one_networks_failures_are_not_anothers(gate: Gate) -> None:
    gate.fail(CLIENT, times=3)
    assert gate.retry_ms(CLIENT) and gate.retry_ms(f"::ffff:{CLIENT}")
    assert gate.retry_ms(OTHER) is None and gate.retry_ms("203.0.113.10") is None


def test_all_addresses_of_an_ipv6_64_share_what_is_allowed(gate: Gate) -> None:
    for host in ("1", "2", "ffff:ffff:ffff:ffff"):
        gate.fail(f"2001:db8::{host}")
    assert gate.retry_ms("2001:db8::3")
    assert gate.retry_ms("2001:db8:0:1::1") is None


@pytest.mark.parametrize("client_ip", ["", "testclient", "/run/gateway.sock"])
def test_a_client_without_an_address_is_neither_counted_nor_refused(gate: Gate, client_ip: str) -> None:
    gate.fail(CLIENT, times=3)
    gate.fail(client_ip, times=100)
    assert gate.retry_ms(client_ip) is None
    assert gate.gate.networks_count == 1


def test_no_failures_a_window_means_that_nothing_is_counted() -> None:
    gate = Gate(Rules(failures=0, window_ms=60_000, burst=1, networks_max=10))
    gate.fail(CLIENT, times=100)
    assert gate.gate.networks_count == 0
    assert gate.retry_ms(CLIENT) is None


def test_failures_that_were_on_their_way_cost_a_window_at_most(gate: Gate) -> None:
    gate.fail(CLIENT, times=3 + 20)
    assert gate.retry_ms(CLIENT) == 21_000
    gate.fail(CLIENT, times=1_000)
    assert gate.retry_ms(CLIENT) == 60_000
    gate.time.pass_ms(60_000)
    assert gate.retry_ms(CLIENT) is None


def level(failed_at_ms: list[int], now_ms: int, rules: Rules) -> Fraction:
    """How many failures are in a network's bucket, from its whole history."""
    filled, at_ms = Fraction(0), 0
    for failed_ms in failed_at_ms:
        filled = max(Fraction(0), filled - Fraction((failed_ms - at_ms) * rules.failures, rules.window_ms))
        filled, at_ms = min(filled + 1, Fraction(rules.burst - 1 + rules.failures)), failed_ms
    return max(Fraction(0), filled - Fraction((now_ms - at_ms) * rules.failures, rules.window_ms))


rules = st.builds(
    Rules,
    failures=st.integers(1, 50),
    window_ms=st.integers(1, 500),
    burst=st.integers(1, 5),
    networks_max=st.just(100),
)
clients = st.sampled_from([CLIENT, OTHER, "203.0.113.10", "2001:db8::1", "2001:db8:0:1::1", "2001:db8:1::1"])
steps = st.lists(st.tuples(st.integers(0, 60), clients, st.integers(0, 4)), max_size=60)


@given(rules, steps)
def test_every_decision_is_the_one_of_an_exact_bucket_and_every_wait_is_long_enough_and_not_too_long(
    rules: Rules, steps: list[tuple[int, str, int]]
) -> None:
    gate, history = Gate(rules), dict[str, list[int]]()
    for pause_ms, client_ip, failures in steps:
        gate.time.pass_ms(pause_ms)
        now_ms = gate.time.now_ms
        own = history.setdefault(client_ip, [])
        retry_ms = gate.retry_ms(client_ip)
        assert (retry_ms is None) == (level(own, now_ms, rules) <= rules.burst - 1)
        if retry_ms is not None:
            assert level(own, now_ms + retry_ms - 1, rules) > rules.burst - 1 >= level(own, now_ms + retry_ms, rules)
            assert retry_ms <= rules.window_ms
        gate.fail(client_ip, failures)
        own += [now_ms] * failures
    assert gate.keeps_its_bounds(rules.networks_max)


# A table that is full

small = st.builds(
    Rules,
    failures=st.integers(1, 5),
    window_ms=st.integers(1, 300),
    burst=st.integers(1, 3),
    networks_max=st.integers(1, 12),
)
crowd = st.integers(0, 40).map(lambda number: ipv4(number * 100)) | st.integers(0, 40).map(lambda n: ipv6(n << 12))


@given(small, st.lists(st.tuples(st.integers(0, 30), crowd, st.integers(0, 4)), max_size=80), crowd)
def test_whoever_comes_the_table_is_bounded_the_innocent_pass_and_waits_are_honest(
    rules: Rules, steps: list[tuple[int, str, int]], last: str
) -> None:
    gate, failures_of = Gate(rules), dict[int, int]()

    def neighbourhood(client_ip: str) -> int:
        return int(IPv6Address(client_ip)) >> 80 if ":" in client_ip else -1 - (int(IPv4Address(client_ip)) >> 8)

    for pause_ms, client_ip, failures in [*steps, (0, last, 0)]:
        gate.time.pass_ms(pause_ms)
        near = neighbourhood(client_ip)
        if failures_of.get(near, 0) < rules.burst:
            assert gate.retry_ms(client_ip) is None
        gate.fail(client_ip, failures)
        failures_of[near] = failures_of.get(near, 0) + failures
        assert gate.keeps_its_bounds(rules.networks_max)
    retry_ms = gate.retry_ms(last)
    if retry_ms is not None:
        gate.time.pass_ms(retry_ms - 1)
        assert gate.retry_ms(last) == 1
        gate.time.pass_ms(1)
        assert gate.retry_ms(last) is None


def fill(gate: Gate, networks_max: int = RULES.networks_max) -> None:
    """As many networks as have a bucket of their own, each in a neighbourhood of its own."""
    for number in range(networks_max - networks_max // 8):
        gate.fail(ipv4(0x0A00_0000 + (number << 8)))


@pytest.mark.parametrize(
    "crowd_of", [lambda number: f"2001:db8:7:{number:x}::1", lambda number: f"192.0.2.{number % 256}"]
)
def test_networks_of_one_neighbourhood_cannot_wash_each_other_out(gate: Gate, crowd_of: Callable[[int], str]) -> None:
    gate.fail(CLIENT, times=3)
    fill(gate)
    for number in range(10_000):
        gate.fail(crowd_of(number))
    assert gate.retry_ms(CLIENT) == 1_000
    assert gate.retry_ms(crowd_of(99_999 % 2**16)), "an unseen neighbour shares the bucket of those who failed"
    assert gate.retry_ms("2001:db8:8::1") is None and gate.retry_ms("192.0.3.1") is None


def test_when_there_is_room_again_newcomers_are_counted_by_themselves(gate: Gate) -> None:
    fill(gate)
    gate.fail("192.0.2.1", times=3)
    assert gate.retry_ms("192.0.2.2") == 1_000
    gate.time.pass_ms(3_000)
    for _ in range(10):  # some of the table is gone, the neighbourhood's bucket is there yet
        gate.retry_ms(OTHER)
    gate.fail("192.0.2.1", times=3)
    assert gate.retry_ms("192.0.2.1") == 1_000
    assert gate.retry_ms("192.0.2.2") is None


def test_when_even_neighbourhoods_are_too_many_the_table_is_bounded_and_the_newest_are_counted(gate: Gate) -> None:
    for number in range(3 * RULES.networks_max):
        gate.fail(ipv6(number << 16))
    assert gate.keeps_its_bounds(RULES.networks_max)
    assert gate.gate.networks_count == RULES.networks_max
    gate.fail(OTHER, times=3)
    assert gate.retry_ms(OTHER) == 1_000


def test_a_network_that_was_long_quiet_has_saved_nothing_up(gate: Gate) -> None:
    fill(gate, networks_max=100)
    gate.fail(CLIENT)
    gate.time.pass_ms(3_600_000)
    gate.fail(CLIENT, times=3)
    assert gate.retry_ms(CLIENT) == 1_000


# What it costs


def test_what_has_drained_makes_room_long_before_the_table_is_full() -> None:
    """One network a millisecond, each worth remembering for 100 ms: about a hundred are, for as long as it goes on."""
    gate = Gate(Rules(failures=10, window_ms=1_000, burst=3, networks_max=100_000))
    most = 0
    for number in range(5_000):
        gate.fail(ipv4(number << 8))
        gate.time.pass_ms(1)
        most = max(most, gate.gate.networks_count)
    assert 100 <= most <= 210


def test_requests_of_others_empty_the_table_when_the_flood_is_over(gate: Gate) -> None:
    fill(gate)
    gate.time.pass_ms(1_000)
    for _ in range(RULES.networks_max // 16):
        assert gate.retry_ms(OTHER) is None
    assert gate.gate.networks_count == 0


def test_a_million_networks_take_no_more_memory_than_networks_max_do(
    record_property: Callable[[str, object], None], full: bool
) -> None:
    networks_max = 65_536
    gate = Gate(Rules(failures=60, window_ms=60_000, burst=30, networks_max=networks_max))

    def fail(numbers: range) -> None:
        for number in numbers:
            gate.gate.failed(f"{number >> 12}.{number >> 4 & 255}.{number & 15}.1")
            gate.gate.failed(f"2001:db8:{number & 0xFFFF:x}:{number >> 16:x}::1")

    tracemalloc.start()  # slows everything down, and once the table is full, nothing but it can grow
    try:
        before_bytes, _ = tracemalloc.get_traced_memory()
        fail(range(networks_max))
        after_bytes, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert gate.gate.networks_count == networks_max
    record_property("bytes_per_network", (after_bytes - before_bytes) / networks_max)
    # A dictionary that grows is there twice for a moment.
    assert after_bytes - before_bytes < 200 * networks_max and most_bytes - before_bytes < 300 * networks_max
    fail(range(networks_max, 500_000 if full else 150_000))
    assert gate.keeps_its_bounds(networks_max)

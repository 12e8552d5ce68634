"""What a counter takes of a server's memory: measured, never more than `limits.bytes_max`, never less than half of it.

The figures are in the report: `make test ARGS="tests/limits/test_memory.py --junitxml=report.xml"`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway import keys, limits
from gateway.downstream.facts import fresh_id
from gateway.embedded.process import free_port
from gateway.types import Calendar, Demand, Limit
from tests import servers
from tests.cluster import cluster
from tests.limits.conftest import Limiter, session
from tests.limits.given import limit
from tests.nodes import Node, nodes

#: The longest that configuration and credentials allow.
NAME = "n" * 32
OWNER = "o" * 128
SUBJECT = keys.digest("anybody")
MONTH_MS = 31 * 86_400_000
GRAIN_MS = MONTH_MS // 60
#: Tables of a server double when the first of these keys is added: so they are at their emptiest.
KEYS = (1 << 14) + 1
#: Counters that take more are copied less often, so that all of it fits a small machine.
COPIES_BYTES_MAX = 64 << 20

RESTORE = """
for number = 1, tonumber(ARGV[2]) do
  redis.call('RESTORE', KEYS[1] .. string.format('%022d', number), 86400000, ARGV[1])
end
"""


def asks(wanted: Limit) -> Demand:
    return Demand(wanted, SUBJECT, 1)


def fill_once(limiter: Limiter, wanted: Limit) -> None:
    assert limiter.admit(fresh_id(), asks(wanted)).status == "OK"


def fill_up(limiter: Limiter, wanted: Limit) -> None:
    """As many as it admits."""
    for _ in range(wanted.limit):
        assert limiter.admit(fresh_id(), asks(wanted)).status == "OK"
    assert limiter.admit(fresh_id(), asks(wanted)).status == "DENY"


def fill_each_bucket(limiter: Limiter, wanted: Limit) -> None:
    """Something in every part of the window, and it is all still counted."""
    for number in range(62):
        limiter.wait(GRAIN_MS if number else 0)
        assert limiter.admit(fresh_id(), asks(wanted)).status == "OK"
    assert limiter.used(asks(wanted)) == (61,)


def fill_sessions(limiter: Limiter, wanted: Limit) -> None:
    for number in range(wanted.limit):
        member = session(1, MONTH_MS, str(number)).member
        assert limiter.admit(fresh_id(), Demand(wanted, SUBJECT, 1, member)).status == "OK"
    assert limiter.admit(fresh_id(), Demand(wanted, SUBJECT, 1, "another")).status == "DENY"


Fill = Callable[[Limiter, Limit], None]
COUNTERS: dict[str, tuple[Limit, Fill]] = {
    "gcra": (limit(NAME, "gcra", most=1, window_ms=MONTH_MS, burst=1), fill_once),
    "calendar": (limit(NAME, "calendar", most=1, calendar=Calendar("month")), fill_once),
    "sliding 1": (limit(NAME, most=1, window_ms=MONTH_MS), fill_up),
    "sliding 128": (limit(NAME, most=128, window_ms=MONTH_MS), fill_up),
    "sliding 129 and more": (limit(NAME, unit="tokens", most=1000, window_ms=MONTH_MS), fill_each_bucket),
    **{
        f"concurrent {most}": (limit(NAME, "concurrent", "concurrent", most=most), fill_up)
        for most in (1, 10, 128, 129, 1025)
    },
    **{
        f"sessions {most}": (limit(NAME, unit="sessions", most=most, window_ms=MONTH_MS), fill_sessions)
        for most in (1, 10, 128, 129, 1025)
    },
}


@pytest.fixture(scope="module", params=["Valkey", "Valkey cluster", "Redis", "Redis cluster"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A server that only this test uses: what it takes is ours."""
    binary = _redis() if request.param.startswith("Redis") else None
    if request.param.endswith("cluster"):
        with cluster(nodes=1, binary=binary) as handle:
            yield handle.nodes[0]
    else:
        with nodes(binary) as started:
            yield started.start("primary", free_port(), 'save ""')


def _redis() -> Path:
    found = servers.system_redis()
    if found is None:
        pytest.skip("no redis-server on PATH")
    return found


@pytest.fixture
def server(node: Node) -> Iterator[redis.Redis]:
    """Empty, and everything that was there has been given back."""
    with redis.Redis.from_url(node.url) as server:
        node.do("FLUSHALL", "SYNC")
        yield server


@pytest.mark.parametrize("name", COUNTERS)
def test_a_full_counter_takes_at_most_its_bound_and_at_least_half_of_it(
    node: Node, server: redis.Redis, name: str, record_property: Callable[[str, object], None]
) -> None:
    wanted, fill = COUNTERS[name]
    limiter = Limiter(server)
    fill(limiter, wanted)
    [filled] = server.keys("*:l:*")
    grown, image = usage(server, filled), server.dump(filled)
    assert image is not None
    bound = limits.bytes_max(wanted)
    count = min(KEYS, COPIES_BYTES_MAX // bound)

    node.do("FLUSHALL", "SYNC")
    server.restore(filled, 86_400_000, image)
    # One that was filled in one go may have been given less than one that grew.
    slack = max(0, grown - usage(server, filled))
    server.delete(filled)
    prefix = keys.counter(OWNER, limits.counter_name(Demand(wanted, "", 1))) + ":"
    before = used_memory(server)
    server.eval(RESTORE, 1, prefix, image, count)
    measured = (used_memory(server) - before) / count + slack
    record_property("bytes", {"measured": round(measured), "bound": bound, "one": grown, "keys": count})
    assert server.dbsize() == count
    assert max(grown, measured) <= bound <= 2 * measured


def usage(server: redis.Redis, key: bytes | str) -> int:
    found = server.memory_usage(key, samples=0)
    assert found is not None
    return found


def used_memory(server: redis.Redis) -> int:
    facts: dict[str, Any] = server.info("memory")
    return int(facts["used_memory"])

"""The user that docs/operations.md tells operators to make: all that the gateway does is allowed, and not much else."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from gateway import keys, limits
from gateway.cli.diagnosis import Status, collect
from gateway.cli.diagnosis.redis import examine_redis
from gateway.config.sections import Stores
from gateway.embedded.process import free_port
from gateway.session import Named, Rules, Sessions
from gateway.stores import Postgres, Redis
from gateway.types import Calendar, Charge, Demand, Limit, Quote, Refusal
from tests.cluster import cluster, sentinels
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.nodes import Node, nodes
from tests.waiting import until

MANUAL = Path(__file__).parents[2] / "docs" / "operations.md"
CREDIT, HOUR_MS = 1_000_000, 3_600_000
PAID = Charge(CREDIT, None, keep_requests=True, basis="exact")

EVERY_KIND = (
    Demand(Limit("log", "sliding", "requests", "org", 100, HOUR_MS), "", 1),
    Demand(Limit("buckets", "sliding", "tokens", "user", 100_000, HOUR_MS), "someone", 50),
    Demand(Limit("talks", "sliding", "sessions", "org", 100, HOUR_MS), "", 1, keys.digest("talk")),
    Demand(Limit("rate", "gcra", "requests", "org", 60, 60_000, burst=10), "", 1),
    Demand(Limit("quota", "calendar", "requests", "org", 100, 31 * 24 * HOUR_MS, calendar=Calendar("month")), "", 1),
    Demand(Limit("parallel", "concurrent", "concurrent", "org", 10, 30_000), "", 1),
    Demand(Limit("all", "sliding", "requests", "everybody", 100, HOUR_MS, shared=True), "", 1),
)

Place = tuple[str, list[Node]]


def documented_line() -> list[str]:
    [line] = [line for line in MANUAL.read_text().splitlines() if line.startswith("ACL SETUSER gateway")]
    return line.replace("PASSWORD", "pw").split()


@pytest.fixture(scope="module", params=["single", "sentinel", "cluster"])
def place(request: pytest.FixtureRequest, binary: Path | None) -> Iterator[Place]:
    """Servers that know the user, and the URL with which the gateway is this user."""
    with ExitStack() as stack:
        if request.param == "single":
            servers = [stack.enter_context(nodes(binary)).start("primary", free_port())]
            url = servers[0].url
        else:
            start = sentinels(binary=binary) if request.param == "sentinel" else cluster(binary=binary)
            handle = stack.enter_context(start)
            servers, url = handle.nodes, handle.url
        for node in servers:
            node.do(*documented_line())
        yield url.replace(f"//:{servers[0].password}@", "//gateway:pw@"), servers


def refusals(servers: list[Node]) -> list[str]:
    """What these servers have not allowed somebody to do, and with which key or command."""
    return [str(entry) for node in servers for entry in node.do("ACL", "LOG")]


async def test_all_that_the_gateway_does_is_allowed(place: Place, database_url: str) -> None:
    url, servers = place
    redis = Redis(url, timeout_ms=5_000, connect_timeout_ms=2_000, scripts=every_script())
    async with furnished(redis, Postgres(database_url, timeout_ms=5_000, pool_max=4)) as house:
        await redis.connected()
        await until(lambda: redis.trouble is None)
        await live(house)
        sessions = Sessions(redis, Rules(b"x-session-id", True, HOUR_MS, 2 * HOUR_MS, 1, None))
        for name in ("talk", "tattle"):
            named = Named(name, minted=False)
            session = await sessions.attach(ASKER, named, sessions.begin(ASKER, named))
            sessions.remember(ASKER, session, 7, "m")
        await until(lambda: _remembered(redis))
        assert [server.primary for server in await redis.servers()].count(True) >= 1
        found = await collect("redis", examine_redis(url, Stores(), 1_000))
        assert [finding for finding in found if finding.status is Status.PROBLEM] == []
    # The doctor asks for more than requests need, and says so where it is refused.
    assert [text for text in refusals(servers) if "'object', 'config" not in text] == []


async def live(house: House) -> None:
    """What orgs go through: admitted, renewed, settled, posted, denied, abandoned and swept, forgotten."""
    await house.credits(10)
    async with house.admission.hold("r1", ASKER, EVERY_KIND, Quote.flat(CREDIT)) as hold:
        assert not isinstance(hold, Refusal)
        await house.admission._leases.beat([hold])
        hold.charge = PAID
    await house.outbox.flush()
    assert (await house.account())["p"] == 9 * CREDIT
    async with house.admission.hold("r2", ASKER, (), Quote.flat(100 * CREDIT)) as refusal:
        assert isinstance(refusal, Refusal)
    abandoned = house.admission.hold("r3", ASKER, EVERY_KIND[:1], Quote.flat(CREDIT))
    await abandoned.__aenter__()
    await house.redis.call("ZADD", keys.deadlines(ORG), 1, "r3")
    await house.redis.call("ZADD", keys.ACTIVE_ORGS, 1, "ghost")
    assert await house.sweeper.sweep() == 1
    active = await house.redis.call("ZRANGE", keys.ACTIVE_ORGS, 0, -1)
    assert ORG.encode() in active and b"ghost" not in active
    await house.outbox.flush()
    demand = EVERY_KIND[0]
    peek = next(script for script in every_script() if script.name == "peek")
    counter = keys.counter(ORG, limits.counter_name(demand))
    assert await house.redis.run(peek, [keys.account(ORG), counter], limits.row(demand, 0))


async def _remembered(redis: Redis) -> bool:
    return bool(await redis.call("ZCARD", keys.session_index(ORG)) == 1)


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "SET", "maxmemory", "1"),
        ("ACL", "LIST"),
        ("SHUTDOWN",),
        ("SCRIPT", "FLUSH"),
        ("SET", "other", "x"),
        ("GET", "other"),
        ("EVAL", "return redis.call('SET', 'other', 'x')", "0"),
    ],
)
def test_and_not_much_else(place: Place, command: tuple[str, ...]) -> None:
    _, servers = place
    url = servers[0].url.replace(f"//:{servers[0].password}@", "//gateway:pw@")
    with redis.Redis.from_url(url) as client, pytest.raises(redis.RedisError, match="permission|ACL|can't"):
        client.execute_command(*command)

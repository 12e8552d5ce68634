"""Clients that never say the same twice: what the server keeps for them is bounded, and all of it ends by itself.

Every request has another user, key, model, session, address and header. Their demands are the policy's own, and the
scripts are those that admission calls. `--full` sends a million.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from gateway import keys, limits
from gateway.admission import Hold, account_keys, counter_keys
from gateway.cli.counters import Bounds, Counters, bounds
from gateway.config import Settings, load_text
from gateway.downstream.facts import fresh_id
from gateway.policy import Asking, PolicySet, demands
from gateway.types import Calendar, Demand, Facts, Peek, Principal, Quote
from tests.limits.conftest import ORG, Limiter, calendar, demand, gcra, session

BOTH = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)

GATEWAY = """
upstreams: { router: { targets: [demo] } }
identity: [ api_key: {} ]
plans: { trial: { credits: 0, policy: trial } }
routes:
  - { path: /v1/chat/completions, method: POST, upstream: router, usage: openai_chat }
  - { path: /v1/*, upstream: router }
shared_limits:
  - { name: flood, count: requests, limit: 100, window: 1h, per: [route, client_ip], cardinality: 256 }
  - { name: everybody, count: requests, limit: 9000000, window: 1h }
"""
POLICY = """
policy: trial
limits:
  - { name: log, count: requests, limit: 100, window: 1h, per: user, cardinality: 500 }
  - { name: buckets, count: tokens, limit: 1000000000, window: 1h, per: model, cardinality: 500 }
  - { name: paced, count: requests, algorithm: gcra, limit: 60000, window: 1m, burst: 1000, per: session,
      cardinality: 500 }
  - { name: monthly, count: tokens, algorithm: calendar, limit: 1000000000, period: month,
      per: [key, model], cardinality: 500 }
  - { name: parallel, count: concurrent, limit: 50, per: [user, "header:x-team"], cardinality: 500 }
  - { name: talks, count: sessions, limit: 500, window: 1h, shadow: true }
"""
SESSIONS_MAX = 1_000
#: A record with its key, and its place in the org's index.
SESSION_BYTES_MAX = 640
TOGETHER = 250
LEASE_MS = 30_000
#: Keys beside counters, tombstones and sessions: what each owner has once.
OF_OWNERS_MAX = 10

IMMORTAL = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  if redis.call('PTTL', key) == -1 then found[#found + 1] = key end
end
return found
"""


@dataclass
class Crowd:
    """Requests of which no two agree in anything that a client may choose."""

    server: redis.Redis
    settings: Settings = field(default_factory=lambda: load_text(GATEWAY, {"trial.yaml": POLICY}))

    def __post_init__(self) -> None:
        policy = PolicySet.compile(self.settings).plan("trial")
        assert policy is not None
        self._policy = policy
        self._chance = random.Random(4)
        self._shas = {
            name: self.server.script_load(limits.script_text(name)) for name in ("admit", "settle", "session")
        }

    @property
    def bounds(self) -> Bounds:
        """What `gateway check` says."""
        return bounds(self.settings)

    @property
    def counters(self) -> list[Counters]:
        return [*self.bounds.policies["trial"], *self.bounds.shared]

    def send(self, first: int, count: int) -> tuple[int, list[str]]:
        """How many of so many requests were admitted, and their tombstones. Most of them end."""
        pipeline = self.server.pipeline(transaction=False)
        held: list[tuple[Hold, bool]] = []
        for number in range(first, first + count):
            asking = self._asking(number)
            wanted = demands(self._policy, asking)
            hold_id, ends = fresh_id(), self._chance.random() < 0.98
            for owner in (keys.SHARED, ORG):
                mine = tuple(one for one in wanted if one.limit.shared is (owner == keys.SHARED))
                hold = Hold(hold_id, asking.principal, mine, Quote.flat(0), owner=owner)
                self._admit(pipeline, hold)
                if ends:
                    self._settle(pipeline, hold)
                held.append((hold, ends))
            self._remember(pipeline, asking)
        replies = iter(pipeline.execute())
        admitted = 0
        for position, (_, ends) in enumerate(held):
            admitted += next(replies)[0] == b"OK"
            if ends:
                next(replies)
            if position % 2:
                next(replies)
        return admitted, [account_keys(hold)[4] for hold, _ in held]

    def _asking(self, number: int) -> Asking:
        team = (b"x-team", f"team {number}".encode())
        address = f"{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}.7"
        principal = Principal(ORG, "trial", f"user{number}", f"key{number}", "api_key")
        facts = Facts(fresh_id(), "POST", "/", b"/", (team,), client_ip=address, peer_ip=address)
        peek = Peek(100, model=f"model-{number}", max_output_tokens=10)
        return Asking(principal, facts, self._chance.choice(self.settings.routes), peek, keys.digest(str(number)))

    def _admit(self, pipeline: Any, hold: Hold) -> None:
        names = [*account_keys(hold), *counter_keys(hold.owner, hold.demands)]
        args: limits.Row = [hold.hold_id, 0, 0, 0, LEASE_MS, 1_000, hold.enforced, 0, *_rows(hold.demands), ""]
        pipeline.evalsha(self._shas["admit"], len(names), *names, *args)

    def _settle(self, pipeline: Any, hold: Hold) -> None:
        names = [*account_keys(hold), keys.mirror(hold.owner), *counter_keys(hold.owner, hold.demands)]
        args: limits.Row = [hold.hold_id, 0, "{}", 3_600]
        for one in hold.demands:
            args += [*_rows((one,)), 0 if one.limit.unit == "concurrent" else one.cost + 1]
        args.append("")  # of no server: nothing here has an account
        pipeline.evalsha(self._shas["settle"], len(names), *names, *args)

    def _remember(self, pipeline: Any, asking: Asking) -> None:
        assert asking.session_digest is not None and asking.peek is not None
        names = [keys.session_record(ORG, asking.session_digest), keys.session_index(ORG)]
        args = [86_400_000, 864_000_000, SESSIONS_MAX, 110, asking.peek.model]
        pipeline.evalsha(self._shas["session"], len(names), *names, *args)


def _rows(wanted: tuple[Demand, ...]) -> limits.Row:
    now_ms = time.time_ns() // 1_000_000
    return [value for one in wanted for value in limits.row(one, now_ms)]


@pytest.fixture
def server(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=60) as server:
        yield server


@pytest.mark.timeout(1_800)
@BOTH
def test_a_million_identities_take_no_more_than_what_the_check_says(
    server: redis.Redis, full: bool, record_property: Callable[[str, object], None]
) -> None:
    requests = 1_000_000 if full else 10_000
    crowd = Crowd(server)
    counters_max = sum(one.counters_max for one in crowd.counters)
    bound = sum(one.bytes_max for one in crowd.counters)
    empty = used_memory(server)
    admitted = keys_most = bytes_most = 0
    for first in range(0, requests, TOGETHER):
        count, tombstones = crowd.send(first, TOGETHER)
        admitted += count
        if first % (requests // 20) == 0:
            assert immortal(server) == []
        # As in fifteen minutes they would be by themselves; they are counted elsewhere.
        server.delete(*tombstones)
        keys_most = max(keys_most, server.dbsize())
        bytes_most = max(bytes_most, used_memory(server) - empty)
    found = {"admitted": admitted, "keys": keys_most, "bytes": bytes_most, "bound": bound, "requests": requests}
    record_property("attack", found)
    assert counters_max * 0.8 < keys_most - SESSIONS_MAX <= counters_max + OF_OWNERS_MAX
    assert bytes_most <= bound + SESSIONS_MAX * SESSION_BYTES_MAX
    assert len(list(server.scan_iter(f"{keys.tag(ORG)}:s:*", count=1_000))) <= SESSIONS_MAX
    assert server.zcard(keys.session_index(ORG)) <= SESSIONS_MAX


@BOTH
def test_what_is_kept_of_each_request_for_a_while_is_small_and_ends(
    server: redis.Redis, record_property: Callable[[str, object], None]
) -> None:
    limiter, requests = Limiter(server), 5_000
    wanted = demand(1_000_000, 60_000)
    for number in range(-1, requests):
        if number == 0:
            before = used_memory(server)
        rid = fresh_id()
        assert limiter.admit(rid, wanted).status == "OK"
        limiter.settle(rid, (wanted, 1))
    tombstones = list(server.scan_iter("*:t:*", count=1_000))
    assert len(tombstones) == requests + 1
    assert all(0 < ttl <= 900 for ttl in map(server.ttl, tombstones[:100]))
    per_thousand = (used_memory(server) - before) / requests * 1_000
    record_property("tombstones", {"bytes per 1000 requests": round(per_thousand)})
    assert per_thousand <= 300_000


def test_nothing_lives_for_ever_after_any_step_of_any_kind(limiter: Limiter) -> None:
    chance = random.Random(4)
    kinds = (
        demand(3, 60_000, name="log"),
        demand(500, 60_000, 7, unit="tokens", name="buckets"),
        gcra(10, 60_000, 30, 7),
        calendar(1_000, Calendar("day"), 7),
        demand(3, 0, unit="concurrent", name="parallel"),
        demand(1, 60_000, name="shadow", shadow=True),
    )
    running: list[str] = []
    statuses = set()
    for number in range(600):
        match chance.choice(("admit", "admit", "settle", "renew", "wait", "sweep", "back")):
            case "admit":
                asked = (*kinds[:5], session(20, 60_000, str(chance.randrange(40))), kinds[5])
                statuses.add(limiter.admit(f"r{number}", *asked).status)
                running.append(f"r{number}")
            case "settle" if running:
                rid = running.pop(chance.randrange(len(running)))
                limiter.settle(rid, *((one, chance.choice((0, 1, one.cost, one.cost + 9))) for one in kinds))
            case "renew" if running:
                limiter.renew(chance.choice(running), *kinds)
            case "sweep" if running:
                limiter.sweep(chance.choice(running))
            case "wait":
                limiter.wait(chance.choice((1, 900, 20_000)))
            case "back":
                limiter.wait(-chance.choice((1, 500)))
        assert [key for key in immortal(limiter.server) if not key.endswith(b":test-clock")] == []
    assert statuses == {"OK", "DENY"}


def immortal(server: redis.Redis) -> list[bytes]:
    found: list[bytes] = server.eval(IMMORTAL, 0)
    return found


def used_memory(server: redis.Redis) -> int:
    """Without the buffers of our own connection."""
    facts: dict[str, Any] = server.info("memory")
    return int(facts["used_memory"]) - int(facts["mem_clients_normal"])

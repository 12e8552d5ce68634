"""The real admission scripts on a real server, on a clock that the test sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import redis

from gateway import keys, limits
from gateway.admission import counter_keys
from gateway.types import Calendar, Demand, Limit

ORG = "acme"
CLOCK = "{ai_credits:org_acme}:test-clock"
LEASE_MS = 30_000
START_MS = 1_800_000_000_000
CREDIT = 1_000_000
#: Of the server, as far as its scripts are told.
INCARNATION = "here"


@dataclass(frozen=True)
class Verdict:
    status: str
    used: tuple[int, ...]
    retry_ms: tuple[int, ...]
    at_ms: int


class Limiter:
    """Calls the scripts as admission does, with TIME taken from a key."""

    def __init__(self, server: redis.Redis) -> None:
        self.server = server
        #: How far the gateway's own clock is from the server's.
        self.skew_ms = 0
        self._scripts = {
            name: server.register_script(
                limits.script_text(name).replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')")
            )
            for name in (*limits.LOOPS, "orphan")
        }
        self.set_clock(START_MS)

    def set_clock(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.server.hset(CLOCK, mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})

    def wait(self, ms: int) -> None:
        self.set_clock(self.now_ms + ms)

    def start_over(self, now_ms: int = START_MS) -> None:
        """An empty server."""
        self.server.flushall()
        self.set_clock(now_ms)

    def give_credits(self, credits: int) -> None:
        """An account of this server that may owe all it has."""
        ucredits = credits * CREDIT
        self.server.hset(
            keys.account(ORG),
            mapping={
                **{"p": ucredits, "v": 1, "s": 0, "c": ucredits, "ep": 1, "pe": 0},
                **{"u": 0, "h": 0, "r": INCARNATION, "b": f"{INCARNATION}:1"},
            },
        )

    def admit(self, rid: str, *demands: Demand, hold_ucredits: int = 0) -> Verdict:
        """demands: the shadows last."""
        enforced = sum(not demand.limit.shadow for demand in demands)
        # The hold in full or not at all, and all of it is owed as soon as it runs.
        holds = [hold_ucredits, hold_ucredits, hold_ucredits]
        args: limits.Row = [rid, *holds, LEASE_MS, 1000, enforced, 1, *self._rows(demands), INCARNATION]
        reply = self._scripts["admit"](keys=self._keys(rid, demands), args=args)
        numbers = [int(value) for value in reply[8:]]
        retry_ms = tuple(max(0, number) for number in numbers[1::2])
        return Verdict(reply[0].decode(), tuple(numbers[::2]), retry_ms, int(reply[1]) // 1000)

    def settle(self, rid: str, *actuals: tuple[Demand, int], charge_ucredits: int = 0) -> str:
        demands = [demand for demand, _ in actuals]
        args: limits.Row = [rid, charge_ucredits, "{}", 3600]
        for demand, actual in actuals:
            args += [*self._rows([demand]), actual]
        args.append(INCARNATION)
        head = self._keys(rid, demands)
        reply = self._scripts["settle"](keys=[*head[:5], keys.mirror(ORG), *head[5:]], args=args)
        return bytes(reply[0]).decode()

    def release(self, rid: str, *demands: Demand) -> str:
        return self.settle(rid, *((demand, 0) for demand in demands))

    def release_and_charge(self, rid: str, demands: Sequence[Demand]) -> str:
        return self.settle(rid, *((demand, 0) for demand in demands), charge_ucredits=CREDIT)

    def renew(self, rid: str, *demands: Demand, hold_ucredits: int = 0) -> str:
        args: limits.Row = [rid, LEASE_MS, 0, hold_ucredits, *self._rows(demands), INCARNATION]
        head = self._keys(rid, demands)
        return bytes(self._scripts["renew"](keys=[*head[:3], *head[4:]], args=args)[0]).decode()

    def sweep(self, rid: str, on_expiry: str = "checkpoint") -> str:
        """What the sweeper does with a hold whose lease is over."""
        reply = self._scripts["orphan"](keys=[*self._keys(rid, ()), keys.mirror(ORG)], args=[rid, on_expiry, 3600])
        return bytes(reply).decode()

    def peek(self, *demands: Demand) -> Verdict:
        reply = self._scripts["peek"](keys=[keys.account(ORG), *counter_keys(ORG, demands)], args=self._rows(demands))
        numbers = [int(value) for value in reply[1:]]
        retry_ms = tuple(max(0, number) for number in numbers[1::2])
        return Verdict("", tuple(numbers[::2]), retry_ms, int(reply[0]) // 1000)

    def used(self, *demands: Demand) -> tuple[int, ...]:
        return self.peek(*demands).used

    def dump(self) -> dict[bytes, bytes | None]:
        """Every key but the test's clock, as the server serialises it."""
        names = [key for key in self.server.scan_iter(count=1000) if isinstance(key, bytes) and key != CLOCK.encode()]
        pipeline = self.server.pipeline(transaction=False)
        for name in names:
            pipeline.dump(name)
        return dict(zip(names, pipeline.execute(), strict=True))

    def _rows(self, demands: Sequence[Demand]) -> limits.Row:
        return [value for demand in demands for value in limits.row(demand, self.now_ms + self.skew_ms)]

    def _keys(self, rid: str, demands: Sequence[Demand]) -> list[str]:
        return [
            keys.account(ORG),
            keys.holds(ORG),
            keys.deadlines(ORG),
            keys.outbox(ORG),
            keys.tombstone(ORG, rid),
            *counter_keys(ORG, demands),
        ]


def demand(
    limit: int, window_ms: int, cost: int = 1, *, unit: str = "requests", name: str = "rpm", shadow: bool = False
) -> Demand:
    """A sliding limit, or one on requests in flight."""
    if unit == "concurrent":
        return Demand(Limit(name, "concurrent", unit, "org", limit, LEASE_MS, shadow=shadow), "", cost)
    return Demand(Limit(name, "sliding", unit, "org", limit, window_ms, shadow=shadow), "", cost)


def gcra(rate: int, window_ms: int, burst: int, cost: int = 1, *, name: str = "rps") -> Demand:
    return Demand(Limit(name, "gcra", "tokens" if cost > 1 else "requests", "org", rate, window_ms, burst), "", cost)


def calendar(limit: int, rule: Calendar, cost: int = 1, *, name: str = "quota") -> Demand:
    longest_ms = {"hour": 3_600_000, "day": 90_000_000, "week": 608_400_000, "month": 2_682_000_000}[rule.period]
    return Demand(Limit(name, "calendar", "tokens", "org", limit, longest_ms, calendar=rule), "", cost)


def session(limit: int, window_ms: int, session_id: str, *, name: str = "new-sessions") -> Demand:
    return Demand(Limit(name, "sliding", "sessions", "org", limit, window_ms), "", 1, keys.digest(session_id))


@pytest.fixture
def limiter(redis_url: str) -> Iterator[Limiter]:
    with redis.Redis.from_url(redis_url) as server:
        yield Limiter(server)

"""The real admission scripts on a real server, on a clock that the test sets."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis

from gateway import keys, limits
from gateway.admission import Hold, counter_keys
from gateway.types import Demand, Principal

ORG = "acme"
ASKER = Principal(ORG, "pro", "ann", "key_1", "api_key")
CLOCK = "{ai_credits:org_acme}:test-clock"
LEASE_MS = 30_000


@dataclass(frozen=True)
class Verdict:
    status: str
    used: tuple[int, ...]
    retry_ms: tuple[int, ...]


class Limiter:
    """Calls `admit.lua` and `settle.lua` as admission does, with TIME taken from a key."""

    def __init__(self, server: redis.Redis) -> None:
        self.server = server
        self._scripts = {
            name: server.register_script(
                limits.script_text(name).replace("redis.call('TIME')", f"redis.call('HMGET', '{CLOCK}', 's', 'us')")
            )
            for name in ("admit", "settle", "renew")
        }
        self.set_clock(1_800_000_000_000)

    def set_clock(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.server.hset(CLOCK, mapping={"s": now_ms // 1000, "us": now_ms % 1000 * 1000})

    def admit(self, rid: str, *demands: Demand, hold_ucredits: int = 0) -> Verdict:
        args: list[str | int] = [rid, hold_ucredits, LEASE_MS, 1000]
        for demand in demands:
            args += [limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost]
        reply = self._scripts["admit"](keys=self._keys(rid, demands), args=args)
        numbers = [int(value) for value in reply[3:]]
        return Verdict(reply[0].decode(), tuple(numbers[::2]), tuple(numbers[1::2]))

    def settle(self, rid: str, taken_at_ms: int, *actuals: tuple[Demand, int], charge_ucredits: int = 0) -> str:
        demands = [demand for demand, _ in actuals]
        args: list[str | int] = [rid, charge_ucredits, "{}", 3600, taken_at_ms]
        for demand, actual in actuals:
            args += [limits.algorithm(demand), demand.limit, demand.window_ms, demand.cost, actual]
        head = self._keys(rid, demands)
        reply: bytes = self._scripts["settle"](keys=[*head[:5], keys.mirror(ORG), *head[5:]], args=args)
        return reply.decode()

    def dump(self) -> dict[bytes, bytes | None]:
        """Every key but the test's clock, as the server serialises it."""
        return {key: self.server.dump(key) for key in self.server.scan_iter() if key != CLOCK.encode()}

    def _keys(self, rid: str, demands: tuple[Demand, ...] | list[Demand]) -> list[str]:
        return [
            keys.account(ORG),
            keys.holds(ORG),
            keys.deadlines(ORG),
            keys.outbox(ORG),
            keys.tombstone(ORG, rid),
            *counter_keys(Hold(rid, ASKER, tuple(demands), 0)),
        ]


def demand(limit: int, window_ms: int, cost: int = 1, *, unit: str = "requests", name: str = "rpm") -> Demand:
    kind = "concurrent" if unit == "concurrent" else "sliding"
    return Demand(name, kind, unit, "org", ORG, limit, LEASE_MS if unit == "concurrent" else window_ms, cost)


@pytest.fixture
def limiter(redis_url: str) -> Iterator[Limiter]:
    with redis.Redis.from_url(redis_url) as server:
        yield Limiter(server)

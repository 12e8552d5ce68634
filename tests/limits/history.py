"""Random histories of one limit, and those that judge them: the twin, the scripts on a server, the oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hypothesis import strategies as st

from gateway import keys, limits
from gateway.admission import counter_keys
from gateway.types import Calendar, Demand, Limit
from tests.limits.conftest import LEASE_MS, ORG, START_MS, Limiter
from tests.limits.oracle import Oracle, Use, oracle

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Adelaide", "America/St_Johns")


@dataclass(frozen=True)
class Step:
    """Wait, then ask for `cost`, or end the `which`-th request that still runs."""

    wait_ms: int
    cost: int = 0
    member: str = ""
    which: int | None = None
    #: What the request turns out to have used, in percent of what it asked.
    used_percent: int = 100


@dataclass(frozen=True)
class Request:
    rid: str
    cost: int
    member: str
    taken_at_ms: int

    @property
    def holder(self) -> str:
        """What a counter in this process is told: the session, or the request itself."""
        return self.member or self.rid


class Judge(Protocol):
    """Found so far and the wait, and if that is 0, taken."""

    def ask(self, request: Request) -> tuple[int, int]: ...

    def settle(self, request: Request, actual: int, now_ms: int) -> None: ...


class ByOracle:
    def __init__(self, limit: Limit) -> None:
        self.oracle: Oracle = oracle(limit)
        self._uses: dict[str, Use] = {}

    def ask(self, request: Request) -> tuple[int, int]:
        now_ms, oracle = request.taken_at_ms, self.oracle
        found = oracle.used(now_ms), oracle.retry_ms(request.cost, now_ms, request.holder)
        if not found[1]:
            self._uses[request.rid] = oracle.take(request.cost, now_ms, request.holder)
        return found

    def settle(self, request: Request, actual: int, now_ms: int) -> None:
        self.oracle.settle(self._uses[request.rid], request.cost, actual, now_ms, request.holder)


class ByTwin:
    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._counter = limits.counter(limit)

    def ask(self, request: Request) -> tuple[int, int]:
        now_ms, counter, limit = request.taken_at_ms, self._counter, self._limit
        found = counter.check(limit, request.cost, now_ms, request.holder)
        if not found[1]:
            counter.take(limit, request.cost, now_ms, request.holder)
        return found

    def settle(self, request: Request, actual: int, now_ms: int) -> None:
        self._counter.settle(self._limit, request.cost, actual, request.taken_at_ms, now_ms, request.holder)


class ByScripts:
    """The counter's key goes when its time to live is over, by the clock that the test sets."""

    def __init__(self, limit: Limit, limiter: Limiter) -> None:
        self._limit, self._limiter = limit, limiter
        self._counter = counter_keys(ORG, [Demand(limit, "", 0)])[0]
        self._ends_at_ms: int | None = None
        self._running: dict[str, Request] = {}
        limiter.start_over()

    def ask(self, request: Request) -> tuple[int, int]:
        self._set_clock(request.taken_at_ms)
        demand = self._demand(request)
        peeked = self._limiter.peek(demand)
        verdict = self._limiter.admit(request.rid, demand)
        assert (verdict.status == "OK") == (verdict.retry_ms[0] <= 0)
        assert (peeked.used, peeked.retry_ms, peeked.at_ms) == (verdict.used, verdict.retry_ms, request.taken_at_ms)
        if verdict.status == "OK":
            self._running[request.rid] = request
            self._note_end()
        return verdict.used[0], max(0, verdict.retry_ms[0])

    def settle(self, request: Request, actual: int, now_ms: int) -> None:
        self._set_clock(now_ms)
        del self._running[request.rid]
        assert self._limiter.settle(request.rid, (self._demand(request), actual)) == "OK"
        self._note_end()

    def _demand(self, request: Request) -> Demand:
        return Demand(self._limit, "", request.cost, request.member)

    def _set_clock(self, now_ms: int) -> None:
        """As time passes gateways renew what still runs, always before its lease is over."""
        limiter = self._limiter
        while self._limit.kind == "concurrent" and self._running and limiter.now_ms < now_ms:
            self._pass(min(now_ms, limiter.now_ms + LEASE_MS - 1))
            for request in self._running.values():
                limiter.renew(request.rid, self._demand(request))
            self._note_end()
        self._pass(now_ms)

    def _pass(self, now_ms: int) -> None:
        self._limiter.set_clock(now_ms)
        if self._ends_at_ms is not None:
            # Deletes it when that is now, or was.
            self._limiter.server.pexpire(self._counter, self._ends_at_ms - now_ms)
            self._note_end()

    def _note_end(self) -> None:
        ttl_ms = self._limiter.server.pttl(self._counter)
        assert ttl_ms != -1, "a counter that never goes"
        self._ends_at_ms = None if ttl_ms == -2 else self._limiter.now_ms + ttl_ms


def play(steps: Sequence[Step], judges: Sequence[Judge]) -> int:
    """All judges said the same at every step. Returns how many requests were admitted."""
    now_ms, running, admitted = START_MS, list[Request](), 0
    for number, step in enumerate(steps):
        now_ms += step.wait_ms
        if step.which is None:
            request = Request(f"r{number}", step.cost, step.member, now_ms)
            answers = [judge.ask(request) for judge in judges]
            assert answers == answers[:1] * len(judges), (number, step)
            if not answers[0][1]:
                admitted += 1
                running.append(request)
        elif running:
            request = running.pop(step.which % len(running))
            for judge in judges:
                judge.settle(request, request.cost * step.used_percent // 100, now_ms)
    return admitted


@dataclass(frozen=True)
class Case:
    """A limit, and what makes life hard for it."""

    limit: Limit
    waits_ms: tuple[int, ...]
    cost_max: int = 1
    sessions: int = 0


def windows(unit: str, most: Sequence[int], window_ms: Sequence[int]) -> st.SearchStrategy[Case]:
    def case(most: int, window_ms: int) -> Case:
        grain_ms = -(-window_ms // 60)
        waits = (0, 0, 0, 1, grain_ms - 1, grain_ms, 7 * grain_ms, window_ms // 2, window_ms - grain_ms)
        edges = (window_ms - 1, window_ms, window_ms + 1, window_ms + grain_ms - 1, window_ms + grain_ms, 9 * window_ms)
        limit = Limit("one", "sliding", unit, "org", most, window_ms)
        return Case(limit, waits + edges, most if unit == "tokens" else 1, 2 if unit == "sessions" else 0)

    return st.builds(case, st.sampled_from(most), st.sampled_from(window_ms))


def leaks() -> st.SearchStrategy[Case]:
    def case(rate: int, window_ms: int, burst: int) -> Case:
        waits = (0, 0, 0, 1, 2, window_ms // 2, window_ms - 1, window_ms, window_ms + 1, 3 * window_ms, 999)
        return Case(Limit("one", "gcra", "tokens", "org", rate, window_ms, burst), waits, burst)

    return st.builds(case, st.integers(1, 9), st.sampled_from((1, 7, 10, 60)), st.integers(1, 12))


def calendars() -> st.SearchStrategy[Case]:
    def case(rule: Calendar, most: int) -> Case:
        waits = (0, 0, 1, HOUR_MS // 4, HOUR_MS - 1, HOUR_MS, 5 * HOUR_MS, DAY_MS - 1, DAY_MS, 8 * DAY_MS, 59 * DAY_MS)
        return Case(Limit("one", "calendar", "tokens", "org", most, 1, calendar=rule), waits, most)

    return st.builds(case, rules(), st.integers(1, 9))


def rules() -> st.SearchStrategy[Calendar]:
    """Hours begin at any minute, days at any minute, weeks on any day at any minute, months on any day to the 28th."""
    latest = {"hour": 59, "day": 1439, "week": 7 * 1440 - 1, "month": 28 * 1440 - 1}
    return st.sampled_from(tuple(latest)).flatmap(
        lambda period: st.builds(
            Calendar,
            st.just(period),
            st.sampled_from(ZONES),
            st.sampled_from((0, 15, 59, 120, 150, 360, 4710, 20_880)).filter(lambda anchor: anchor <= latest[period])
            | st.integers(0, latest[period]),
        )
    )


def slots() -> st.SearchStrategy[Case]:
    waits = (0, 0, 1, 1000, LEASE_MS - 1, LEASE_MS, 3 * LEASE_MS)
    return st.builds(
        lambda most: Case(Limit("one", "concurrent", "concurrent", "org", most, LEASE_MS), waits), st.integers(1, 4)
    )


#: Every algorithm, with limits so small that every history meets them.
CASES: dict[str, st.SearchStrategy[Case]] = {
    "log": windows("requests", (1, 2, 3, 5), (60, 120, 1000)),
    "buckets": windows("tokens", (1, 5, 50), (60, 120, 1000)),
    "sessions": windows("sessions", (1, 2, 3), (60, 120, 1000)),
    "gcra": leaks(),
    "calendar": calendars(),
    "concurrent": slots(),
}


def histories(name: str, steps_max: int) -> st.SearchStrategy[tuple[Limit, list[Step]]]:
    def steps(case: Case) -> st.SearchStrategy[tuple[Limit, list[Step]]]:
        member: Callable[[int], str] = lambda number: keys.digest(f"s{number}") if case.sessions else ""  # noqa: E731
        ask = st.builds(
            Step,
            st.sampled_from(case.waits_ms),
            st.integers(1, case.cost_max),
            st.integers(0, case.sessions).map(member),
        )
        end = st.builds(
            Step,
            st.sampled_from(case.waits_ms),
            which=st.integers(0, 9),
            used_percent=st.sampled_from((0, 0, 30, 70, 100, 150, 300) if case.limit.unit == "tokens" else (0, 100)),
        )
        return st.tuples(st.just(case.limit), st.lists(ask | ask | end, min_size=3, max_size=steps_max))

    return CASES[name].flatmap(steps)

"""What other policies would have decided, worked out the slow way from the lines of a log: limits that remember every
use, and a list of events that is sorted whenever something joins it.

Knows only what the policies of test_replay.py need: who a limit is per, and which requests it counts, is written out.
"""

from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from gateway.config import Settings
from gateway.policy import PolicySet
from gateway.types import Limit
from tests.limits.oracle import Oracle, SlotOracle, Use, oracle

Line = Mapping[str, Any]
_Event = tuple[int, int, int, Callable[[int], None]]
_TOKENS = ("tokens", "input_tokens", "output_tokens")
_CHAT = "POST /v1/chat/completions"
#: Behind every line.
LAST = 1 << 62


class Hindsight:
    """Decision and limit of every request, credits by org, refusals by org and limit."""

    def __init__(self, settings: Settings, lines: list[Line]) -> None:
        policy = PolicySet.compile(settings).plans["pro"]
        self.limits = [rule.limit for rule in policy.rules]
        self.price = policy.price_ucredits
        self.default_output = policy.default_output_tokens
        self.decisions: dict[str, tuple[str, str | None]] = {}
        self.charged: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.oracles: dict[tuple[str, ...], Oracle] = {}
        self.durations: dict[str, list[int]] = {}
        #: Who was denied what, and when: what a gateway may have remembered.
        self.denials: set[tuple[int, Oracle]] = set()
        self.events: list[_Event] = []
        self.count = 0
        for place, line in enumerate(lines):
            Case(self, place, line).begin()
        while self.events:
            at_us, _, _, do = self.events.pop(0)
            do(at_us)

    def at(self, at_us: int, place: int, do: Callable[[int], None]) -> None:
        self.count += 1
        insort(self.events, (at_us, place, self.count, do), key=lambda event: event[:3])

    def oracle(self, limit: Limit, line: Line) -> Oracle:
        owner = "" if limit.shared else line["org"]
        per = {"org": "", "everybody": "", "user": line.get("user"), "key": line.get("key"), "model": asked(line)}
        own = oracle(limit)
        # A limit that is counted in another way, for what an org has instead of it, is another counter.
        found = self.oracles.setdefault((limit.name, type(own).__name__, owner, str(per[limit.scope])), own)
        found.limit = limit
        return found


class Case:
    """One line."""

    def __init__(self, all_: Hindsight, place: int, line: Line) -> None:
        self.all, self.place, self.line = all_, place, line
        overrides = line.get("overrides", {})
        self.limits = [
            replace(limit, limit=overrides.get(limit.name, limit.limit)) if not limit.shared else limit
            for limit in all_.limits
        ]
        self.costs = self._costs()
        self.taken: dict[str, Use] = {}
        self.denied: list[str] = []
        limits = [limit for limit in self.limits if limit.name in self.costs]
        self.own = [limit for limit in limits if not limit.shared]
        self.shared = [limit for limit in limits if limit.shared]

    def _costs(self) -> dict[str, int]:
        """By name of the limits that count it."""
        line, units = self.line, {"requests": 1, "concurrent": 1, "ucredits": self.all.price}
        if "session" in line:
            units["sessions"] = 1
        if line.get("route") == _CHAT:
            asked_for = -(-line.get("body_bytes", 0) // 4)
            output = line.get("max_output_tokens")
            if output is None:
                bounds = {limit.name: limit.capacity for limit in self.limits}
                output = max(1, min(self.all.default_output, bounds["tokens"] - asked_for, bounds["out"]))
            units |= {"tokens": max(1, asked_for + output), "output_tokens": max(1, output)}
        gpt = line.get("route") == _CHAT and (asked(line) or "").startswith("gpt-")
        return {
            limit.name: units[limit.unit]
            for limit in self.limits
            if limit.unit in units and (limit.name != "gpt" or gpt)
        }

    def begin(self) -> None:
        line, decision = self.line, self.line["decision"]
        self.credits = decision in ("insufficient_credits", "credits_in_flight")
        self.was_admitted = "hold_id" in line
        self.stays = self.credits or not (
            self.was_admitted or decision in ("rate_limit_exceeded", "request_exceeds_limit")
        )
        if self.stays:
            self.end("refused_for_credits" if self.credits else "ended_before_its_limits")
            if "shared_judged_at_us" not in line:
                if not self.credits:
                    return
        for limit in self.own + self.shared:
            if not self.stays and not limit.shadow and self.costs[limit.name] > limit.capacity:
                self.end("request_exceeds_limit", limit.name)
                return
        remembered = {one["denied_at_us"] for one in line.get("limits", ()) if "denied_at_us" in one}
        if remembered:
            for at_us in sorted(remembered):
                self.all.at(at_us, LAST, self.recall)
        else:
            self.all.at(self.judged_us, self.place, self.judge_shared)

    @property
    def judged_us(self) -> int:
        line = self.line
        begun_us = int(timestamp_us(line["at"])) - int(line["ms"]["total"] * 1000)
        return int(line.get("shared_judged_at_us") or line.get("judged_at_us") or begun_us)

    def recall(self, at_us: int) -> None:
        named = [one for one in self.line["limits"] if "denied_at_us" in one]
        for one in named:
            limit = next((limit for limit in self.own + self.shared if limit.name == one["name"]), None)
            if one["denied_at_us"] == at_us and limit is not None:
                if (at_us, self.all.oracle(limit, self.line)) in self.all.denials:
                    self.denied.append(limit.name)
        if at_us == max(one["denied_at_us"] for one in named):
            denied = [one for one in named if one["name"] in self.denied]
            units = {limit.name: limit.unit for limit in self.limits}
            if any(units[one["name"]] in ("requests", "sessions") for one in denied):
                self.end("rate_limit_exceeded", max(denied, key=lambda one: int(one["retry_ms"]))["name"])
            else:
                self.all.at(max(at_us, self.judged_us), self.place, self.judge_shared)

    def judge_shared(self, at_us: int) -> None:
        if self.shared and not self.judge(self.shared, at_us):
            return
        self.all.at(max(at_us, self.line.get("judged_at_us") or at_us), self.place, self.judge_own)

    def judge_own(self, at_us: int) -> None:
        shared = [limit for limit in self.shared if limit.name in self.taken]
        if self.stays or not self.judge(self.own, at_us):
            then_us = None if self.was_admitted else self.line.get("shared_settled_at_us")
            self.settle_at(max(at_us, then_us or at_us), shared, None)
            return
        line, route = self.line, self.all.durations.setdefault(self.line["route"], [])
        if self.was_admitted:
            end_us = line.get("settled_at_us") or line["shared_settled_at_us"]
            ends = end_us, line.get("shared_settled_at_us") or end_us
            route.append(max(0, end_us - at_us))
            outcome = line.get("outcome")
        else:
            ends = (at_us + (sum(route) // len(route) if route else 0),) * 2
            outcome = "complete"
        if outcome not in (None, "never_reached", "upstream_refused"):
            self.all.charged[line["org"]] += self.all.price
        self.end("admitted")
        for at, limits in zip(ends, (self.own, shared), strict=True):
            self.settle_at(at, [limit for limit in limits if limit.name in self.taken], outcome)

    def judge(self, limits: list[Limit], at_us: int) -> bool:
        """All of them are taken, or the request is refused."""
        now_ms = at_us // 1000
        fitting = [limit for limit in limits if self.fits(limit, self.costs[limit.name], now_ms)]
        denied = [limit for limit in limits if limit not in fitting and not limit.shadow]
        if not denied:
            for limit in fitting:
                if not (limit.unit == "sessions" and self.session_known):
                    used = self.all.oracle(limit, self.line)
                    self.taken[limit.name] = used.take(self.costs[limit.name], now_ms, self.member(limit))
        elif not self.stays:
            longest = max(denied, key=lambda limit: self.retry_ms(limit, now_ms))
            self.end("rate_limit_exceeded", longest.name)
            self.all.denials |= {(at_us, self.all.oracle(limit, self.line)) for limit in denied}
        return not denied

    @property
    def session_known(self) -> bool:
        known = self.line.get("session_known")
        return bool(known or (known is None and self.line.get("turn", 0) > 1))

    def fits(self, limit: Limit, cost: int, now_ms: int) -> bool:
        used = self.all.oracle(limit, self.line)
        forget(used, now_ms)
        known = limit.unit == "sessions" and self.session_known
        return known or used.fits(cost, now_ms, self.member(limit))

    def retry_ms(self, limit: Limit, now_ms: int) -> int:
        """As the oracle has it, but found by halves."""
        used, cost, member = self.all.oracle(limit, self.line), self.costs[limit.name], self.member(limit)
        if limit.kind in ("calendar", "concurrent"):
            return used.retry_ms(cost, now_ms, member)
        low, high = 0, 2 * limit.window_ms * max(1, limit.capacity // limit.limit)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if used.fits(cost, now_ms + middle, member) else (middle + 1, high)
        return low

    def member(self, limit: Limit) -> str:
        return str(self.line["session"]) if limit.unit == "sessions" else str(self.place)

    def settle_at(self, at_us: int, limits: list[Limit], outcome: str | None) -> None:
        for limit in limits:
            self.all.at(at_us, self.place, lambda now_us, limit=limit: self.settle(limit, outcome, now_us))  # type: ignore[misc]

    def settle(self, limit: Limit, outcome: str | None, at_us: int) -> None:
        cost, used = self.costs[limit.name], self.all.oracle(limit, self.line)
        actual = self.actual(limit, cost, outcome)
        used.settle(self.taken[limit.name], cost, actual, at_us // 1000, self.member(limit))

    def actual(self, limit: Limit, cost: int, outcome: str | None) -> int:
        line = self.line
        if outcome in (None, "never_reached"):
            return 0
        if limit.unit not in _TOKENS:
            return 0 if limit.unit == "ucredits" and outcome == "upstream_refused" else cost
        if outcome == "upstream_refused":
            return 0
        if "input_tokens" not in line or not self.was_admitted:
            return cost
        used: int = line["output_tokens"] + (line["input_tokens"] if limit.unit == "tokens" else 0)
        at_least = outcome == "complete" and line["basis"] == "estimated"
        return max(used, cost) if at_least else used

    def end(self, decision: str, limit: str | None = None) -> None:
        self.all.decisions[self.line["request_id"]] = decision, limit
        if limit is not None:
            self.all.refused[self.line["org"], limit] += 1


def asked(line: Line) -> str | None:
    model: str | None = line.get("requested_model", line.get("model")) or None
    return model


def forget(used: Oracle, now_ms: int) -> None:
    """What does not count any more never will: only time is saved."""
    if used.uses and not isinstance(used, SlotOracle) and used.limit.kind == "sliding":
        used.uses = [use for use in used.uses if used.counts(use, now_ms)]


def timestamp_us(text: str) -> float:
    return datetime.fromisoformat(text).timestamp() * 1_000_000

"""Which limits of a policy a request meets, and why it does not meet the others."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from gateway import policy
from gateway.config import When, format_duration
from gateway.policy import Asking, CompiledPolicy
from gateway.policy.asking import known_on, reader
from gateway.policy.compile import Rule
from gateway.policy.conditions import compile_when
from gateway.policy.estimate import TOKEN_UNITS
from gateway.types import UCREDITS_PER_CREDIT, Demand, Limit

#: The conditions of `when`, in the order in which they are told.
CONDITIONS = ("plan", "route", "method", "model", "stream", "header")


@dataclass(frozen=True, slots=True)
class Bearing:
    """One limit, and what it is to one request."""

    rule: Rule
    #: What binds the org: the policy's, or its own value in place of that.
    limit: Limit
    #: None: the request does not meet it.
    demand: Demand | None
    #: Why it does not.
    because: str = ""

    @property
    def overridden(self) -> bool:
        return self.limit is not self.rule.limit


def bearings(rules: CompiledPolicy, asking: Asking) -> tuple[Bearing, ...]:
    """Every limit of the request's policy in its order, then the shared ones."""
    met = {demand.limit.name: demand for demand in policy.demands(rules, asking)}
    found = []
    for rule in rules.rules:
        limit = rule.bound_by(asking.overrides)
        demand = met.get(limit.name)
        found.append(Bearing(rule, limit, demand, "" if demand else _why_not(rule, rules, asking)))
    return tuple(found)


def _why_not(rule: Rule, rules: CompiledPolicy, asking: Asking) -> str:
    failing = list(unmet(rule.when, rules.plan, asking))
    if failing:
        return "; ".join(failing)
    match rule.limit.unit:
        case unit if unit in TOKEN_UNITS:
            return "nobody reads this request's body, so its tokens are not known"
        case "sessions":
            return "the request names no session and none is made"
        case "ucredits":
            return f"requests cost nothing under policy {rules.name}"
        case unit:
            return f"the request takes no {unit}"


def unmet(when: When, plan: str, asking: Asking, known: Collection[str] = CONDITIONS) -> Iterator[str]:
    """Each condition of `when` that does not hold, in words. known: those that can be judged."""
    for name in CONDITIONS:
        value = getattr(when, name)
        if value is None or name not in known:
            continue
        checks = compile_when(When.model_construct(**{name: value}), plan, asking.route)
        if checks is None or not all(check(asking) for check in checks):
            yield f"only {spoken(name, value)}, and {_has(name, plan, asking)}"


def conditions(when: When) -> str:
    """All of `when` in words; empty when it counts every request."""
    return ", ".join(spoken(name, value) for name in CONDITIONS if (value := getattr(when, name)) is not None)


def spoken(name: str, value: object) -> str:
    """One condition."""
    if name == "stream":
        return "when the answer is streamed" if value else "when the answer is not streamed"
    assert isinstance(value, tuple)  # When has nothing else
    words = {
        "plan": "for plan {}",
        "route": "on {}",
        "method": "for {}",
        "model": "for models {}",
        "header": "with the fields {}",
    }
    return words[name].format((" and " if name == "header" else " or ").join(value))


def _has(name: str, plan: str, asking: Asking) -> str:
    """What the request has instead."""
    facts, peek = asking.facts, asking.peek
    match name:
        case "plan":
            return f"the plan is {plan}"
        case "route":
            return f"the path is {facts.path}"
        case "method":
            return f"the method is {facts.method}"
        case "model":
            return "its model is not known" if peek is None or peek.model is None else f"its model is {peek.model}"
        case "stream":
            return "it asks for a stream" if peek is not None and peek.stream else "it asks for no stream"
        case _:
            return "it lacks one"


def portion(rule: Rule, asking: Asking) -> Mapping[str, str | None]:
    """What the limit is per, and the request's value of each; None where it has none: such requests share one."""
    return {
        dimension: known_on(asking.route, dimension) or reader(dimension)(asking) or None
        for dimension in rule.dimensions
    }


def amount(limit: Limit, number: int) -> str:
    """`number` of the limit's unit, credits as credits."""
    if limit.unit != "ucredits":
        return str(number)
    return f"{number / UCREDITS_PER_CREDIT:.15g}"


def worded(limit: Limit) -> str:
    """`20 requests in 1m`, `10 tokens per 1s, 20 at once`, `5 requests at once`"""
    unit = {"ucredits": "credits", "concurrent": "requests", "sessions": "new sessions"}.get(limit.unit, limit.unit)
    text = f"{amount(limit, limit.limit)} {unit.replace('_', ' ')}"
    match limit.kind:
        case "concurrent":
            return f"{text} at once"
        case "gcra":
            return f"{text} per {format_duration(limit.window_ms)}, {amount(limit, limit.burst)} at once"
        case "calendar" if limit.calendar is not None:
            return f"{text} per {limit.calendar.period} ({limit.calendar.zone})"
        case _:
            return f"{text} in {format_duration(limit.window_ms)}"

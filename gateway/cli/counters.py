"""How much memory the counters of limits can take in Redis at most, whatever clients do."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway import limits
from gateway.config import Settings
from gateway.policy import CompiledPolicy, PolicySet
from gateway.types import Limit


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one limit, for one org or in all."""

    limit: str
    counters_max: int
    #: Each.
    counter_bytes_max: int

    @property
    def bytes_max(self) -> int:
        return self.counters_max * self.counter_bytes_max


@dataclass(frozen=True, slots=True)
class Bounds:
    """For every policy that some plan lives under, what one org can take; and what all orgs share."""

    policies: dict[str, list[Counters]]
    shared: list[Counters]


@dataclass(slots=True)
class _Seen:
    """The subjects that a limit can have, over all routes."""

    limit: Limit
    known: set[str] = field(default_factory=set)
    slots: int = 0


def bounds(settings: Settings) -> Bounds:
    """The bounds with the limits as configured: an org with overrides may need more of some, or less."""
    policies = PolicySet.compile(settings)
    own: dict[str, dict[str, _Seen]] = {}
    shared: dict[str, _Seen] = {}
    for policy in policies.plans.values():
        _look(policy, settings, own.setdefault(policy.name, {}), shared)
    return Bounds({name: _counters(seen.values()) for name, seen in own.items()}, _counters(shared.values()))


def _look(policy: CompiledPolicy, settings: Settings, own: dict[str, _Seen], shared: dict[str, _Seen]) -> None:
    for route in settings.routes:
        here = policy.on(route)
        for applied in (*here.request.applied, *here.message.applied):
            limit = applied.rule.limit
            seen = (shared if limit.shared else own).setdefault(limit.name, _Seen(limit))
            if isinstance(applied.subject, str):
                seen.known.add(applied.subject)
            else:
                seen.slots = applied.rule.cardinality


def _counters(seen: Iterable[_Seen]) -> list[Counters]:
    return [Counters(one.limit.name, len(one.known) + one.slots, limits.bytes_max(one.limit)) for one in seen]

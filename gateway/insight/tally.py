"""What running a log against other policies has found: who would be refused, by what, and what it would cost."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gateway import policy
from gateway.config import Settings
from gateway.insight.logline import Judged, Line
from gateway.insight.world import Found
from gateway.policy import Asking, CompiledPolicy
from gateway.types import Limit

#: How a request was or is decided. CREDITS and BEFORE stay as they were.
ADMITTED = "admitted"
LIMITED = "rate_limit_exceeded"
OVERSIZED = "request_exceeds_limit"
CREDITS = "refused_for_credits"
BEFORE = "ended_before_its_limits"
#: Neither its route nor its plan is configured here.
FOREIGN = "not_configured_here"

EXAMPLES_MAX = 3
#: Requests decided otherwise than they were that are named.
CHANGES_MAX = 20

_CREDIT_CODES = ("insufficient_credits", "credits_in_flight")
#: Requests that ended so may have been in the middle of their admission.
_CUT_CODES = ("client_left", "shutting_down", "store_unavailable", "gateway_error")


def then(line: Line) -> str:
    """How the request was decided."""
    if line.admitted:
        return ADMITTED
    if line.decision in (LIMITED, OVERSIZED):
        return line.decision
    return CREDITS if line.decision in _CREDIT_CODES else BEFORE


@dataclass(slots=True)
class OfOrg:
    """One org's requests."""

    requests: int = 0
    admitted_then: int = 0
    admitted_now: int = 0
    #: By a limit.
    refused_then: int = 0
    refused_now: int = 0
    ucredits_then: int = 0
    ucredits_now: int = 0


@dataclass(slots=True)
class OfLimit:
    """What one limit would have refused of one org. Of a shadow: what it would, if it were none."""

    org: str
    limit: str
    unit: str
    scope: str
    shadow: bool
    shared: bool
    count: int = 0
    #: Of those, how many were admitted then.
    newly: int = 0
    first_us: int = 0
    last_us: int = 0
    #: Ids of requests; of such that were admitted then, if there are any.
    examples: list[str] = field(default_factory=list)
    _newly_named: int = 0

    def add(self, line: Line, at_us: int, *, newly: bool) -> None:
        self.count += 1
        self.newly += newly
        self.first_us = min(self.first_us or at_us, at_us)
        self.last_us = max(self.last_us, at_us)
        if newly and self._newly_named < EXAMPLES_MAX:
            self.examples.insert(self._newly_named, line.request_id)
            self._newly_named += 1
            del self.examples[EXAMPLES_MAX:]
        elif len(self.examples) < EXAMPLES_MAX:
            self.examples.append(line.request_id)


@dataclass(frozen=True, slots=True)
class Change:
    """One request that is decided otherwise, or by another limit."""

    request_id: str
    org: str
    then: str
    then_limit: str | None
    now: str
    now_limit: str | None


class Tally:
    """Filled by a Rerun."""

    def __init__(self, settings: Settings) -> None:
        self.orgs: dict[str, OfOrg] = {}
        self.refusals: dict[tuple[str, str], OfLimit] = {}
        #: How many were decided so then, and so now.
        self.decisions: Counter[tuple[str, str]] = Counter()
        #: Decided as then, by the same limit.
        self.alike = 0
        self.changed = 0
        self.changes: list[Change] = []
        #: What limits had used, as the log says and as it was found here.
        self.used_alike = 0
        self.used_differs = 0
        self.used_examples: list[str] = []
        self.first_us = 0
        self.last_us = 0
        self._unknown: Counter[str] = Counter()
        self._headers = {name: 0 for name in policy.headers_needed(settings)}
        self._claims = {name: 0 for name in policy.claims_needed(settings)}

    def begin(self, line: Line, was: str) -> None:
        at_us = line.judged_at_us or line.begun_at_us
        self.first_us, self.last_us = min(self.first_us or at_us, at_us), max(self.last_us, at_us)
        for name in line.headers.keys() & self._headers.keys():
            self._headers[name] += 1
        for name in line.claims.keys() & self._claims.keys():
            self._claims[name] += 1
        if line.org is None:
            return
        org = self._org(line)
        org.requests += 1
        org.admitted_then += was == ADMITTED
        org.refused_then += was in (LIMITED, OVERSIZED)
        org.ucredits_then += line.charged_ucredits or 0
        if was == ADMITTED:
            self._unknown["messages"] += line.messages_in or 0
            self._unknown["unsettled"] += bool(line.limits) and not (line.settled_at_us or line.shared_settled_at_us)
        elif was == BEFORE and line.policy is not None and line.decision in _CUT_CODES:
            self._unknown["cut"] += 1

    def look(self, line: Line, asking: Asking, rules: CompiledPolicy) -> None:
        """What the log does not say of a request that is to be judged, and these policies would have to know."""
        if asking.peek is None and asking.route.usage is not None and line.messages_in is None:
            self._unknown["body"] += policy.needs_peek(rules, asking.route)

    def stays(self, line: Line, was: str, *, known: bool = True) -> None:
        """Nothing here decides it. known: as far as this configuration goes."""
        self.decisions[was, was if known else FOREIGN] += 1

    def decided(self, line: Line, was: str, now: str, limit: Limit | None, at_us: int, ucredits: int = 0) -> None:
        """The request is decided."""
        self.decisions[was, now] += 1
        org = self._org(line)
        org.admitted_now += now == ADMITTED
        org.ucredits_now += ucredits
        if limit is not None:
            org.refused_now += 1
            self._of_limit(line, limit).add(line, at_us, newly=was == ADMITTED)
        named = None if limit is None else limit.name
        if (was, line.limit) == (now, named):
            self.alike += 1
            return
        self.changed += 1
        if len(self.changes) < CHANGES_MAX:
            self.changes.append(Change(line.request_id, line.org or "", was, line.limit, now, named))

    def judged(self, line: Line, found: Sequence[Found], at_us: int) -> None:
        """Limits were asked for the request."""
        if line.judged_at_us is None and line.shared_judged_at_us is None:
            self._unknown["time"] += 1
        elif line.session_known is None and line.turn is None:
            self._unknown["session"] += any(one.demand.member for one in found)
        then_judged = {judged.name: judged for judged in line.limits if not judged.denied_at_us}
        for one in found:
            limit = one.demand.limit
            if limit.shadow and one.retry_ms:
                self._of_limit(line, limit).add(line, at_us, newly=False)
            if (judged := then_judged.get(limit.name)) is not None:
                self.compare(line, judged, one.used)

    def compare(self, line: Line, judged: Judged, used: int) -> None:
        """What a limit had used, here and by the log. Of use where both were under the same policies."""
        if judged.used == used:
            self.used_alike += 1
            return
        self.used_differs += 1
        if len(self.used_examples) < CHANGES_MAX:
            self.used_examples.append(f"{line.request_id} {judged.name}: {judged.used} in the log, {used} here")

    def notes(self) -> Iterator[str]:
        """What this run cannot know, or had to assume, in sentences."""
        unknown, decisions = self._unknown, self.decisions
        yield "Counters begin empty with the first line: what was used before it is not in the log."
        counted = {
            "Requests that had no limit and no price then, so that Redis never judged them: the gateway's clock says "
            "when they came": unknown["time"],
            "Requests that were settled after their line was written: they end here when their line ends": unknown[
                "unsettled"
            ],
            "Requests whose body was not read then, so that nothing is known of their model and tokens: limits that "
            "need it pass them by": unknown["body"],
            "Requests of which the log does not say whether their session was an old one: they count as new, unless "
            "they are in the window": unknown["session"],
            "Messages of WebSockets, which are not in the log: they take nothing of any limit here, and cost what as "
            "many would if all were admitted": unknown["messages"],
            "Requests that ended while they were being admitted, or before: what they may have taken for a moment is "
            "not in the log": unknown["cut"],
            "Requests refused for want of credits, which stay so: balances are not in the log": decisions[
                CREDITS, CREDITS
            ],
            "Requests that ended before their limits were asked, which stay so": decisions[BEFORE, BEFORE],
            "Requests of a route or a plan that this configuration does not have, which are left out": sum(
                count for (_, now), count in decisions.items() if now == FOREIGN
            ),
            "Requests that were refused then and fit now: they are taken to end as they were reserved, after as long "
            "as others on their route took": sum(
                count for (was, now), count in decisions.items() if now == ADMITTED != was
            ),
        }
        yield from (f"{sentence}: {count}." for sentence, count in counted.items() if count)
        for kind, seen in (("header", self._headers), ("claim", self._claims)):
            for name in sorted(name for name, count in seen.items() if not count):
                yield (
                    f"No line has the {kind} {name!r}, which a limit depends on: no request had it, or the gateway "
                    "that wrote the log had no such limit and did not note it."
                )

    def _org(self, line: Line) -> OfOrg:
        name = line.org or ""
        found = self.orgs.get(name)
        if found is None:
            found = self.orgs[name] = OfOrg()
        return found

    def _of_limit(self, line: Line, limit: Limit) -> OfLimit:
        key = line.org or "", limit.name
        found = self.refusals.get(key)
        if found is None:
            found = OfLimit(key[0], limit.name, limit.unit, limit.scope, limit.shadow, limit.shared)
            self.refusals[key] = found
        return found

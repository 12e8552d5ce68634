"""What the gateway would answer a request now, and everything that it would look at on the way."""

from dataclasses import dataclass, field

from gateway import keys, policy, websocket
from gateway.admission import Hold
from gateway.admission.refusals import credit_refusal, limit_refusal
from gateway.config import MethodMismatch, Route, RouteTable, Settings
from gateway.downstream import fresh_id, too_large
from gateway.errors import BadRequest, GatewayError, MethodNotAllowed, UnknownRoute
from gateway.insight.applying import Bearing, bearings
from gateway.policy import Asking, CompiledPolicy, PolicySet
from gateway.session import SESSION_ID
from gateway.types import Demand, Facts, Peek, Principal, Quote, Refusal
from gateway.usage import READERS, tokens_of

_TOKEN_UNITS = ("tokens", "input_tokens", "output_tokens")


@dataclass
class Prospect:
    """A request that nobody has sent, as far as it would get; what it did not get to is empty."""

    facts: Facts
    route: Route | None = None
    principal: Principal | None = None
    rules: CompiledPolicy | None = None
    peek: Peek | None = None
    asking: Asking | None = None
    bearings: tuple[Bearing, ...] = ()
    quote: Quote | None = None
    #: What refuses it before any limit is asked.
    refusal: Refusal | None = None
    #: What was taken for granted, in sentences.
    notes: list[str] = field(default_factory=list)

    @property
    def demands(self) -> tuple[Demand, ...]:
        return tuple(bearing.demand for bearing in self.bearings if bearing.demand is not None)


def find_route(settings: Settings, prospect: Prospect) -> None:
    """`prospect` has its route, or the refusal of a request without one."""
    facts = prospect.facts
    try:
        route = RouteTable.compile(settings.routes).match(facts.method, facts.target)
    except GatewayError as exc:  # an ambiguous path, or what is no path
        prospect.refusal = exc.refusal()
        return
    if isinstance(route, Route):
        prospect.route = route
    elif isinstance(route, MethodMismatch):
        prospect.refusal = MethodNotAllowed(allow=route.allowed).refusal()
    else:
        prospect.refusal = UnknownRoute().refusal()


def look(
    settings: Settings, prospect: Prospect, principal: Principal, overrides: dict[str, int], body: bytes | None
) -> None:
    """`prospect`, whose route is known, has all that its limits need, or what refuses it before them. The order is the
    walk's. body: None: it was not given."""
    assert prospect.route is not None  # the caller looked
    prospect.principal = principal
    rules = PolicySet.compile(settings).plan(principal.plan)
    if rules is None:
        prospect.refusal = policy.unknown_plan(principal.plan)
        return
    prospect.rules = rules
    try:
        prospect.refusal = _refused_handshake(prospect)
        if prospect.refusal is not None:
            return
        prospect.peek = _peek(prospect, rules, body)
        session = _session(settings, prospect)
    except BadRequest as exc:
        prospect.refusal = exc.refusal()
        return
    quote = policy.quote(rules, prospect.route, prospect.peek, settings.credits)
    if isinstance(quote, Refusal):
        prospect.refusal = quote
        return
    prospect.quote = quote
    asking = Asking(principal, prospect.facts, prospect.route, prospect.peek, session, overrides)
    prospect.asking, prospect.bearings = asking, bearings(rules, asking)
    oversized = policy.never_fits(prospect.demands)
    if oversized is not None:
        prospect.refusal = policy.request_exceeds_limit(oversized)


def _refused_handshake(prospect: Prospect) -> Refusal | None:
    facts, route = prospect.facts, prospect.route
    if route is None or not websocket.is_handshake(facts.headers):
        return None
    return websocket.refused(facts.method, facts.http_version, facts.headers, allowed=route.websocket is not None)


def _peek(prospect: Prospect, rules: CompiledPolicy, body: bytes | None) -> Peek | None:
    """What the gateway would read of the body. Raises BadRequest where it would refuse it."""
    route = prospect.route
    assert route is not None  # `look` has it
    if websocket.is_handshake(prospect.facts.headers):
        return None
    if body is not None and len(body) > route.body_bytes_max:
        raise too_large(route.body_bytes_max)
    format = READERS.get(route.usage or "none")
    if format is None:
        return None
    needed = policy.needs_peek(rules, route)
    if body is None:
        if needed:
            prospect.notes.append(
                "No --body was given: the request is taken to have one that says nothing, not even a model. The "
                "gateway would read it, and refuse one that is none."
            )
        return Peek(0)
    try:
        return format.peek(body)
    except BadRequest:
        if needed:
            raise
        return Peek(len(body))


def _session(settings: Settings, prospect: Prospect) -> str | None:
    """The digest of the request's session. Raises BadRequest for an id that is none."""
    header = settings.sessions.header
    given = prospect.facts.header(header.encode())
    if given is None:
        return keys.digest(f"ses_{fresh_id()}") if settings.sessions.mint else None
    if not SESSION_ID.fullmatch(given):
        raise BadRequest(f"{header} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
    return keys.digest(given)


def tokens_in_words(prospect: Prospect) -> str | None:
    """How the token estimate was made; None where no limit counts tokens."""
    costs = {demand.limit.unit: demand.cost for demand in prospect.demands if demand.limit.unit in _TOKEN_UNITS}
    peek, rules = prospect.peek, prospect.rules
    if not costs or peek is None or rules is None:
        return None
    estimate = tokens_of(peek.body_bytes)
    text = f"input {max(1, estimate)}: {peek.body_bytes} bytes of body, 4 to a token; "
    if peek.max_output_tokens is not None:
        return text + f"output {peek.max_output_tokens}: what the client allows"
    cut = policy.token_estimate(peek, rules.default_output_tokens, [demand.limit for demand in prospect.demands])
    output = cut["output_tokens"]
    text += f"output {output}: the client names no maximum, the policy reserves {rules.default_output_tokens}"
    return text if output == rules.default_output_tokens else f"{text}, cut to what its limits let through at once"


def judge(
    prospect: Prospect, shared: Hold | None, own: Hold | None, owned_ucredits: int | None, held_ucredits: int
) -> Refusal | None:
    """What the gateway would answer now; None: the request is admitted. shared, own: as they were peeked at.

    owned_ucredits: None: nobody knows, so nobody is refused for it."""
    if prospect.refusal is not None or prospect.quote is None:
        return prospect.refusal
    price = prospect.quote.least_ucredits
    if shared is not None and _denies(shared):
        return limit_refusal(shared.states)
    if price and owned_ucredits is not None and owned_ucredits - held_ucredits < price:
        status = "NOCREDIT" if owned_ucredits < price else "INFLIGHT"
        return credit_refusal(status, prospect.quote, owned_ucredits - held_ucredits, owned_ucredits)
    return limit_refusal(own.states) if own is not None and _denies(own) else None


def _denies(hold: Hold) -> bool:
    return any(state.retry_ms and not state.limit.shadow for state in hold.states)

"""THE WALK: the one place that knows the order in which a request goes through the rooms.

    read → identify → match → admit → attach → forward → meter → settle

Leaving the `hold` block settles exactly once, whatever happened inside it. A refusal is a value and becomes an
answer in the route's dialect; a failure is an exception of `errors` and becomes one too, as long as no byte of an
answer has been sent; after that the connection is cut, never ended as if the answer were whole.
"""

import asyncio
from collections.abc import AsyncIterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from gateway import charge, headers, keys, policy
from gateway.admission import Admission, Hold
from gateway.config import MethodMismatch, Route, RouteTable
from gateway.dialects import DIALECTS
from gateway.downstream import Client, Patience, Receive, Send, fresh_id, read_facts, too_large
from gateway.errors import BadRequest, ClientLeft, GatewayError, MethodNotAllowed, UnknownRoute
from gateway.headers import Network
from gateway.identity import Identified, Identity
from gateway.meter import Meter, unanswered
from gateway.policy import CompiledPolicy, PolicySet
from gateway.session import Sessions
from gateway.telemetry import AccessLog, Metrics, Record
from gateway.types import Facts, Outcome, Peek, Principal, Refusal, Session
from gateway.upstream import Answer, Upstreams
from gateway.usage import READERS

log = structlog.get_logger("gateway.proxy")

SESSION_FIELD = frozenset((b"x-session-id",))
#: The upstream is addressed by its own name, as virtual hosts and TLS want it; X-Forwarded-Host has the client's.
HOST_FIELD = frozenset((b"host",))

Body = bytes | AsyncIterable[bytes] | None


@dataclass(frozen=True, slots=True)
class Steps:
    """The rooms, opened and wired by `app.py`."""

    routes: RouteTable
    identity: Identity
    policies: PolicySet
    admission: Admission
    sessions: Sessions
    upstreams: Upstreams
    metrics: Metrics
    access_log: AccessLog
    trusted_proxies: Sequence[Network]
    client_idle_ms: int


class Proxy:
    """A pure ASGI endpoint for every path that is not the gateway's own."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._patience = Patience(steps.client_idle_ms)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        hold_id = fresh_id()
        client = Client(receive, send, self._patience)
        facts = read_facts(scope, hold_id, self._steps.trusted_proxies)
        record = Record(facts.request_id, facts.method, facts.path, facts.client_ip)
        walk = Walk(self._steps, client, facts, hold_id, scope.get("scheme", "http"), record)
        try:
            await walk.go()
        except asyncio.CancelledError:
            if not client.left:
                raise  # the server is shutting down
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            record.status, record.decision = ClientLeft.status, ClientLeft.code
        finally:
            client.close()
            record.response_bytes = client.sent_bytes
            self._steps.access_log.write(record)
            self._steps.metrics.observe(record)


class Walk:
    """One request on its way. State: what is known so far, for the answer and the log."""

    __slots__ = ("_client", "_dialect", "_facts", "_hold_id", "_record", "_scheme", "_session", "_steps")

    def __init__(self, steps: Steps, client: Client, facts: Facts, hold_id: str, scheme: str, record: Record) -> None:
        self._steps = steps
        self._client = client
        self._facts = facts
        self._hold_id = hold_id
        self._scheme = scheme
        self._record = record
        self._dialect = DIALECTS["problem"]
        self._session: Session | None = None

    async def go(self) -> None:
        """The client has its answer, or its connection is to be cut. Raises only CancelledError."""
        record = self._record
        try:
            refusal = await self._handle()
        except ClientLeft as exc:
            record.status, record.decision = exc.status, exc.code
            return
        except GatewayError as exc:
            refusal, record.error = exc.refusal(), str(exc)
        except Exception:
            log.exception("the walk failed", request_id=record.request_id)
            refusal, record.error = GatewayError().refusal(), "internal error"
        if refusal is None:
            return
        record.decision = refusal.code
        record.limit = refusal.details.get("limit")
        if self._client.started:
            return  # the answer's own status stays; returning without its end makes the server cut the connection
        record.status = refusal.status
        await self._refuse(refusal)

    async def _handle(self) -> Refusal | None:
        steps, facts, record = self._steps, self._facts, self._record
        route = self._route()
        identified = await steps.identity.identify(facts)
        principal = identified.principal
        self._note_principal(principal)
        rules = steps.policies.plan(principal.plan)
        if rules is None:
            return policy.unknown_plan(principal.plan)
        body, peek = await self._read(route, rules)
        named = steps.sessions.name(facts, self._hold_id)
        demands = policy.demands(rules, principal, facts, peek, named.session_id if named else None)
        if (oversized := policy.never_fits(demands)) is not None:
            return policy.request_exceeds_limit(oversized)
        # Asked now so that it leaves with the admission, in one write.
        found = steps.sessions.begin(principal, named) if named else None
        async with steps.admission.hold(self._hold_id, principal, demands, rules.price_ucredits) as verdict:
            record.phase("admit")
            if isinstance(verdict, Refusal):
                return verdict
            record.hold_id, record.available_ucredits = self._hold_id, verdict.available_ucredits
            if named is not None:
                self._session = await steps.sessions.attach(principal, named, found)
                record.session_digest, record.turn = keys.digest(named.session_id), self._session.turn
            await self._forward(route, identified, verdict, body, peek)
        return None

    def _route(self) -> Route:
        route = self._steps.routes.match(self._facts.method, self._facts.path)
        if route is None:
            raise UnknownRoute
        self._dialect = DIALECTS[route.dialect]
        if isinstance(route, MethodMismatch):
            raise MethodNotAllowed(allow=route.allowed)
        self._record.route = route.name
        return route

    def _note_principal(self, principal: Principal) -> None:
        record = self._record
        record.org_id, record.user_id, record.key_id = principal.org_id, principal.user_id, principal.key_id
        record.plan, record.source = principal.plan, principal.source
        record.phase("identify")

    async def _read(self, route: Route, rules: CompiledPolicy) -> tuple[Body, Peek | None]:
        """The body, buffered where a limit must know what it asks for, and what it says; else as it comes."""
        facts = self._facts
        length = facts.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > route.body_bytes_max:
            raise too_large(route.body_bytes_max)
        format = READERS.get(route.usage or "none")
        if format is not None and policy.needs_peek(rules):
            body = await self._client.whole_body(route.body_bytes_max)
            return body, self._note_peek(format.peek(body))
        if length is None and facts.header(b"transfer-encoding") is None:
            return None, None if format is None else Peek(0)
        arrived = await self._client.arrived()
        if arrived is None:
            return self._client.body(route.body_bytes_max), None if format is None else Peek(int(length or 0))
        if len(arrived) > route.body_bytes_max:
            raise too_large(route.body_bytes_max)
        if format is None:
            return arrived, None
        try:
            return arrived, self._note_peek(format.peek(arrived))
        except BadRequest:
            # Nothing here depends on what it says, so the upstream may judge it.
            return arrived, Peek(len(arrived))

    def _note_peek(self, peek: Peek) -> Peek:
        self._record.model, self._record.stream = peek.model, peek.stream
        return peek

    async def _forward(self, route: Route, identified: Identified, hold: Hold, body: Body, peek: Peek | None) -> None:
        """The answer has been relayed as far as both sides were there, and `hold.charge` says what it costs."""
        record = self._record
        # Until an answer begins nothing was delivered: a 502 or 504 of ours costs the client nothing. Nor does an
        # upstream's own error, however far it came.
        outcome, meter, refused = Outcome.UPSTREAM_REFUSED, None, False
        forwarding = self._steps.upstreams.forward(
            route.upstream, self._facts.method, self._facts.target, self._outbound(route, identified), body
        )
        try:
            async with forwarding as answer:
                record.phase("first_byte")
                refused = answer.status >= 400
                outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.UPSTREAM_BROKE
                meter = self._meter(route, answer, peek)
                await self._relay(answer, meter)
            outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.COMPLETE
        except (asyncio.CancelledError, ClientLeft):
            outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.CLIENT_LEFT
            raise
        finally:
            self._settle(hold, outcome if forwarding.reached else Outcome.NEVER_REACHED, meter, peek)

    def _settle(self, hold: Hold, outcome: Outcome, meter: Meter | None, peek: Peek | None) -> None:
        """Say what the hold is to book; the block around us does it."""
        record, principal = self._record, hold.principal
        if meter is not None:
            usage = meter.usage(complete=outcome is Outcome.COMPLETE)
        else:
            usage = unanswered(peek) if peek is not None and outcome is Outcome.CLIENT_LEFT else None
        booked = charge.settle(outcome, usage, hold.ucredits, hold.token_estimate)
        hold.charge = booked
        record.outcome, record.basis, record.charged_ucredits = outcome.value, booked.basis, booked.ucredits
        record.decision = "admitted"
        if usage is not None:
            record.input_tokens, record.output_tokens = usage.input_tokens, usage.output_tokens
            record.model = usage.model or record.model
        hold.meta = {
            "request_id": record.request_id,
            "route": record.route,
            "outcome": record.outcome,
            "status": record.status,
            "model": record.model,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "user": principal.user_id,
            "key": principal.key_id,
        }
        if self._session is not None and outcome is not Outcome.NEVER_REACHED:
            tokens = usage.total_tokens if usage else 0
            self._steps.sessions.remember(principal, self._session, tokens, record.model)

    def _meter(self, route: Route, answer: Answer, peek: Peek | None) -> Meter | None:
        format = READERS.get(route.usage or "none")
        if format is None or peek is None:
            return None
        fields = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
        return Meter(
            format.reader(fields.get(b"content-type", ""), fields.get(b"content-encoding", "")), peek, answer.status
        )

    async def _relay(self, answer: Answer, meter: Meter | None) -> None:
        client, record = self._client, self._record
        record.status = answer.status
        # The upstream's own id for the request is its customers' to quote; ours stands beside it.
        taken = any(name.lower() == b"x-request-id" for name, _ in answer.headers)
        added = [(b"x-gateway-request-id" if taken else b"x-request-id", record.request_id.encode())]
        if self._session is not None:
            added.append((b"x-session-id", self._session.session_id.encode()))
        await client.start(answer.status, headers.to_client(answer.headers, added, strip=SESSION_FIELD))
        async for chunk in answer.chunks:
            if meter is not None:
                meter.see(chunk)
            await client.write(chunk)
        await client.finish()

    def _outbound(self, route: Route, identified: Identified) -> list[tuple[bytes, bytes]]:
        """The request's head for the upstream: what the client sent, less what it may not say, plus what we know."""
        facts, steps, principal = self._facts, self._steps, identified.principal
        trusted = headers.is_trusted(facts.peer_ip, steps.trusted_proxies)
        added = [
            (b"x-request-id", facts.request_id.encode()),
            (b"x-org-id", principal.org_id.encode()),
            (b"x-plan", principal.plan.encode()),
            *headers.forwarded(facts.headers, facts.peer_ip, self._scheme, facts.header(b"host") or "", trusted),
        ]
        if principal.user_id is not None:
            added.append((b"x-user-id", principal.user_id.encode()))
        if self._session is not None:
            added += steps.sessions.headers(self._session, principal, facts)
        strip = HOST_FIELD | steps.identity.asserted_headers | steps.sessions.attached_names
        if not route.forward_credential:
            strip |= identified.credential_headers
        return headers.to_upstream(facts.headers, strip=strip, add=added)

    async def _refuse(self, refusal: Refusal) -> None:
        rendered = self._dialect.render(refusal, self._record.request_id)
        try:
            await self._client.start(rendered.status, rendered.headers)
            await self._client.finish(rendered.body)
        except ClientLeft:
            return

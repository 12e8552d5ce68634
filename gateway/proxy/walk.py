"""The order in which a request goes through the rooms.

    read → identify → match → admit → attach → forward → meter → settle

Leaving the `hold` block settles exactly once, whatever happened inside it. A refusal is a value and becomes an
answer in the route's dialect; a failure is an exception of `errors` and becomes one too, as long as no byte of an
answer has been sent; after that the connection is cut, never ended as if the answer were whole.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace

import structlog

from gateway import keys, policy, websocket
from gateway.admission import Hold
from gateway.config import MethodMismatch, Route
from gateway.dialects import DIALECTS
from gateway.downstream import Client, too_large
from gateway.errors import (
    BadRequest,
    ClientLeft,
    GatewayError,
    MethodNotAllowed,
    OutOfCredits,
    Unauthenticated,
    UnknownRoute,
)
from gateway.identity import Identified
from gateway.policy import CompiledPolicy
from gateway.proxy.noting import note_limits
from gateway.proxy.passage import LOCAL_FIELD, Body, Passage
from gateway.proxy.steps import Steps
from gateway.proxy.websocket import WebSocketPassage
from gateway.telemetry import Record
from gateway.types import Facts, Peek, Principal, Refusal, Session
from gateway.usage import READERS

log = structlog.get_logger("gateway.proxy")


class Walk:
    """One request on its way. State: what is known so far, for the answer and the log."""

    def __init__(self, steps: Steps, client: Client, facts: Facts, hold_id: str, record: Record) -> None:
        self._steps = steps
        self._client = client
        self._facts = facts
        self._hold_id = hold_id
        self._record = record
        self._dialect = DIALECTS["problem"]
        self._passage: Passage | None = None
        self._hold: Hold | None = None
        #: What the client calls the request, where that counts.
        self._key: str | None = None
        self._ended_by: GatewayError | None = None
        #: The gateway ends an answer of its own will, and says so in the answer as far as its format allows.
        self._explains = False
        self._task = asyncio.current_task()

    def end(self, error: GatewayError) -> None:
        """The walk ends now, and tells the client `error` where it still can. The first call counts."""
        if self._ended_by is None and self._task is not None:
            self._ended_by = error
            self._task.cancel()

    def note_limits(self) -> None:
        """The record says how each limit was judged, and what it was given in the end."""
        if self._hold is not None:
            note_limits(self._record, self._hold)

    async def go(self) -> None:
        """The client has its answer, or its connection is to be cut. Raises only CancelledError."""
        record = self._record
        try:
            refusal = await self._handle()
        except ClientLeft:
            self._client.left = True
            return
        except asyncio.CancelledError:
            if self._ended_by is None or self._client.left:
                raise
            assert self._task is not None
            self._task.uncancel()
            self._explains = True
            refusal, record.error = self._ended_by.refusal(), str(self._ended_by)
        except OutOfCredits as exc:
            self._explains = True
            refusal, record.error = exc.refusal(), str(exc)
        except GatewayError as exc:
            refusal, record.error = exc.refusal(), str(exc)
        except Exception:
            log.exception("the walk failed", request_id=record.request_id)
            refusal, record.error = GatewayError().refusal(), "internal error"
        if refusal is not None:
            record.decision = refusal.code
            record.limit = refusal.details.get("limit")
            await self._tell(refusal)

    async def _handle(self) -> Refusal | None:
        steps, facts, record = self._steps, self._facts, self._record
        if (refusal := self._flooding()) is not None:
            return refusal
        route, identified = await self._identify()
        principal = identified.principal
        self._note_principal(principal)
        rules = steps.policies.plan(principal.plan)
        if rules is None:
            return policy.unknown_plan(principal.plan)
        record.policy = rules.name
        opens = websocket.is_handshake(facts.headers)
        if opens:
            if (refusal := self._refused_handshake(route)) is not None:
                return refusal
            body, peek = None, None
        else:
            self._key = steps.idempotency.key(facts) if route.idempotency else None
            body, peek = await self._read(route, rules)
        named = steps.sessions.name(facts, self._hold_id)
        overrides = steps.overrides.of(principal.org_id)
        session = keys.digest(named.session_id) if named else None
        self._note_asking(principal, overrides, session)
        quote = policy.quote(rules, route, peek, steps.credits)
        if isinstance(quote, Refusal):
            return quote
        asking = policy.Asking(principal, facts, route, peek, session, overrides)
        demands = policy.demands(rules, asking)
        if (oversized := policy.never_fits(demands)) is not None:
            return policy.request_exceeds_limit(oversized)
        async with self._once(principal, body) as known:
            if known is not None:
                return known
            # Asked now so that it leaves with the admission, in one write.
            found = steps.sessions.begin(principal, named) if named else None
            holding = steps.admission.hold(self._hold_id, principal, demands, quote)
            self._hold = holding.hold
            async with holding as verdict:
                record.phase("admit")
                if isinstance(verdict, Refusal):
                    return verdict
                record.hold_id, record.available_ucredits = self._hold_id, verdict.available_ucredits
                talk: Session | None = None
                if named is not None:
                    talk = await steps.sessions.attach(principal, named, found)
                    record.turn = talk.turn
                passage = WebSocketPassage if opens else Passage
                self._passage = passage(steps, self._client, facts, route, identified, verdict, talk, record)
                await self._passage.through(body, peek)
        return None

    def _once(self, principal: Principal, body: Body) -> AbstractAsyncContextManager[Refusal | None]:
        """The block around a request that its client may send again; what went wrong with that is in the way."""
        if self._key is None:
            return nullcontext()
        assert body is None or isinstance(body, bytes)
        return self._steps.idempotency.once(self._key, principal, self._facts, body or b"", self._hold_id, self._record)

    def _flooding(self) -> Refusal | None:
        """Whose network has failed too often is not asked who it is, unless its credential is known already."""
        refusal = self._steps.floodgate.refusal(self._facts.client_ip)
        if refusal is None or self._steps.identity.remembers(self._facts):
            return None
        with suppress(GatewayError):
            self._route()  # for its dialect; nobody is told now what is wrong with it
        return refusal

    async def _identify(self) -> tuple[Route, Identified]:
        """Where it goes and who asks. Who is refused here is nobody's, and its network answers for it."""
        try:
            return self._route(), await self._steps.identity.identify(self._facts)
        except (BadRequest, MethodNotAllowed, Unauthenticated, UnknownRoute, asyncio.CancelledError):
            # Leaving before the answer is no way out: the stores have been asked all the same.
            if not self._steps.identity.remembers(self._facts):
                self._steps.floodgate.failed(self._facts.client_ip)
            raise

    def _route(self) -> Route:
        route = self._steps.routes.match(self._facts.method, self._facts.target)
        if route is None:
            raise UnknownRoute
        self._dialect = DIALECTS[route.dialect]
        if isinstance(route, MethodMismatch):
            raise MethodNotAllowed(allow=route.allowed)
        self._record.route = route.name
        return route

    def _refused_handshake(self, route: Route) -> Refusal | None:
        facts = self._facts
        allowed = route.websocket is not None
        return websocket.refused(facts.method, facts.http_version, facts.headers, allowed=allowed)

    def _note_principal(self, principal: Principal) -> None:
        record = self._record
        record.org_id, record.user_id, record.key_id = principal.org_id, principal.user_id, principal.key_id
        record.plan, record.source = principal.plan, principal.source
        record.phase("identify")

    def _note_asking(self, principal: Principal, overrides: Mapping[str, int], session: str | None) -> None:
        """With this the log says all that a limit may depend on."""
        record, noted = self._record, self._steps.noted_headers
        record.session_digest = session
        if principal.claims:
            record.claims = principal.claims
        if overrides:
            record.overrides = overrides
        if noted:
            fields = {name: value for name, value in reversed(self._facts.headers) if name in noted}
            record.headers = {
                name.decode("latin-1"): value.decode("latin-1")[: policy.VALUE_CHARS_MAX]
                for name, value in fields.items()
            }

    async def _read(self, route: Route, rules: CompiledPolicy) -> tuple[Body, Peek | None]:
        """The body, buffered where a limit must know what it asks for, and what it says; else as it comes."""
        facts = self._facts
        length = facts.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > route.body_bytes_max:
            raise too_large(route.body_bytes_max)
        format = READERS.get(route.usage or "none")
        if format is not None and policy.needs_peek(rules, route):
            body = await self._client.whole_body(route.body_bytes_max)
            return body, self._note_peek(format.peek(body))
        if length is None and facts.header(b"transfer-encoding") is None:
            return None, None if format is None else Peek(0)
        # What it is called stands for all of it.
        whole = self._key is not None
        arrived = await (self._client.whole_body(route.body_bytes_max) if whole else self._client.arrived())
        if arrived is None:
            self._record.body_bytes = None if length is None else int(length)
            return self._client.body(route.body_bytes_max), None if format is None else Peek(int(length or 0))
        if len(arrived) > route.body_bytes_max:
            raise too_large(route.body_bytes_max)
        self._record.body_bytes = len(arrived)
        if format is None:
            return arrived, None
        try:
            return arrived, self._note_peek(format.peek(arrived))
        except BadRequest:
            # Nothing here depends on what it says, so the upstream may judge it.
            return arrived, Peek(len(arrived))

    def _note_peek(self, peek: Peek) -> Peek:
        record = self._record
        record.model, record.stream = peek.model, peek.stream
        record.body_bytes, record.max_output_tokens = peek.body_bytes, peek.max_output_tokens
        return peek

    async def _tell(self, refusal: Refusal) -> None:
        """The client is told as much as it can still be told."""
        client = self._client
        try:
            if not client.started:
                if refusal.limits and not self._steps.limit_headers:
                    refusal = replace(refusal, limits=())
                rendered = self._dialect.render(refusal, self._record.request_id)
                self._record.status = rendered.status
                local = self._hold is not None and self._hold.judged_by == "local"
                await client.start(rendered.status, (*rendered.headers, LOCAL_FIELD) if local else rendered.headers)
                await client.finish(rendered.body)
            elif self._explains and self._passage is not None and self._passage.between_events:
                # The answer's own status stays. Without a last event the server cuts the connection when we return.
                if event := self._dialect.stream_error(refusal):
                    await client.finish(event, trailers=() if self._passage.awaits_trailers else None)
        except ClientLeft:
            return

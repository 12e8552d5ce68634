"""An admitted request on its way to the upstream and its answer on the way back: forward, meter, settle."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import suppress

from gateway import charge, headers
from gateway.admission import Hold
from gateway.config import Route
from gateway.dialects import ratelimit
from gateway.downstream import Client
from gateway.errors import ClientLeft, OutOfCredits
from gateway.identity import Identified
from gateway.meter import Meter, unanswered
from gateway.proxy.boundary import Boundary
from gateway.proxy.spending import Spending, output_paid_for
from gateway.proxy.steps import Steps
from gateway.telemetry import Record
from gateway.types import Facts, Outcome, Peek, Session
from gateway.upstream import Answer, Forwarding
from gateway.usage import READERS

Field = tuple[bytes, bytes]
Body = bytes | AsyncIterable[bytes] | None

#: Its limits were counted by this process alone, because Redis is away.
LOCAL_FIELD = (b"x-gateway-limits", b"local")
SESSION_FIELD = frozenset((b"x-session-id",))
EXPECT_FIELD = frozenset((b"expect",))
#: What says something of a body's bytes (RFC 9530, and before it RFC 1864 and 3230), which a changed body is not.
DIGEST_FIELDS = frozenset((b"content-md5", b"digest", b"content-digest", b"repr-digest"))
#: How much more of an event is delivered, and how long it is waited for, when the credits end in the middle of it.
EVENT_REST_BYTES_MAX = 64 * 1024
EVENT_REST_S = 1.0


class Passage:
    """One request between its admission and its settlement."""

    def __init__(
        self,
        steps: Steps,
        client: Client,
        facts: Facts,
        route: Route,
        identified: Identified,
        hold: Hold,
        session: Session | None,
        record: Record,
    ) -> None:
        self._steps = steps
        self._client = client
        self._facts = facts
        self._route = route
        self._identified = identified
        self._hold = hold
        self._session = session
        self._record = record
        #: Of an event stream that is passed on as it can be read.
        self._boundary: Boundary | None = None
        #: The answer was begun so that its end has to bring trailers, if only none.
        self.awaits_trailers = False
        #: The output tokens that each choice was held to, where the request's body was changed to say so.
        self._held_to: int | None = None

    @property
    def between_events(self) -> bool:
        """An event stream under way has just ended an event, so that another may follow."""
        return self._boundary is not None and self._boundary.here

    async def through(self, body: Body, peek: Peek | None) -> None:
        """The answer has been relayed as far as both sides were there, and `hold.charge` says what it costs."""
        record, client, route = self._record, self._client, self._route
        # Until an answer begins nothing was delivered: a 502 or 504 of ours costs the client nothing. Nor does an
        # upstream's own error, however far it came.
        outcome, meter, refused = Outcome.UPSTREAM_REFUSED, None, False
        forwarding = self._forwarding(self._capped(body, peek))
        if route.on_disconnect == "drain":
            client.finish_without(lambda: forwarding.request_sent, route.drain_timeout_ms, route.drain_bytes_max)
        try:
            async with forwarding as answer:
                record.phase("first_byte")
                refused = answer.status >= 400
                outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.UPSTREAM_BROKE
                meter = self._meter(answer, peek)
                await self._relay(answer, meter, peek)
            outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.COMPLETE
        except ClientLeft:
            outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.CLIENT_LEFT
            raise
        except OutOfCredits:
            outcome = Outcome.OUT_OF_CREDITS
            raise
        except asyncio.CancelledError:
            if client.left:
                outcome = Outcome.UPSTREAM_REFUSED if refused else Outcome.CLIENT_LEFT
            elif outcome is Outcome.UPSTREAM_BROKE:
                outcome = Outcome.CUT
            raise
        finally:
            self._settle(outcome if forwarding.reached else Outcome.NEVER_REACHED, meter, peek)

    def _capped(self, body: Body, peek: Peek | None) -> Body:
        """The body, allowing no more output than the hold pays for where its route wants that."""
        route, hold = self._route, self._hold
        if route.enforce_max_tokens == "off" or peek is None or not isinstance(body, bytes):
            return body
        paid = output_paid_for(hold.quote, hold.ucredits, peek)
        changed = None if paid is None else READERS[route.usage or ""].capped(body, paid)
        if changed is None:
            return body
        body, self._held_to = changed
        return body

    def _forwarding(self, body: Body) -> Forwarding:
        facts, route = self._facts, self._route
        changed_bytes = len(body) if self._held_to is not None and isinstance(body, bytes) else None
        if isinstance(body, AsyncIterable) or self._client.trailers:
            body = self._with_trailers(body)
        outbound = self._outbound(streamed=isinstance(body, AsyncIterable))
        return self._steps.upstreams.forward(
            route.upstream,
            facts.method,
            facts.target,
            outbound if changed_bytes is None else _of_length(outbound, changed_bytes),
            body,
            interim=self._interim,
            trailers=self._client.trailers,
            retry=route.retry,
        )

    async def _with_trailers(self, body: Body) -> AsyncIterator[bytes]:
        """The body as a stream, at whose end only such trailers remain as may cross: by then all have arrived."""
        if isinstance(body, AsyncIterable):
            async for piece in body:
                yield piece
        elif body:
            yield body
        self._client.trailers[:] = headers.trailers(self._client.trailers, self._private_names())

    def _outbound(self, *, streamed: bool, upgrade: bytes = b"") -> list[Field]:
        """The request's head for the upstream: what the client sent, less what it may not say, plus what we know."""
        facts, steps, principal = self._facts, self._steps, self._identified.principal
        trusted = headers.is_trusted(facts.peer_ip, steps.trusted_proxies)
        added = [
            (b"x-request-id", facts.request_id.encode()),
            (b"x-org-id", principal.org_id.encode()),
            (b"x-plan", principal.plan.encode()),
            *headers.forwarded(facts.headers, facts.peer_ip, facts.scheme, facts.header(b"host") or "", trusted),
        ]
        if principal.user_id is not None:
            added.append((b"x-user-id", principal.user_id.encode()))
        if self._session is not None:
            added += steps.sessions.headers(self._session, principal, facts)
        if steps.via is not None:
            added.append(headers.via(steps.via, facts.http_version))
        strip = self._private_names()
        if not streamed:
            strip |= EXPECT_FIELD  # the body is here: nobody has to be asked for it
        if self._held_to is not None:
            strip |= DIGEST_FIELDS
        chunked = facts.header(b"transfer-encoding") is not None
        return headers.to_upstream(
            facts.headers, facts.fields, strip=strip, add=added, chunked=chunked, upgrade=upgrade
        )

    def _private_names(self) -> frozenset[bytes]:
        """The fields that the upstream gets from us or not at all."""
        steps = self._steps
        names = steps.identity.asserted_headers | steps.sessions.attached_names
        return names if self._route.forward_credential else names | self._identified.credential_headers

    async def _interim(self, status: int, reason: bytes, fields: list[Field]) -> None:
        await self._client.interim(status, reason, headers.to_client(fields))

    def _meter(self, answer: Answer, peek: Peek | None) -> Meter | None:
        fields = {name.lower(): value.decode("latin-1") for name, value in answer.headers}
        media_type, coding = fields.get(b"content-type", ""), fields.get(b"content-encoding", "")
        if media_type.startswith("text/event-stream") and not coding and b"content-length" not in fields:
            self._boundary = Boundary()
        format = READERS.get(self._route.usage or "none")
        if format is None or peek is None:
            return None
        return Meter(format.reader(media_type, coding), peek, answer.status)

    async def _relay(self, answer: Answer, meter: Meter | None, peek: Peek | None) -> None:
        client, record = self._client, self._record
        record.status = answer.status
        chunked = self.awaits_trailers = answer.framing == "chunked"
        fields = headers.to_client(answer.headers, self._added(answer), strip=SESSION_FIELD, chunked=chunked)
        await client.start(answer.status, fields, reason=answer.reason, trailers=chunked)
        spending = self._spending(answer, meter, peek)
        try:
            async for pieces in answer.pieces:
                await self._pass_on(pieces, meter)
                if spending is not None and not spending.covers() and not await spending.more():
                    await self._end_early(answer, meter)
                    break
        finally:
            if spending is not None:
                spending.stop()
        await client.finish(trailers=headers.trailers(answer.trailers, SESSION_FIELD) if chunked else None)

    async def _pass_on(self, pieces: Sequence[bytes], meter: Meter | None) -> None:
        if meter is not None:
            for piece in pieces:
                meter.see(piece)
        await self._client.write(pieces)
        if self._boundary is not None:
            self._boundary.passed(pieces)

    def _spending(self, answer: Answer, meter: Meter | None, peek: Peek | None) -> Spending | None:
        """For an answer that costs more the longer it gets; None where that is known beforehand."""
        hold = self._hold
        if meter is None or peek is None or answer.status >= 400 or not hold.quote.price.by_token:
            return None
        return Spending(hold, peek, meter, self._steps.admission.extend)

    async def _end_early(self, answer: Answer, meter: Meter | None) -> None:
        """The event that was under way is delivered as far as that is possible within bounds. Raises OutOfCredits,
        unless the answer itself ends with that event."""
        boundary, rest_bytes = self._boundary, 0
        with suppress(TimeoutError):
            async with asyncio.timeout(EVENT_REST_S):
                while boundary is not None and not boundary.here and rest_bytes < EVENT_REST_BYTES_MAX:
                    pieces = await anext(answer.pieces, None)
                    if pieces is None:
                        return
                    rest = boundary.rest_of_event(b"".join(pieces))
                    rest_bytes += len(rest)
                    await self._pass_on((rest,), meter)
        raise OutOfCredits

    def _added(self, answer: Answer) -> list[Field]:
        """What the client is told beside the upstream's own answer."""
        # The upstream's own id for the request is its customers' to quote; ours stands beside it.
        taken = any(name.lower() == b"x-request-id" for name, _ in answer.headers)
        added = [(b"x-gateway-request-id" if taken else b"x-request-id", self._record.request_id.encode())]
        if self._session is not None:
            added.append((b"x-session-id", self._session.session_id.encode()))
        if self._steps.via is not None:
            added.append(headers.via(self._steps.via, answer.http_version))
        if self._held_to is not None:
            added.append((b"x-gateway-max-tokens", b"%d" % self._held_to))
        if self._hold.judged_by == "local":
            added.append(LOCAL_FIELD)
        if self._steps.limit_headers:
            added += limit_fields(self._hold, self._route, answer)
        return added

    def _settle(self, outcome: Outcome, meter: Meter | None, peek: Peek | None) -> None:
        """Say what the hold is to book; the block around the passage does it."""
        record, hold = self._record, self._hold
        principal = hold.principal
        if meter is not None:
            usage = meter.usage(complete=outcome is Outcome.COMPLETE)
            if usage is None and hold.quote.price.by_token:
                usage = meter.usage(complete=False)  # nobody reported: what was delivered is the least it can be
        else:
            usage = unanswered(peek) if peek is not None and outcome is Outcome.CLIENT_LEFT else None
        overrun = self._steps.credits.overrun
        booked = charge.settle(outcome, usage, hold.quote, hold.token_estimate, hold.ucredits, overrun)
        hold.charge = booked
        record.outcome, record.basis, record.charged_ucredits = outcome.value, booked.basis, booked.ucredits
        record.decision = "admitted"
        if hold.quote.price.by_token:
            record.held_ucredits, record.max_tokens_set = hold.ucredits, self._held_to
        if usage is not None:
            record.input_tokens, record.output_tokens = usage.input_tokens, usage.output_tokens
            if usage.model and usage.model != record.model:
                record.requested_model, record.model = record.model or "", usage.model
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


def _of_length(fields: list[Field], body_bytes: int) -> list[Field]:
    """`fields` with Content-Length, where it is among them, of a body of so many bytes."""
    length = b"%d" % body_bytes
    return [(name, length if name.lower() == b"content-length" else value) for name, value in fields]


def limit_fields(hold: Hold, route: Route, answer: Answer) -> list[Field]:
    """What an admitted client is told about its limits, less what the upstream says of its own in the same fields.

    What is left of limits that all orgs share would tell each of them what the others do; one that refuses is named.
    """
    states = hold.states
    if not states:
        return []
    said = ratelimit.fields(states, route.dialect, time.time()) + ratelimit.warning(states)
    return ratelimit.beside(said, answer.headers)

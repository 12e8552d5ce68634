"""An admitted WebSocket handshake on its way to the upstream, and the WebSocket that it becomes.

    handshake ──101, proven──► open: bytes both ways ──► settled as it ended
        └─────any other answer──► relayed as an ordinary one

The connection is one request with one hold, whose lease is renewed while it is open. Where its route counts messages,
each of the client's has a hold of its own, settled before the next one is read.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway import charge, headers, policy
from gateway.downstream import Client
from gateway.errors import UpstreamBroke
from gateway.meter import Meter
from gateway.proxy.passage import SESSION_FIELD, Field, Passage
from gateway.types import Outcome, Peek, Quote, Refusal
from gateway.upstream import Answer, Tunnel
from gateway.websocket import PROTOCOL, Ended, Message, Relay, proven


class WebSocketPassage(Passage):
    """A handshake that nothing speaks against (`websocket.refused`), on a route that takes WebSockets."""

    #: Micro-credits of all messages so far.
    _messages_ucredits = 0
    _relaying: Relay | None = None

    def _outbound(self, *, streamed: bool, upgrade: bytes = PROTOCOL) -> list[Field]:
        return super()._outbound(streamed=streamed, upgrade=upgrade)

    async def _relay(self, answer: Answer, meter: Meter | None, peek: Peek | None) -> None:
        if answer.status == 101:
            await self._open(answer)
        else:
            await super()._relay(answer, meter, peek)

    def _settle(self, outcome: Outcome, meter: Meter | None, peek: Peek | None) -> None:
        ended = None if self._relaying is None else self._relaying.ended()
        if ended is not None:
            outcome = ended.outcome
        elif outcome is Outcome.UPSTREAM_BROKE and not self._client.started:
            outcome = Outcome.UPSTREAM_REFUSED  # it said 101, but to something else: nothing was delivered
        super()._settle(outcome, meter, peek)
        if ended is not None:
            self._note(ended)

    async def _open(self, answer: Answer) -> None:
        """The client has its 101, and the WebSocket is over. Raises UpstreamBroke for a 101 that is not to this."""
        tunnel, rules = answer.tunnel, self._route.websocket
        if tunnel is None or rules is None or not proven(answer.status, answer.headers, self._facts.headers):
            raise UpstreamBroke("The upstream switched protocols without agreeing to this WebSocket.")
        client = self._client
        self._record.status = answer.status
        fields = headers.to_client(answer.headers, self._added(answer), strip=SESSION_FIELD, upgrade=True)
        await client.switch(answer.reason, fields)
        self._relaying = Relay(_ClientSide(client), _UpstreamSide(tunnel), rules, self._admit)
        await self._relaying.run()

    @asynccontextmanager
    async def _admit(self, message: Message) -> AsyncIterator[Refusal | None]:
        """One message has its own place in the limits and its own charge, or a refusal."""
        principal = self._hold.principal
        rules = self._steps.policies.plan(principal.plan)
        assert rules is not None  # the connection was admitted under it
        overrides = self._steps.overrides.of(principal.org_id)
        asking = policy.Asking(principal, self._facts, self._route, None, self._record.session_digest, overrides)
        demands = policy.message_demands(rules, asking)
        hold_id = f"{self._hold.hold_id}:{message.number}"
        admission = self._steps.admission
        quote = Quote.flat(rules.per_message_ucredits)
        async with admission.hold(hold_id, principal, demands, quote) as verdict:
            if isinstance(verdict, Refusal):
                yield verdict
                return
            try:
                yield None
            finally:
                if message.forwarded:
                    verdict.charge = charge.settle(Outcome.COMPLETE, None, quote, 0, verdict.ucredits)
                    verdict.meta = {
                        "request_id": self._record.request_id,
                        "route": self._record.route,
                        "message": message.number,
                        "user": principal.user_id,
                        "key": principal.key_id,
                    }
                    self._messages_ucredits += verdict.charge.ucredits

    def _note(self, ended: Ended) -> None:
        record = self._record
        record.messages_in, record.messages_out = ended.messages_in, ended.messages_out
        record.request_bytes, record.close_code, record.closed_for = ended.bytes_in, ended.close_code, ended.why
        record.charged_ucredits = (record.charged_ucredits or 0) + self._messages_ucredits


class _ClientSide:
    """Satisfies `websocket.Side`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def gone(self) -> bool:
        return self._client.left

    async def read(self) -> bytes:
        return await self._client.raw()

    async def write(self, data: bytes) -> None:
        await self._client.write((data,))

    async def aclose(self) -> None:
        await self._client.finish()

    def abort(self) -> None:
        """Nothing to do: the walk returns without the end of its answer, and the server cuts the connection."""


class _UpstreamSide:
    """Satisfies `websocket.Side`."""

    gone = False

    def __init__(self, tunnel: Tunnel) -> None:
        self.read = tunnel.read
        self.write = tunnel.write
        self.aclose = tunnel.aclose
        self.abort = tunnel.abort

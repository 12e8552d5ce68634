"""The ASGI endpoint: a walk for every request, one access-log line for every walk, and the end of all of them."""

import asyncio
from collections.abc import Mapping
from typing import Any

from gateway.downstream import EXTENSION, Client, Patience, Receive, Send, fresh_id, read_facts
from gateway.errors import ClientLeft, ShuttingDown
from gateway.proxy.steps import Steps
from gateway.proxy.walk import Walk
from gateway.telemetry import Record


class Proxy:
    """A pure ASGI endpoint for every path that is not the gateway's own."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._patience = Patience(steps.client_idle_ms)
        self._open: set[Walk] = set()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        hold_id = fresh_id()
        head = scope.get("extensions", {}).get(EXTENSION)
        client = Client(receive, send, self._patience, head)
        facts = read_facts(scope, hold_id, self._steps.trusted_proxies)
        record = Record(facts.request_id, facts.method, facts.path, facts.client_ip)
        walk = Walk(self._steps, client, facts, hold_id, record)
        self._open.add(walk)
        try:
            await walk.go()
        except asyncio.CancelledError:
            if not client.left:
                raise  # not by us: the server gives the whole task up
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        finally:
            self._open.discard(walk)
            client.close()
            if client.left:
                record.status, record.decision = ClientLeft.status, ClientLeft.code
            record.response_bytes = client.sent_bytes
            walk.note_limits()
            self._steps.access_log.write(record)
            self._steps.metrics.observe(record)

    def end_all(self) -> None:
        """Every open request ends now: in its dialect where that can still be said, else cut; settled either way."""
        for walk in tuple(self._open):
            walk.end(ShuttingDown())

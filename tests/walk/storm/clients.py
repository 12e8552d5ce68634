"""The clients of a storm, a process of their own: many ask, some leave in the middle, and every answer is checked.

    python -m tests.walk.storm.clients PLAN        PLAN: a `Plan` as JSON; prints a `Report` as JSON

A client that stays must get its own answer, whole, with status 200, or a refusal that the gateway documents. What one
that leaves has got until then must be the beginning of its own answer.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import uvloop

from tests.walk.storm.exchanges import BODY_BYTES_MIN, STYLES, Wish, answer_body, request, request_body
from tests.walk.storm.line import WAYS, Line
from tests.walk.storm.reading import Reading

WRONG_MAX = 20
#: Longer than any deadline of the gateway in a storm: who waits for so long was forgotten.
HUNG_S = 60.0
#: 503: all connections to the upstream are in use; 429: as many requests of the org as may be are in flight.
BUSY = frozenset((503, 429))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to happen. `fates` gives each fate of a request its weight:

    stay        the answer is awaited; some of these requests are written in two parts
    pair        two requests are written at once, and both answers awaited
    request     the client leaves with so much of its request written: every number of bytes comes in turn
    waiting     it leaves with the request written, at once or a little later
    answer      it leaves within the answer
    end         it leaves as the last byte of the answer arrives
    """

    address: str
    secret: str
    paths: tuple[str, ...]
    clients: int
    fates: Mapping[str, int]
    seed: int
    #: The storm is over after so many whole answers, or so many requests.
    answers: int = 0
    requests: int = 0
    body_bytes_max: int = 600
    answer_bytes_max: int = 3000
    #: The upstream takes at most so long before an answer and between its parts.
    pause_ms_max: int = 0
    #: Who leaves while it waits does so within this time.
    waiting_ms_max: int = 20


@dataclass
class Report:
    """What happened. wrong: answers that were missing, foreign or broken."""

    requests: int = 0
    answers: int = 0
    left: Counter[str] = field(default_factory=Counter)
    busy: Counter[str] = field(default_factory=Counter)
    #: Distinct numbers of request bytes after which a client left.
    cuts: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and what its answer must be."""

    id: str
    session: str
    wish: Wish
    wire: bytes

    def trouble(self, reading: Reading, whole: bool) -> str:
        """What is wrong with what came of the answer; empty when nothing is."""
        if not whole and not reading.status:
            return ""
        if reading.trouble:
            return reading.trouble
        headers = reading.headers
        if headers.get("x-storm-id") != self.id or headers.get("x-storm-path") != self.id:
            return f"foreign head: {headers}"
        if headers.get("x-session-id") != self.session or headers.get("x-request-id") != self.id:
            return f"foreign session or request id: {headers}"
        due = answer_body(self.id, self.id, request_body(self.id, self.wish.body_bytes), self.wish)
        if reading.body != due if whole else not due.startswith(reading.body):
            return f"foreign or broken body: {bytes(reading.body[:200])!r}"
        return ""


class Storm:
    """All clients of one plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        host, _, port = plan.address.removeprefix("http://").rpartition(":")
        self._where = (host, int(port))
        self._random = random.Random(plan.seed)
        self._number = 0
        self._cut = 0
        self._cuts: set[int] = set()
        self.report = Report()

    async def run(self) -> Report:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.clients):
                group.create_task(self._client(f"session-{self._plan.seed}-{number}"))
        self.report.seconds = round(time.monotonic() - started, 3)
        self.report.cuts = len(self._cuts)
        return self.report

    @property
    def _over(self) -> bool:
        plan, report = self._plan, self.report
        return report.requests >= plan.requests if plan.requests else report.answers >= plan.answers

    async def _client(self, session: str) -> None:
        line: Line | None = None
        fates, weights = list(self._plan.fates), list(self._plan.fates.values())
        while not self._over:
            if line is None or line.lost or line.transport.is_closing():
                _, line = await asyncio.get_running_loop().create_connection(Line, *self._where)
            [fate] = self._random.choices(fates, weights)
            self.report.requests += 1 + (fate == "pair")
            try:
                async with asyncio.timeout(HUNG_S):
                    await getattr(self, f"_{fate}")(line, session)
            except TimeoutError:
                self._wrong(f"{fate}: hung")
                line.transport.abort()
        if line is not None:
            line.transport.abort()

    # The fates

    async def _stay(self, line: Line, session: str) -> None:
        ask, chance = self._ask(session), self._random
        if chance.random() < 0.3:
            at = chance.randrange(len(ask.wire))
            line.transport.write(ask.wire[:at])
            await asyncio.sleep(chance.random() * 0.003)
            line.transport.write(ask.wire[at:])
        else:
            line.transport.write(ask.wire)
        await self._collect(line, [ask])

    async def _pair(self, line: Line, session: str) -> None:
        asks = [self._ask(session), self._ask(session)]
        line.transport.write(asks[0].wire + asks[1].wire)
        await self._collect(line, asks)

    async def _collect(self, line: Line, asks: list[Ask]) -> None:
        await line.answered(len(asks))
        closed = False
        for ask in asks:
            if not line.reader.done:
                if closed:
                    self.report.busy["unanswered"] += 1
                    continue
                self._wrong(f"{ask.id}: no answer, {line.reader.current}")
                continue
            reading = line.reader.done.pop(0)
            if reading.status in BUSY:
                self.report.busy[str(reading.status)] += 1
                closed = reading.headers.get("connection", "").lower() == "close"
            elif reading.status != 200:
                self._wrong(f"{ask.id}: {reading}")
            elif trouble := ask.trouble(reading, whole=True):
                self._wrong(f"{ask.id}: {trouble}")
            else:
                self.report.answers += 1
        if line.reader.done or line.reader.current.status:
            self._wrong(f"{asks[-1].id}: more than one answer")

    async def _request(self, line: Line, session: str) -> None:
        ask = self._ask(session)
        self._cut += 1
        at = self._cut % len(ask.wire)
        self._cuts.add(at)
        line.transport.write(ask.wire[:at])
        if self._random.random() < 0.5:
            await asyncio.sleep(self._random.random() * 0.005)
        await self._leave(line, ask, "request")

    async def _waiting(self, line: Line, session: str) -> None:
        ask = self._ask(session)
        line.transport.write(ask.wire)
        await asyncio.sleep(self._random.choice((0.0, self._random.random() * self._plan.waiting_ms_max / 1000)))
        await self._leave(line, ask, "waiting")

    async def _answer(self, line: Line, session: str) -> None:
        ask = self._ask(session)
        await self._leave_behind(line, ask, self._random.randrange(1, 300 + ask.wish.answer_bytes), "answer")

    async def _end(self, line: Line, session: str) -> None:
        await self._leave_behind(line, self._ask(session), 1 << 30, "end")

    async def _leave_behind(self, line: Line, ask: Ask, bytes_max: int, fate: str) -> None:
        before = line.received
        line.transport.write(ask.wire)
        while line.received - before < bytes_max and not line.reader.done and not line.lost:
            await line.stirred()
        if line.lost and not line.reader.done:
            self._wrong(f"{ask.id}, before it left: no answer, {line.reader.current}")
        await self._leave(line, ask, fate)

    async def _leave(self, line: Line, ask: Ask, fate: str) -> None:
        await line.leave(self._random.choice(WAYS))
        readings = [*line.reader.done, line.reader.current]
        if readings[0].status in (0, 200):
            if trouble := ask.trouble(readings[0], whole=readings[0].complete):
                self._wrong(f"{ask.id}, who left: {trouble}")
        self.report.left[fate] += 1
        line.reader.done.clear()

    # What they ask

    def _ask(self, session: str) -> Ask:
        plan, chance = self._plan, self._random
        self._number += 1
        id = f"{plan.seed:04x}{self._number:012x}"
        path = chance.choice(plan.paths)
        # Only a request that is to be read before it is forwarded needs a body.
        empty = not path.startswith("/v1/") and chance.random() < 0.1
        wish = Wish(
            0 if empty else chance.randint(BODY_BYTES_MIN, plan.body_bytes_max),
            chance.choice(STYLES),
            chance.randint(0, plan.answer_bytes_max),
            chance.randint(1, 4),
            chance.randint(0, plan.pause_ms_max),
        )
        chunked = not empty and chance.random() < 0.4
        wire = request(id, wish, path=path, secret=plan.secret, session=session, chunked=chunked)
        return Ask(id, session, wish, wire)

    def _wrong(self, text: str) -> None:
        if len(self.report.wrong) < WRONG_MAX:
            self.report.wrong.append(text)


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(vars(uvloop.run(Storm(plan).run()))))


if __name__ == "__main__":
    main()

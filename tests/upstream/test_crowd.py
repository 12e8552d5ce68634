"""Any history of requests, failures, cancellations and waiting keeps every bound and leaves nothing behind.

The machine plays clients, targets and clock on a loop where time stands still. Between its steps the loop turns only
as often as it says, so that cancellations and ends meet in every order at every wait.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gateway.errors import GatewayError, UpstreamBusy, UpstreamUnreachable
from gateway.upstream import Upstreams
from gateway.upstream.forward import ATTEMPTS_MAX, Retry
from tests.upstream.by_hand import Attempt, ByHand, Clockwork
from tests.upstream.configured import Config, Ejection

ORIGINS = ("http://a", "http://b", "http://c")
REQUESTS_MAX, QUEUE_MAX, QUEUE_TIMEOUT_S = 3, 3, 1.0
ENDS = (
    Attempt.answer,
    Attempt.refuse,
    Attempt.refuse,
    Attempt.black_hole,
    Attempt.wait_in_vain,
    Attempt.run_out,
    Attempt.drop,
    Attempt.garble,
    Attempt.dawdle,
)
TURNS = st.integers(0, 4)
WHICH = st.integers(0, 1_000)


class Asked:
    """One request and what became of it."""

    def __init__(self, number: int, method: str, retry: Retry, streamed: bool) -> None:
        self.number = number
        self.method = method
        self.retry = retry
        self.streamed = streamed
        self.waited = False
        self.line_at_arrival = 0
        self.arrived_s = self.left_s = 0.0
        self.became = ""
        self.may_go = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.attempts: list[Attempt] = []
        self.pulled_by: Attempt | None = None

    @property
    def open(self) -> bool:
        return self.task is not None and not self.task.done()


class Crowd(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = Clockwork()
        self.transport = ByHand(self._judge_choice)
        config = Config(
            ORIGINS,
            requests_max=REQUESTS_MAX,
            queue_max=QUEUE_MAX,
            queue_timeout_ms=int(QUEUE_TIMEOUT_S * 1_000),
            ejection=Ejection(failures=2, backoff_ms=500, backoff_max_ms=2_000),
        )
        self.upstreams = Upstreams({"ai": config}, transport=self.transport, clock=self.loop.time)
        self.upstream = self.upstreams._upstreams["ai"]
        self.asked: list[Asked] = []
        #: Numbers of those who waited in line, in the order in which they got through.
        self.let_in: list[int] = []

    # -- what may happen -----------------------------------------------------------------------------------------

    @rule(
        method=st.sampled_from(("GET", "POST")),
        retry=st.sampled_from(("connect", "idempotent", "never")),
        streamed=st.booleans(),
        turns=TURNS,
    )
    def somebody_asks(self, method: str, retry: Retry, streamed: bool, turns: int) -> None:
        asked = Asked(len(self.asked), method, retry, streamed)
        self.asked.append(asked)
        asked.task = self.loop.create_task(self._ask(asked))
        self.loop.turn(turns)

    @precondition(lambda self: self._waiting())
    @rule(which=WHICH, end=st.sampled_from(ENDS), pull=st.booleans(), turns=TURNS)
    def an_attempt_ends(self, which: int, end: Callable[[Attempt], None], pull: bool, turns: int) -> None:
        waiting = self._waiting()
        attempt = waiting[which % len(waiting)]
        if pull and self._asked_by(attempt).streamed:
            self._asked_by(attempt).pulled_by = attempt
            self.loop.run_until_complete(attempt.pull())
        end(attempt)
        self.loop.turn(turns)

    @precondition(lambda self: self._answered())
    @rule(which=WHICH, turns=TURNS)
    def an_answer_is_over(self, which: int, turns: int) -> None:
        answered = self._answered()
        answered[which % len(answered)].may_go.set()
        self.loop.turn(turns)

    @precondition(lambda self: any(asked.open for asked in self.asked))
    @rule(which=WHICH, turns=TURNS)
    def somebody_leaves(self, which: int, turns: int) -> None:
        tasks = [asked.task for asked in self.asked if asked.task is not None and asked.open]
        tasks[which % len(tasks)].cancel()
        self.loop.turn(turns)

    @rule(seconds=st.sampled_from((0.125, 0.5, 1.0, 2.0)))  # sums of these are exact
    def time_passes(self, seconds: float) -> None:
        self.loop.turn()
        self.loop.advance(seconds)

    @rule()
    def nothing_happens(self) -> None:
        """Everybody has got as far as possible, and then the counts are exact."""
        self.loop.turn()
        stats = self.upstreams.stats()["ai"]
        inside = len(self.transport.under_way) + len(self._answered())
        assert stats.in_flight == inside == sum(target.in_flight for target in stats.targets)
        assert stats.queued == sum(asked.open for asked in self.asked) - inside
        assert not stats.queued or stats.in_flight == REQUESTS_MAX, "nobody waits while there is room"

    # -- what must hold ------------------------------------------------------------------------------------------

    @invariant()
    def bounds_are_kept(self) -> None:
        stats = self.upstreams.stats()["ai"]
        assert stats.in_flight <= REQUESTS_MAX
        assert stats.queued <= QUEUE_MAX
        assert len(self.transport.under_way) + len(self._answered()) <= REQUESTS_MAX
        assert all(target.in_flight >= 0 for target in stats.targets)

    def teardown(self) -> None:
        for asked in self.asked:
            assert asked.task is not None
            asked.task.cancel()
        self.loop.turn(50)
        self.loop.close()
        stats = self.upstreams.stats()["ai"]
        assert (stats.in_flight, stats.queued, [target.in_flight for target in stats.targets]) == (0, 0, [0, 0, 0])
        assert all(target.standing._trial is None for target in self.upstream.targets)
        for asked in self.asked:
            self._judge(asked)
        assert self.let_in == sorted(self.let_in), "first come, first served"

    def _judge(self, asked: Asked) -> None:
        assert not asked.open
        reached = [attempt for attempt in asked.attempts if attempt.request.extensions["reached"]]
        repeatable = asked.method == "GET" or asked.retry == "idempotent"
        assert len(asked.attempts) <= (1 if asked.retry == "never" else ATTEMPTS_MAX)
        assert len(reached) <= (2 if repeatable else 1), "sent again although it may have been acted on"
        refused_at = [attempt.origin for attempt in asked.attempts if attempt not in reached]
        assert len(refused_at) == len(set(refused_at)), "asked again who had refused"
        if asked.pulled_by is not None:
            assert asked.pulled_by is asked.attempts[-1], "a stream was sent again"
        if asked.became == "busy" and not asked.attempts:
            slow = asked.left_s - asked.arrived_s >= QUEUE_TIMEOUT_S
            assert slow or asked.line_at_arrival == QUEUE_MAX, "turned away without need"
        if asked.became == "unreachable":
            assert asked.attempts, "refused untried"

    def _judge_choice(self, attempt: Attempt) -> None:
        """At the moment when a target was chosen, there was no better one."""
        asked = self._asked_by(attempt)
        tried = [earlier.origin for earlier in asked.attempts]
        if not tried and asked.waited:
            self.let_in.append(asked.number)
        asked.attempts.append(attempt)
        if attempt.origin in tried:
            return  # a repetition at the same target is judged with all of them
        (chosen,) = (target for target in self.upstream.targets if target.origin == attempt.origin)
        others = [
            target
            for target in self.upstream.targets
            if target.standing.healthy and target is not chosen and target.origin not in tried
        ]
        if chosen.standing.healthy or chosen.standing._trial is attempt.request.extensions:
            assert all(chosen.outstanding - 1 <= other.outstanding for other in others)
        else:
            assert not others, "an ejected target was taken though a healthy one was there"

    # -- the machinery -------------------------------------------------------------------------------------------

    async def _ask(self, asked: Asked) -> None:
        gate = self.upstream.gate
        asked.waited, asked.line_at_arrival = gate.inside == REQUESTS_MAX, gate.queued
        asked.arrived_s = self.loop.now_s
        fields = [(b"X-Number", b"%d" % asked.number)]
        body = _once() if asked.streamed else b"x"
        try:
            async with self.upstreams.forward("ai", asked.method, b"/", fields, body, retry=asked.retry):
                asked.became = "answered"
                await asked.may_go.wait()
            asked.became = "over"
        except UpstreamBusy:
            asked.became = "busy"
        except UpstreamUnreachable:
            asked.became = "unreachable"
        except GatewayError:
            asked.became = "failed"
        except asyncio.CancelledError:
            asked.became = "cancelled"
        finally:
            asked.left_s = self.loop.now_s

    def _waiting(self) -> list[Attempt]:
        return [attempt for attempt in self.transport.under_way if not attempt.ending.done()]

    def _answered(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.became == "answered"]

    def _asked_by(self, attempt: Attempt) -> Asked:
        return self.asked[int(dict(attempt.request.headers.raw)[b"X-Number"])]


async def _once() -> AsyncIterator[bytes]:
    yield b"x"


def test_any_history_keeps_every_bound(full: bool) -> None:
    effort = settings(max_examples=2_000 if full else 50, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(Crowd, settings=effort)

"""What is sent again, to whom, and what never is."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from gateway import errors
from gateway.upstream import Answer, Forwarding, Upstreams
from gateway.upstream.exchange import Interim
from gateway.upstream.forward import Retry
from tests.upstream.by_hand import Attempt, ByHand
from tests.upstream.configured import Config, Ejection

ORIGINS = ("http://a", "http://b", "http://c", "http://d")
NEVER_EJECTED = Ejection(failures=1_000)


class Case:
    """One request to an upstream whose every attempt ends as the test says."""

    def __init__(self, targets: int = 1, ejection: Ejection = NEVER_EJECTED) -> None:
        self.transport = ByHand()
        config = Config(ORIGINS[:targets], ejection=ejection)
        self.upstreams = Upstreams({"ai": config}, transport=self.transport)
        self.forwarding: Forwarding | None = None

    async def ask(
        self,
        *ends: Callable[[Attempt], None],
        method: str = "POST",
        retry: Retry = "connect",
        body: bytes | AsyncIterator[bytes] = b"x",
        pull: bool = False,
        interim: Interim | None = None,
        trailers: list[tuple[bytes, bytes]] | None = None,
    ) -> Answer:
        """The answer when the attempts end so, in order. Raises what the forwarding raises."""
        script = iter(ends)
        ending: set[asyncio.Task[None]] = set()

        async def end(attempt: Attempt) -> None:
            if pull:
                await attempt.pull()
            next(script, Attempt.answer)(attempt)

        self.transport.on_attempt = lambda attempt: ending.add(asyncio.create_task(end(attempt)))
        self.forwarding = self.upstreams.forward(
            "ai", method, b"/", [], body, interim=interim, trailers=trailers, retry=retry
        )
        try:
            async with self.forwarding as answer:
                return answer
        finally:
            await asyncio.gather(*ending)

    @property
    def origins(self) -> list[str]:
        return [attempt.origin for attempt in self.transport.seen]

    def at_rest(self) -> bool:
        stats = self.upstreams.stats()["ai"]
        return (stats.in_flight, stats.queued, [target.in_flight for target in stats.targets]) == (
            0,
            0,
            [0] * len(stats.targets),
        )


REFUSE, BLACK_HOLE, RUN_OUT = Attempt.refuse, Attempt.black_hole, Attempt.run_out
DROP, GARBLE, DAWDLE, ANSWER = Attempt.drop, Attempt.garble, Attempt.dawdle, Attempt.answer
WAIT = Attempt.wait_in_vain


@pytest.mark.parametrize("end", [REFUSE, BLACK_HOLE])
async def test_what_was_never_sent_goes_to_another_target(end: Callable[[Attempt], None]) -> None:
    case = Case(targets=2)
    assert (await case.ask(end, ANSWER)).status == 200
    assert case.origins == ["http://a", "http://b"]
    assert case.at_rest()


async def test_each_target_is_tried_once() -> None:
    case = Case(targets=2)
    with pytest.raises(errors.UpstreamUnreachable) as caught:
        await case.ask(REFUSE, REFUSE, ANSWER)
    assert caught.value.reached is False
    assert case.origins == ["http://a", "http://b"]
    assert case.at_rest()


async def test_a_lone_target_that_refuses_is_not_asked_again_at_once() -> None:
    case = Case()
    with pytest.raises(errors.UpstreamUnreachable):
        await case.ask(REFUSE, ANSWER)
    assert len(case.origins) == 1


async def test_attempts_are_bounded() -> None:
    case = Case(targets=4)
    with pytest.raises(errors.UpstreamConnectTimeout):
        await case.ask(REFUSE, REFUSE, BLACK_HOLE, ANSWER)
    assert case.origins == ["http://a", "http://b", "http://c"]


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"])
async def test_a_kept_connection_that_ran_out_is_replaced_for_what_may_be_repeated(method: str) -> None:
    case = Case(targets=2)
    assert (await case.ask(RUN_OUT, ANSWER, method=method)).status == 200
    assert case.origins == ["http://a", "http://a"]


@pytest.mark.parametrize("method", ["POST", "PATCH", "get", "QUERY"])
async def test_a_kept_connection_that_ran_out_is_the_end_of_what_may_not(method: str) -> None:
    case = Case(targets=2)
    with pytest.raises(errors.UpstreamBroke):
        await case.ask(RUN_OUT, ANSWER, method=method)
    assert len(case.origins) == 1


async def test_a_route_may_say_that_a_repetition_does_no_harm() -> None:
    case = Case(targets=2)
    assert (await case.ask(RUN_OUT, ANSWER, retry="idempotent")).status == 200
    assert case.origins == ["http://a", "http://a"]


async def test_such_a_route_repeats_what_was_dropped_at_another_target() -> None:
    case = Case(targets=2)
    assert (await case.ask(DROP, ANSWER, retry="idempotent")).status == 200
    assert case.origins == ["http://a", "http://b"]


async def test_or_at_the_same_when_there_is_no_other() -> None:
    case = Case()
    assert (await case.ask(DROP, ANSWER, retry="idempotent")).status == 200


@pytest.mark.parametrize("first", [RUN_OUT, DROP])
async def test_nothing_is_repeated_twice(first: Callable[[Attempt], None]) -> None:
    case = Case(targets=3)
    with pytest.raises(errors.UpstreamBroke):
        await case.ask(first, DROP, ANSWER, retry="idempotent", method="GET")
    assert len(case.origins) == 2


async def test_a_dropped_request_is_not_repeated_unless_the_route_says_so() -> None:
    case = Case(targets=2)
    with pytest.raises(errors.UpstreamBroke):
        await case.ask(DROP, ANSWER, method="GET")
    assert len(case.origins) == 1


@pytest.mark.parametrize(
    ("end", "error"),
    [(GARBLE, errors.UpstreamBroke), (DAWDLE, errors.UpstreamTimeout), (WAIT, errors.UpstreamBusy)],
)
async def test_what_is_never_tried_again(end: Callable[[Attempt], None], error: type[errors.GatewayError]) -> None:
    case = Case(targets=2)
    with pytest.raises(error):
        await case.ask(end, ANSWER, method="GET", retry="idempotent")
    assert len(case.origins) == 1
    assert case.at_rest()


@pytest.mark.parametrize("end", [REFUSE, BLACK_HOLE, RUN_OUT, DROP])
async def test_a_route_may_forbid_every_retry(end: Callable[[Attempt], None]) -> None:
    case = Case(targets=2)
    with pytest.raises(errors.GatewayError):
        await case.ask(end, ANSWER, method="GET", retry="never")
    assert len(case.origins) == 1


@pytest.mark.parametrize(
    ("between", "state"),
    [(RUN_OUT, "ejected"), (WAIT, "ejected"), (DROP, "healthy"), (DAWDLE, "healthy"), (ANSWER, "healthy")],
)
async def test_what_shows_that_a_target_can_be_connected_to(between: Callable[[Attempt], None], state: str) -> None:
    """A kept connection that ran out shows nothing; a new one does, however it ends."""
    case = Case(ejection=Ejection(failures=3))
    for end in (REFUSE, REFUSE, between, REFUSE):
        try:
            await case.ask(end)
        except errors.GatewayError:
            pass
    assert case.upstreams.stats()["ai"].targets[0].state == state


async def once() -> AsyncIterator[bytes]:
    yield b"x"


@pytest.mark.parametrize("end", [REFUSE, RUN_OUT, DROP])
async def test_a_stream_that_was_begun_is_never_sent_again(end: Callable[[Attempt], None]) -> None:
    case = Case(targets=2)
    with pytest.raises(errors.GatewayError):
        await case.ask(end, ANSWER, method="PUT", retry="idempotent", body=once(), pull=True)
    assert len(case.origins) == 1


@pytest.mark.parametrize("end", [REFUSE, RUN_OUT, DROP])
async def test_a_stream_that_nobody_has_read_yet_can_be(end: Callable[[Attempt], None]) -> None:
    case = Case(targets=2)
    assert (await case.ask(end, ANSWER, method="PUT", retry="idempotent", body=once())).status == 200


async def test_a_repetition_that_cannot_connect_does_not_forget_the_first_attempt() -> None:
    case = Case()
    with pytest.raises(errors.UpstreamUnreachable) as caught:
        await case.ask(RUN_OUT, REFUSE, method="GET")
    assert case.forwarding is not None
    assert (caught.value.reached, case.forwarding.reached) == (True, True)


async def test_interim_answers_and_trailers_are_offered_to_every_attempt() -> None:
    async def interim(status: int, reason: bytes, fields: list[tuple[bytes, bytes]]) -> None:
        raise AssertionError("nobody sends any")

    trailers: list[tuple[bytes, bytes]] = []
    case = Case(targets=2)
    assert (await case.ask(REFUSE, ANSWER, interim=interim, trailers=trailers)).status == 200
    assert len(case.transport.seen) == 2
    for attempt in case.transport.seen:
        assert attempt.request.extensions["interim"] is interim
        assert attempt.request.extensions["trailers"] is trailers

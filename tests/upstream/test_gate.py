"""The gate of an upstream: a bound, a line, and places that are never lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.errors import UpstreamBusy
from gateway.upstream.gate import Gate
from tests.upstream.by_hand import Clockwork
from tests.upstream.scripted import turns


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    """One place, which is taken, and a line of three."""
    gate = Gate(requests_max=1, queue_max=3, queue_timeout_ms=60_000)
    assert gate.enter_at_once()
    yield gate
    assert (gate.inside, gate.queued) == (0, 0)


async def in_line(gate: Gate, count: int) -> list["asyncio.Task[None]"]:
    """So many requests, each in line behind the one before."""
    waiting = [asyncio.create_task(gate.enter()) for _ in range(count)]
    await turns(1)
    assert gate.queued == count
    return waiting


async def test_places_go_to_the_first_in_line(gate: Gate) -> None:
    waiting = await in_line(gate, 3)
    for number in range(3):
        gate.leave()
        await turns(2)
        assert [task.done() for task in waiting] == [position <= number for position in range(3)]
        assert gate.inside == 1
    gate.leave()


async def test_a_place_that_is_handed_over_is_not_free_for_newcomers(gate: Gate) -> None:
    (first,) = await in_line(gate, 1)
    gate.leave()
    assert gate.enter_at_once() is False
    await first
    gate.leave()


async def test_a_full_line_is_busy_at_once(gate: Gate) -> None:
    waiting = await in_line(gate, 3)
    with pytest.raises(UpstreamBusy):
        await gate.enter()
    for _ in waiting:
        gate.leave()
    await asyncio.gather(*waiting)
    gate.leave()


@pytest.mark.parametrize(("queue_max", "queue_timeout_ms"), [(0, 60_000), (3, 0)])
async def test_without_a_line_nobody_waits(queue_max: int, queue_timeout_ms: int) -> None:
    gate = Gate(1, queue_max, queue_timeout_ms)
    await gate.enter()
    with pytest.raises(UpstreamBusy):
        await gate.enter()
    gate.leave()
    assert gate.inside == 0


async def test_a_line_that_is_too_slow_is_busy() -> None:
    gate = Gate(1, 3, 1)
    await gate.enter()
    with pytest.raises(UpstreamBusy):
        await gate.enter()
    assert (gate.inside, gate.queued) == (1, 0)


async def test_who_is_cancelled_in_line_leaves_it(gate: Gate) -> None:
    first, second = await in_line(gate, 2)
    first.cancel()
    await asyncio.wait({first})
    assert gate.queued == 1
    gate.leave()
    await second
    gate.leave()


@pytest.mark.parametrize("handed_first", [True, False])
async def test_a_place_handed_to_somebody_who_is_being_cancelled_goes_on(gate: Gate, handed_first: bool) -> None:
    first, second = await in_line(gate, 2)
    if handed_first:
        gate.leave()
        first.cancel()
    else:
        first.cancel()
        gate.leave()
    await asyncio.wait({first, second})
    assert (first.cancelled(), second.cancelled()) == (True, False)
    assert gate.inside == 1
    gate.leave()


async def test_a_place_handed_to_the_last_in_line_who_is_cancelled_is_free_again(gate: Gate) -> None:
    (only,) = await in_line(gate, 1)
    gate.leave()
    only.cancel()
    await asyncio.wait({only})
    assert gate.inside == 0


def test_a_place_does_not_go_to_somebody_who_was_just_turned_away() -> None:
    loop = Clockwork()
    gate = Gate(requests_max=1, queue_max=3, queue_timeout_ms=1_000)
    assert gate.enter_at_once()
    first = loop.create_task(gate.enter())
    loop.turn()
    loop.advance(0.75)
    second = loop.create_task(gate.enter())
    loop.turn()
    loop.call_later(0.5, gate.leave)
    loop.advance(0.75)  # the first one's time is over, and the place is given up, in one turn of the loop
    assert isinstance(first.exception(), UpstreamBusy)
    assert second.done() and gate.inside == 1
    gate.leave()
    loop.close()

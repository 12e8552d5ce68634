"""The protocol holds in every state of every scope, and every mutant of it is caught.

The figures are recorded with the tests; `python -m tests.protocol` prints them.
"""

from collections.abc import Callable

import pytest

from tests.protocol.ops import perform
from tests.protocol.rules import Scope
from tests.protocol.scopes import FLUSHALL_STORES, LARGE, MUTANTS, OPTIMISTIC, SCOPES, Mutant
from tests.protocol.search import Found, alike, search
from tests.protocol.steps import steps
from tests.protocol.world import start

Record = Callable[[str, object], None]


def named(case: Scope | Mutant) -> str:
    return case.name


def recorded(found: Found, record_property: Record) -> Found:
    record_property("states", found.states)
    record_property("transitions", found.transitions)
    return found


@pytest.mark.parametrize("scope", SCOPES, ids=named)
def test_the_protocol_holds_in_every_state(scope: Scope, record_property: Record) -> None:
    found = recorded(search(scope), record_property)
    assert not found.problem, "\n".join([found.problem, *found.trace])
    assert found.at_rest and not found.cut


@pytest.mark.parametrize("scope", LARGE, ids=named)
def test_the_protocol_holds_in_larger_worlds(scope: Scope, full: bool, record_property: Record) -> None:
    if not full:
        pytest.skip("takes minutes: --full")
    test_the_protocol_holds_in_every_state(scope, record_property)


@pytest.mark.parametrize("scope", OPTIMISTIC, ids=named)
def test_without_a_cap_a_loss_of_redis_overcommits(scope: Scope, record_property: Record) -> None:
    """As `on_state_loss: optimistic` says of itself."""
    found = recorded(search(scope), record_property)
    assert found.problem.startswith("C4"), found


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_a_mutant_is_caught(mutant: Mutant, record_property: Record) -> None:
    found = recorded(search(mutant.scope, mutant.rules), record_property)
    record_property("caught_by", found.problem)
    assert found.problem.startswith(mutant.breaks), found


def test_a_step_does_to_the_stores_what_its_operation_says() -> None:
    """What is tied to scripts and SQL is the operation; what is searched is the step."""
    worlds = {alike(start(FLUSHALL_STORES))}
    for _ in range(8):
        for world in tuple(worlds):
            for step in steps(world, FLUSHALL_STORES):
                after = perform(world, step.op)[0] if step.op else world
                assert (after.redis, after.books) == (step.after.redis, step.after.books), step
                worlds.add(alike(step.after))
    assert len(worlds) > 300

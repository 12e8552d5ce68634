"""Which target a request goes to."""

from dataclasses import dataclass, field

import pytest

from gateway.upstream.balance import Balancer
from gateway.upstream.standing import Standing
from tests.upstream.configured import Clock, Ejection

CLOCK = Clock()


@dataclass(eq=False)
class Place:
    name: str
    outstanding: int = 0
    standing: Standing = field(default_factory=lambda: Standing("ai", "http://a", Ejection(failures=1), CLOCK))

    def refuse(self) -> None:
        extensions: dict[str, object] = {}
        self.standing.failed(self.standing.begin(extensions), extensions, ConnectionError())


@pytest.fixture
def places() -> list[Place]:
    return [Place("a"), Place("b"), Place("c")]


def chosen(balancer: Balancer[Place], times: int) -> str:
    """The names of the next choices; none of them stays."""
    names = ""
    for _ in range(times):
        place = balancer.choose()
        assert place is not None
        names += place.name
    return names


def test_equals_take_turns(places: list[Place]) -> None:
    assert chosen(Balancer(places), 7) == "abcabca"


def test_the_least_burdened_gets_the_request(places: list[Place]) -> None:
    for place, outstanding in zip(places, (2, 1, 3), strict=True):
        place.outstanding = outstanding
    assert chosen(Balancer(places), 3) == "bbb"


def test_a_slow_target_gets_less(places: list[Place]) -> None:
    balancer = Balancer(places)
    for _ in range(30):
        place = balancer.choose()
        assert place is not None
        place.outstanding += place is places[0]  # everybody else has answered already
    assert places[0].outstanding == 1


def test_who_was_tried_is_not_tried_again(places: list[Place]) -> None:
    balancer = Balancer(places)
    places[1].outstanding = places[2].outstanding = 5
    assert balancer.choose([places[0], places[1]]) is places[2]
    assert balancer.choose(places) is None


def test_the_ejected_are_left_alone_until_their_time(places: list[Place]) -> None:
    balancer = Balancer(places)
    places[0].refuse()
    assert chosen(balancer, 6) == "bcbcbc"
    CLOCK.now_s += 1.0
    assert "a" in chosen(balancer, 3)


def test_the_ejected_are_tried_when_nobody_else_is_left(places: list[Place]) -> None:
    balancer = Balancer(places)
    places[0].refuse()
    assert balancer.choose([places[1], places[2]]) is places[0]
    places[1].refuse()
    places[2].refuse()
    assert sorted(chosen(balancer, 3)) == ["a", "b", "c"], "all of them: nobody knows which is back first"


def test_the_only_target_is_never_left_alone(places: list[Place]) -> None:
    balancer = Balancer(places[:1])
    places[0].refuse()
    assert chosen(balancer, 2) == "aa"
    assert balancer.choose(places[:1]) is None

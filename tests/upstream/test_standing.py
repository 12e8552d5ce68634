"""What is known of one target: ejection, backoff, trial, and health checks beside them."""

from collections.abc import MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.upstream.standing import JITTER, Standing
from tests.upstream.configured import Clock, Ejection

RULES = Ejection(failures=3, backoff_ms=1_000, backoff_max_ms=5_000)
REFUSED = ConnectionError("refused")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def standing(clock: Clock) -> Standing:
    return Standing("ai", "http://a", RULES, clock)


def refuse(standing: Standing, times: int = 1) -> None:
    for _ in range(times):
        extensions: dict[str, object] = {}
        epoch = standing.begin(extensions)
        standing.failed(epoch, extensions, REFUSED)
        standing.end(epoch, extensions, connected=False)


def serve(standing: Standing) -> None:
    extensions: dict[str, object] = {}
    standing.end(standing.begin(extensions), extensions, connected=True)


def backoff_s(standing: Standing, clock: Clock) -> float:
    """How long the target is left alone from now; time has passed to its end afterwards."""
    began_s = clock.now_s
    while not standing.welcomes():
        clock.now_s += 0.001
        assert clock.now_s < began_s + 60
    return clock.now_s - began_s


def test_failures_in_a_row_eject(standing: Standing) -> None:
    refuse(standing, 2)
    assert standing.healthy and standing.welcomes()
    refuse(standing)
    assert not standing.healthy and not standing.welcomes()


def test_a_success_between_failures_starts_the_count_again(standing: Standing) -> None:
    for _ in range(5):
        refuse(standing, 2)
        serve(standing)
    assert standing.healthy and standing.spotless


def test_the_backoff_doubles_up_to_its_bound(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    for expected_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        passed_s = backoff_s(standing, clock)
        assert expected_s * (1 - JITTER) - 0.001 <= passed_s <= expected_s + 0.001
        refuse(standing)


def test_a_success_on_trial_ends_the_ejection_and_forgets_the_backoff(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    backoff_s(standing, clock)
    refuse(standing)
    backoff_s(standing, clock)
    serve(standing)
    assert standing.healthy and standing.spotless
    refuse(standing, 2)
    assert standing.healthy
    refuse(standing)
    assert backoff_s(standing, clock) <= 1.001


def test_one_request_at_a_time_is_the_trial(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    clock.now_s += 1.0
    trial: dict[str, object] = {}
    standing.begin(trial)
    assert not standing.welcomes()


def test_a_trial_that_has_connected_is_over_before_its_answer(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    clock.now_s += 1.0
    trial: MutableMapping[str, object] = {"reached": False}
    standing.begin(trial)
    assert not standing.welcomes()
    trial["reached"] = True
    assert standing.welcomes() and standing.healthy


def test_a_trial_that_proves_nothing_leaves_the_next_to_decide(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    clock.now_s += 1.0
    cancelled: dict[str, object] = {}
    epoch = standing.begin(cancelled)
    standing.end(epoch, cancelled, connected=False)
    assert not standing.healthy and standing.welcomes()


def test_connections_that_fail_together_count_once(standing: Standing, clock: Clock) -> None:
    crowd: list[tuple[int, dict[str, object]]] = []
    for _ in range(50):
        extensions: dict[str, object] = {}
        crowd.append((standing.begin(extensions), extensions))
    for epoch, extensions in crowd:
        standing.failed(epoch, extensions, REFUSED)
    assert backoff_s(standing, clock) <= 1.001


def test_failures_before_the_backoff_is_over_do_not_lengthen_it(standing: Standing, clock: Clock) -> None:
    refuse(standing, 3)
    refuse(standing, 10)
    assert backoff_s(standing, clock) <= 1.001


def test_a_success_before_the_backoff_is_over_brings_the_target_back(standing: Standing) -> None:
    refuse(standing, 3)
    serve(standing)
    assert standing.healthy


def test_the_end_of_an_old_request_does_not_bring_a_target_back(standing: Standing) -> None:
    stream: dict[str, object] = {}
    epoch = standing.begin(stream)
    refuse(standing, 3)
    standing.end(epoch, stream, connected=True)
    assert not standing.healthy


def test_a_late_failure_says_nothing_about_a_target_that_is_back(standing: Standing) -> None:
    refuse(standing, 3)
    late: list[tuple[int, dict[str, object]]] = []
    for _ in range(3):
        extensions: dict[str, object] = {}
        late.append((standing.begin(extensions), extensions))
    serve(standing)
    for epoch, extensions in late:
        standing.failed(epoch, extensions, REFUSED)
    assert standing.healthy and standing.spotless


def test_health_checks_judge_beside_connections(standing: Standing, clock: Clock) -> None:
    standing.checked("answered 503", 2)
    assert standing.healthy
    standing.checked("answered 503", 2)
    assert not standing.healthy
    serve(standing)
    clock.now_s += 3_600
    assert not standing.welcomes(), "neither requests nor time bring it back, only a check that passes"
    standing.checked(None, 2)
    assert standing.healthy and standing.welcomes()


def test_faults_have_to_be_in_a_row(standing: Standing) -> None:
    for fault in ("refused", None, "refused", None, "refused"):
        standing.checked(fault, 2)
        assert standing.healthy


def test_a_check_that_passes_shows_that_the_target_can_be_connected_to(standing: Standing) -> None:
    refuse(standing, 3)
    standing.checked(None, 2)
    assert standing.healthy


def events(logs: list[Any]) -> list[str]:
    assert all((entry["upstream"], entry["target"]) == ("ai", "http://a") for entry in logs)
    return [entry["event"] for entry in logs]


def test_each_change_is_logged_once(standing: Standing, clock: Clock) -> None:
    with capture_logs() as logs:
        refuse(standing, 8)
        for _ in range(3):
            backoff_s(standing, clock)
            refuse(standing)
        backoff_s(standing, clock)
        serve(standing)
        serve(standing)
        for fault in ("a", "b", "c", None, None):
            standing.checked(fault, 2)
    assert events(logs) == [
        "target ejected",
        "target can be connected to again",
        "target fails its health check",
        "target passes its health check again",
    ]

"""Random histories of one limit: oracle, twin and scripts say the same at every step, whatever the kind.

Derandomized: the same histories in every run. `--full` plays more of them.
"""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from gateway.types import Limit
from tests.limits.conftest import Limiter
from tests.limits.history import CASES, ByOracle, ByScripts, ByTwin, Step, histories, play

HERE = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@pytest.mark.parametrize("name", CASES)
def test_the_twin_admits_what_the_oracle_admits(name: str, full: bool) -> None:
    @settings(HERE, max_examples=3000 if full else 100)
    @given(histories(name, 40))
    def every(history: tuple[Limit, Sequence[Step]]) -> None:
        limit, steps = history
        play(steps, [ByOracle(limit), ByTwin(limit)])

    every()


@pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_the_scripts_admit_what_twin_and_oracle_admit(limiter: Limiter, name: str, full: bool) -> None:
    """Reference and Redis are one model: field notes, apisix 12592."""

    @settings(HERE, max_examples=600 if full else 60)
    @given(histories(name, 30))
    def every(history: tuple[Limit, Sequence[Step]]) -> None:
        limit, steps = history
        play(steps, [ByOracle(limit), ByTwin(limit), ByScripts(limit, limiter)])

    every()

"""A minute of everything that can go wrong, on three kinds of Redis: afterwards every credit is accounted for."""

import pytest

from tests.chaos.run import Plan, run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["aof", "none", "replica"])
async def test_every_credit_is_accounted_for_whatever_breaks(kind: str, full: bool) -> None:
    report = await run(Plan(seconds=120 if full else 20, seed=20, redis=kind))
    assert report.verdict.violations == []
    assert report.statuses["200"] > 20  # there was load
    assert report.faults

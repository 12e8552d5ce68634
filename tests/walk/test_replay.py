"""Replay decides as the live gateway did: every request, every limit, from the access log alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Settings, load
from gateway.insight import logline, order
from gateway.insight.logline import Line
from gateway.insight.rerun import Rerun
from gateway.insight.tally import LIMITED, Tally
from gateway.types import Limit
from tests.waiting import until
from tests.walk.hindsight import Hindsight
from tests.walk.house import House, in_process
from tests.walk.traffic import LIMITS, SHARED, traffic

REQUESTS, REQUESTS_FULL = 1_500, 10_000
#: Fewer limits than the gateway had, some of the same names, none the same; and another price.
OTHERS: list[dict[str, Any]] = [
    {"name": "user-rpm", "count": "requests", "limit": 9, "window": "2s", "per": "user"},
    {"name": "org-rpm", "count": "requests", "limit": 140, "window": "3s"},
    {"name": "tokens", "count": "tokens", "limit": 6_000, "window": "2s", "per": "model"},
    {"name": "out", "count": "output_tokens", "algorithm": "gcra", "limit": 1_500, "window": "1s", "burst": 4_000},
    {"name": "daily", "count": "requests", "algorithm": "calendar", "limit": 150, "period": "day", "per": "user"},
    {"name": "parallel", "count": "concurrent", "limit": 2, "per": "user"},
    {"name": "talks", "count": "sessions", "limit": 6, "window": "3s"},
    {"name": "gpt", "count": "requests", "limit": 3, "window": "1s", "when": {"model": "gpt-*"}},
    {"name": "spend", "count": "credits", "limit": 90, "window": "2s", "per": "key"},
    {
        "name": "dark",
        "count": "tokens",
        "algorithm": "gcra",
        "limit": 500,
        "window": "1s",
        "burst": 900,
        "shadow": True,
    },
]
OTHERS_SHARED: list[dict[str, Any]] = [
    {"name": "everybody", "count": "requests", "limit": 300, "window": "2s"},
    {"name": "all-parallel", "count": "concurrent", "limit": 7},
]
OTHER_PRICE = 3


class Noting(Tally):
    """Keeps every decision."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.by_request: dict[str, tuple[str, str | None]] = {}

    def stays(self, line: Line, was: str, *, known: bool = True) -> None:
        self.by_request[line.request_id] = was, None
        super().stays(line, was, known=known)

    def decided(self, line: Line, was: str, now: str, limit: Limit | None, at_us: int, ucredits: int = 0) -> None:
        self.by_request[line.request_id] = now, None if limit is None else limit.name
        super().decided(line, was, now, limit, at_us, ucredits)


async def recorded(house: House, log: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`log` is what a gateway wrote of so many requests."""
    with log.open("w") as stream:
        monkeypatch.setattr("gateway.app.access_stream", lambda: stream)
        async with traffic(house) as ready, in_process(house) as running:
            await ready.send(running, count, seed=1)
            await until(lambda: running.gateway.admission.settling.idle and not running.gateway.admission.open_count)
    assert log.read_text().count("\n") == count


def rerun(settings: Settings, log: Path, part_bytes: int = order.PART_BYTES) -> Noting:
    reading = logline.Reading()
    done = Rerun(settings)
    done.tally = noting = Noting(settings)
    done.run(order.in_order(logline.read([str(log)], reading), part_bytes))
    assert reading.bad == 0, reading.named
    return noting


@pytest.mark.timeout(300)
async def test_a_log_says_all_that_its_gateway_decided_by(
    house: House, tmp_path: Path, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "access.log"
    await recorded(house, log, REQUESTS_FULL if full else REQUESTS, monkeypatch)
    every = [json.loads(text) for text in log.read_text().splitlines()]
    check_that_it_was_a_test(every)
    settings = load(house.write_config(), {})

    # Under the same policies every decision, the limit it is named after, and what every limit had used.
    tally = rerun(settings, log)
    assert tally.changes == [] and tally.used_examples == [], (tally.changes, tally.used_examples)
    assert tally.changed == tally.used_differs == 0
    assert tally.used_alike == sum(len(line.get("limits", ())) for line in every)
    assert {name: org.ucredits_now for name, org in tally.orgs.items()} == charged(every)
    # In parts that have to be merged, the same.
    assert rerun(settings, log, part_bytes=50_000).by_request == tally.by_request

    # Under other policies what one finds who remembers everything and is in no hurry.
    house.limits, house.price = OTHERS, OTHER_PRICE
    house.settings["shared_limits"] = json.dumps(OTHERS_SHARED)
    settings = load(house.write_config(), {})
    tally, expected = rerun(settings, log), Hindsight(settings, every)
    assert tally.by_request == expected.decisions
    assert {name: org.ucredits_now for name, org in tally.orgs.items() if org.ucredits_now} == expected.charged
    assert {(one.org, one.limit): one.count for one in tally.refusals.values() if not one.shadow} == expected.refused
    assert len(expected.refused) > 10 and tally.changed > 50


def charged(every: list[dict[str, Any]]) -> dict[str, int]:
    found = Counter({line["org"]: 0 for line in every if "org" in line})
    for line in every:
        found[line.get("org", "")] += line.get("charged_ucredits", 0)
    return dict(found - Counter()) | {org: 0 for org, sum_ in found.items() if org and not sum_}


def check_that_it_was_a_test(every: list[dict[str, Any]]) -> None:
    """Every limit has judged and many have refused; denials were remembered, orgs had other limits than their policy,
    sessions were old and new, and requests ended in every way."""
    judged = [one for line in every for one in line.get("limits", ())]
    assert {one["name"] for one in judged} == {limit["name"] for limit in (*LIMITS, *SHARED)}
    refusing = Counter(line["limit"] for line in every if line["decision"] == LIMITED)
    assert len(refusing) >= 6, refusing
    assert any("denied_at_us" in one for one in judged)
    assert any(one.get("shadow") and one.get("retry_ms") for one in judged)
    assert any("overrides" in line for line in every)
    assert {line.get("session_known") for line in every} == {None, False, True}
    ends = {line.get("outcome") for line in every}
    assert ends >= {"complete", "upstream_refused", "upstream_broke", "client_left"}, ends
    # What a refused request had taken of the limits that all share was given back.
    assert any(line["decision"] == LIMITED and "shared_settled_at_us" in line for line in every)

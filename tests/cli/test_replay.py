"""`gateway replay`."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.insight import logline
from tests.cli.conftest import CommandLine

CHAT = "/v1/chat/completions"
START_US = 1_795_489_200_000_000
SECOND_US = 1_000_000


def line(number: int, **members: Any) -> dict[str, Any]:
    """The `number`-th admitted request, a second after the one before; it took a tenth of one."""
    at_us = START_US + number * SECOND_US
    return {
        "at": f"2026-11-24T03:{number // 60:02}:{number % 60:02}.100000Z",
        "event": "request",
        "request_id": f"r{number}",
        "hold_id": f"h{number}",
        "method": "POST",
        "path": CHAT,
        "client_ip": "192.0.2.1",
        "route": f"POST {CHAT}",
        "status": 200,
        "decision": "admitted",
        "org": "acme",
        "user": "ann",
        "plan": "trial",
        "policy": "trial",
        "stream": False,
        "body_bytes": 40,
        "max_output_tokens": 90,
        "model": "demo",
        "judged_at_us": at_us,
        "settled_at_us": at_us + 100_000,
        "outcome": "complete",
        "input_tokens": 10,
        "output_tokens": 20,
        "basis": "exact",
        "charged_ucredits": 2_000_000,
        "limits": [{"name": "rpm", "cost": 1, "used": min(number, 60), "limit": 20}],
        "ms": {"total": 100.0},
        **members,
    }


def refused(number: int, **members: Any) -> dict[str, Any]:
    """Refused by rpm."""
    limits = [{"name": "rpm", "cost": 1, "used": 20, "limit": 20, "retry_ms": 1_000}]
    found = line(number, status=429, decision="rate_limit_exceeded", limit="rpm", limits=limits, **members)
    for name in ("hold_id", "settled_at_us", "outcome", "input_tokens", "output_tokens", "basis", "charged_ucredits"):
        del found[name]
    return found


def written(gateway: CommandLine, lines: list[dict[str, Any]], name: str = "access.log") -> str:
    log = gateway.directory / name
    log.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(log)


def policies(gateway: CommandLine, limits: str, price: int = 2) -> str:
    folder = gateway.directory / "others"
    folder.mkdir(exist_ok=True)
    (folder / "trial.yaml").write_text(f"policy: trial\nlimits: [{limits}]\nprice: {{ per_request: {price} }}\n")
    return str(folder)


def replayed(gateway: CommandLine, *args: str) -> dict[str, Any]:
    found: dict[str, Any] = gateway.do("replay", *args, "--json").json()
    return found


def decided(found: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(one["then"], one["now"]): one["count"] for one in found["decisions"]}


def test_a_tighter_limit_refuses_whom_it_would_have_refused(gateway: CommandLine) -> None:
    log = written(gateway, [line(number) for number in range(10)])
    tight = policies(gateway, "{ name: rpm, count: requests, limit: 4, window: 1h }")
    found = replayed(gateway, log, "--policies", tight)
    assert decided(found) == {("admitted", "admitted"): 4, ("admitted", "rate_limit_exceeded"): 6}
    (refusal,) = found["refusals"]
    assert (refusal["org"], refusal["limit"], refusal["count"], refusal["admitted_then"]) == ("acme", "rpm", 6, 6)
    assert refusal["examples"] == ["r4", "r5", "r6"]
    assert (refusal["first"], refusal["last"]) == ("2026-11-24T03:00:04+00:00", "2026-11-24T03:00:09+00:00")
    assert found["changes"][0] == {
        "request_id": "r4", "org": "acme", "then": "admitted", "then_limit": None, "now": "rate_limit_exceeded",
        "now_limit": "rpm",
    }  # fmt: skip
    text = gateway.do("replay", log, "--policies", tight).out
    assert "10 requests, 2026-11-24 03:00:00Z to 2026-11-24 03:00:09Z: 4 decided as they were, 6 that were" in text


def test_the_configured_policies_are_used_when_no_others_are_given(gateway: CommandLine) -> None:
    found = replayed(gateway, written(gateway, [line(number) for number in range(20)] + [refused(21)]))
    assert (found["decided_alike"], found["decided_otherwise"]) == (21, 0)
    assert found["used"]["differs"] == 0


def test_what_it_would_have_cost_is_told_for_each_org(gateway: CommandLine) -> None:
    ended = {"upstream_refused": 0, "complete": 2_000_000, "client_left": 2_000_000}
    lines = [
        line(at, org=f"o{at}", outcome=outcome, charged_ucredits=then)
        for at, (outcome, then) in enumerate(ended.items())
    ]
    found = replayed(gateway, written(gateway, lines), "--policies", policies(gateway, "", price=5))
    spent = {org["org"]: (org["charged_ucredits_then"], org["charged_ucredits_now"]) for org in found["orgs"]}
    assert spent == {"o0": (0, 0), "o1": (2_000_000, 5_000_000), "o2": (2_000_000, 5_000_000)}


def test_tokens_are_reserved_and_settled_as_the_request_ended(gateway: CommandLine) -> None:
    # 100 are reserved and 30 used, within a tenth of a second: five fit into 250, one of them at a time.
    lines = [line(number) for number in range(8)]
    found = replayed(
        gateway,
        written(gateway, lines),
        "--policies",
        policies(gateway, "{ name: t, count: tokens, limit: 250, window: 1h }"),
    )
    assert decided(found)["admitted", "admitted"] == 6
    overlapping = [one | {"settled_at_us": one["judged_at_us"] + 60 * SECOND_US} for one in lines]
    found = replayed(
        gateway,
        written(gateway, overlapping),
        "--policies",
        policies(gateway, "{ name: t, count: tokens, limit: 250, window: 1h }"),
    )
    assert decided(found)["admitted", "admitted"] == 2


def test_the_log_may_be_in_any_order_in_parts_and_packed(gateway: CommandLine) -> None:
    lines = [line(number) for number in range(12)]
    tight = policies(gateway, "{ name: rpm, count: requests, limit: 5, window: 1h }")
    expected = replayed(gateway, written(gateway, lines), "--policies", tight)
    packed = gateway.directory / "b.log.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in lines[::2]).encode()))
    rest = written(gateway, lines[::-2], "a.log")
    assert replayed(gateway, str(packed), rest, "--policies", tight) == expected
    text = "".join(json.dumps(one) + "\n" for one in reversed(lines)).encode()
    assert gateway("replay", "-", "--policies", tight, "--json", stdin=text).json() == expected


def test_who_was_refused_and_fits_now_is_charged_and_counted_apart(gateway: CommandLine) -> None:
    lines = [line(0), refused(1), refused(2)]
    found = replayed(
        gateway,
        written(gateway, lines),
        "--policies",
        policies(gateway, "{ name: rpm, count: requests, limit: 2, window: 1h }"),
    )
    assert decided(found) == {
        ("admitted", "admitted"): 1,
        ("rate_limit_exceeded", "admitted"): 1,
        ("rate_limit_exceeded", "rate_limit_exceeded"): 1,
    }
    (org,) = found["orgs"]
    assert (org["charged_ucredits_then"], org["charged_ucredits_now"]) == (2_000_000, 4_000_000)
    assert any(
        note.startswith("Requests that were refused then and fit now") and note.endswith(": 1.")
        for note in found["notes"]
    )


def test_a_slot_of_one_that_was_refused_is_held_as_long_as_others_held_theirs(gateway: CommandLine) -> None:
    slow = [line(number, settled_at_us=START_US + (number + 3) * SECOND_US) for number in (0,)]
    one = policies(gateway, "{ name: slots, count: concurrent, limit: 1 }")
    # r4 fits when r0 has ended, and is in flight for three seconds as r0 was: r5 and r6 meet it, r8 does not.
    lines = slow + [refused(number) for number in (4, 5, 6, 8)]
    found = replayed(gateway, written(gateway, lines), "--policies", one)
    assert [change["request_id"] for change in found["changes"] if change["now"] == "admitted"] == ["r4", "r8"]


def test_what_was_decided_before_the_limits_stays_and_is_counted_apart(gateway: CommandLine) -> None:
    nobody = {key: line(0)[key] for key in ("at", "event", "request_id", "method", "path", "client_ip", "ms")}
    poor = refused(1) | {"decision": "insufficient_credits", "status": 402, "limit": None}
    foreign = line(3, route="/gone"), line(4, plan="gone")
    lines = [nobody | {"decision": "unknown_route", "status": 404}, poor, line(2), *foreign]
    found = replayed(gateway, written(gateway, lines), "--policies", policies(gateway, ""))
    assert decided(found) == {
        ("ended_before_its_limits", "ended_before_its_limits"): 1,
        ("refused_for_credits", "refused_for_credits"): 1,
        ("admitted", "admitted"): 1,
        ("admitted", "not_configured_here"): 2,
    }
    notes = "\n".join(found["notes"])
    assert "Requests refused for want of credits, which stay so: balances are not in the log: 1." in notes
    assert "which are left out: 2." in notes


@pytest.mark.parametrize(
    ("members", "limits", "words"),
    [
        ({"stream": None}, "name: t, count: tokens, limit: 9000, window: 1m", "Requests whose body was not read then"),
        ({"judged_at_us": None}, "name: r, count: requests, limit: 9, window: 1m", "Requests that had no limit and"),
        ({"settled_at_us": None}, "", "Requests that were settled after their line was written"),
        ({"session": "x", "turn": None}, "name: s, count: sessions, limit: 9, window: 1m", "Requests of which the log"),
        ({"messages_in": 7}, "", "Messages of WebSockets, which are not in the log"),
        ({"hold_id": None, "decision": "client_left"}, "", "Requests that ended while they were being admitted"),
        ({}, "name: h, count: requests, limit: 9, window: 1m, per: 'header:x-team'", "No line has the header 'x-team'"),
    ],
)
def test_what_the_log_cannot_tell_is_said(
    gateway: CommandLine, members: dict[str, Any], limits: str, words: str
) -> None:
    found = replayed(
        gateway, written(gateway, [line(0, **members)]), "--policies", policies(gateway, limits and f"{{ {limits} }}")
    )
    assert any(note.startswith(words) for note in found["notes"]), found["notes"]


def test_a_shadow_is_told_apart_and_refuses_nobody(gateway: CommandLine) -> None:
    dark = policies(gateway, "{ name: dark, count: requests, limit: 2, window: 1h, shadow: true }")
    log = written(gateway, [line(number) for number in range(5)])
    found = replayed(gateway, log, "--policies", dark)
    assert decided(found) == {("admitted", "admitted"): 5}
    assert [(one["limit"], one["shadow"], one["count"]) for one in found["refusals"]] == [("dark", True, 3)]
    assert "Would be refused if these were no shadows" in gateway.do("replay", log, "--policies", dark).out


def test_bad_lines_are_named_and_counted_and_stop_nothing(gateway: CommandLine) -> None:
    log = Path(written(gateway, [line(0)]))
    other = json.dumps({"event": "gateway open", "level": "info"})
    broken = json.dumps(line(1, judged_at_us="soon"))
    log.write_text(log.read_text() + f"not json\n{other}\n\n{broken}\n" + json.dumps(line(2)) + "\n")
    found = replayed(gateway, str(log))
    assert found["lines"]["requests"] == 2 and found["lines"]["other_events"] == 1 and found["lines"]["bad"] == 2
    first, second = found["lines"]["bad_named"]
    assert first == f"{log}:2: is no JSON object"
    assert second.startswith(f"{log}:5: Expected") and "$.judged_at_us" in second
    assert f"not a line of an access log: {log}:2" in gateway.do("replay", str(log)).err


def test_a_line_without_end_and_a_packed_file_that_was_cut_are_bad_lines_too(gateway: CommandLine) -> None:
    log = Path(written(gateway, [line(0)]))
    with log.open("ab") as file:
        file.write(b"x" * (2 * logline.LINE_BYTES_MAX + 5) + b"\n" + json.dumps(line(1)).encode() + b"\n")
    packed = gateway.directory / "cut.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(line(at)) + "\n" for at in range(2, 300)).encode())[:-40])
    found = replayed(gateway, str(log), str(packed))["lines"]
    assert found["requests"] > 2 and found["bad"] >= 2
    assert f"{log}:2: longer than {logline.LINE_BYTES_MAX} bytes" in found["bad_named"]
    assert any("cannot be read on from here" in named for named in found["bad_named"])


def test_a_log_or_policies_that_are_not_there_are_a_failure_in_words(gateway: CommandLine) -> None:
    said = gateway("replay", "none.log")
    assert (said.exit_code, said.out) == (1, "") and "none.log" in said.err
    said = gateway("replay", written(gateway, []), "--policies", str(gateway.directory / "gone"))
    assert said.exit_code == 2 and "cannot list" in said.err
    assert gateway("replay").exit_code == 2
    bad = policies(gateway, "{ name: rpm, count: requests }")
    assert gateway("replay", written(gateway, []), "--policies", bad).exit_code == 2
    assert replayed(gateway, written(gateway, []))["lines"]["requests"] == 0


# Denials that a gateway remembered


def remembered(number: int, denied_at: int, at: float) -> dict[str, Any]:
    """Answered at `at` seconds with the denial that Redis had judged at `denied_at`."""
    found = refused(number, judged_at_us=START_US + int(at * SECOND_US))
    found["limits"][0]["denied_at_us"] = START_US + denied_at * SECOND_US
    return found


def test_a_denial_that_was_remembered_stays_one_though_a_release_has_made_room_since(gateway: CommandLine) -> None:
    released = line(0, outcome="never_reached", settled_at_us=START_US + 2 * SECOND_US, charged_ucredits=0)
    lines = [released, refused(1), remembered(2, 1, 2.5), line(3)]
    same = policies(gateway, "{ name: rpm, count: requests, limit: 1, window: 1h }")
    log = written(gateway, lines)
    found = replayed(gateway, log, "--policies", same)
    assert (found["decided_alike"], found["changes"]) == (4, [])
    # Where the first was not denied, the second is judged like any other, when it came.
    wider = policies(gateway, "{ name: rpm, count: requests, limit: 2, window: 1h }")
    found = replayed(gateway, log, "--policies", wider)
    assert [(one["request_id"], one["now"]) for one in found["changes"]] == [
        ("r1", "admitted"),
        ("r2", "admitted"),
        ("r3", "rate_limit_exceeded"),
    ]


def test_a_denial_is_remembered_only_of_limits_that_may_be(gateway: CommandLine) -> None:
    lines = [line(0), remembered(2, 1, 2.5)]
    tokens = policies(gateway, "{ name: rpm, count: tokens, limit: 110, window: 1s }")
    found = replayed(gateway, written(gateway, lines), "--policies", tokens)
    assert decided(found)["rate_limit_exceeded", "admitted"] == 1


def test_what_all_share_is_given_back_when_it_was_given_back_then(gateway: CommandLine) -> None:
    gateway.configure("routes:\n", "shared_limits: [{ name: all, count: concurrent, limit: 1 }]\nroutes:\n")
    denied = refused(1) | {
        "shared_judged_at_us": START_US + SECOND_US,
        "judged_at_us": START_US + SECOND_US + 100,
        "shared_settled_at_us": START_US + 3 * SECOND_US,
    }
    own = policies(gateway, "{ name: rpm, count: requests, limit: 1, window: 1h, per: user }")
    bob = {"user": "bob"}
    lines = [line(0), denied, line(2, **bob), line(4, **bob)]
    found = replayed(gateway, written(gateway, lines), "--policies", own)
    changed = {one["request_id"]: (one["now"], one["now_limit"]) for one in found["changes"]}
    assert changed == {"r2": ("rate_limit_exceeded", "all")}


def test_what_all_share_ends_by_its_own_clock(gateway: CommandLine) -> None:
    gateway.configure("routes:\n", "shared_limits: [{ name: all, count: concurrent, limit: 1 }]\nroutes:\n")
    times = {"shared_judged_at_us": START_US, "settled_at_us": START_US + 5 * SECOND_US}
    first = line(0, **times, shared_settled_at_us=START_US + SECOND_US // 2)
    found = replayed(gateway, written(gateway, [first, line(1)]), "--policies", policies(gateway, ""))
    assert decided(found) == {("admitted", "admitted"): 2}

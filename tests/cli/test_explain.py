"""`gateway explain`: requests that nobody has sent, and requests that happened."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.cli.conftest import CommandLine, Said
from tests.cli.using import use

CHAT = "/v1/chat/completions"
LIMITS = """\
policy: trial
limits:
  - { name: rpm, count: requests, limit: 3, window: 1h }
  - { name: user-tokens, count: tokens, limit: 4000, window: 1h, per: user }
  - { name: gpt, count: requests, limit: 9, window: 1h, when: { model: "gpt-*" } }
  - { name: streams, count: concurrent, limit: 2, when: { stream: true } }
  - { name: beta, count: requests, limit: 9, window: 1h, when: { header: x-beta, route: "/files/*" } }
  - { name: watched, count: requests, limit: 1, window: 1h, shadow: true }
price: { per_request: 2 }
"""


@pytest.fixture
def office(acme: CommandLine) -> CommandLine:
    """Org acme with limits that count some requests and not others."""
    (acme.directory / "policies" / "trial.yaml").write_text(LIMITS)
    acme.configure("routes:\n", "shared_limits: [{ name: all, count: requests, limit: 99, window: 1h }]\nroutes:\n")
    return acme


def body(gateway: CommandLine, **members: Any) -> str:
    file = gateway.directory / "body.json"
    file.write_text(json.dumps({"messages": [], **members}))
    return str(file)


def explained(gateway: CommandLine, *args: str, org: str = "acme") -> dict[str, Any]:
    found: dict[str, Any] = gateway.do("explain", *args, "--org", org, "--json").json()
    return found


def limits(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {limit["name"]: limit for limit in found["limits"]}


# Hypothetical


def test_a_request_that_would_be_admitted_is_explained_from_route_to_verdict(office: CommandLine) -> None:
    file = body(office, model="gpt-4", max_tokens=50)
    found = explained(office, "POST", CHAT, "--user", "ann", "--body", file)
    assert (found["route"], found["plan"], found["policy"]) == (f"POST {CHAT}", "trial", "trial")
    assert (found["price_ucredits"], found["available_ucredits"]) == (2_000_000, 100_000_000)
    assert found["verdict"]["admitted"] is True
    size = len(Path(file).read_bytes())
    assert found["body"] == {"bytes": size, "model": "gpt-4", "stream": False, "max_output_tokens": 50}
    tokens = limits(found)["user-tokens"]
    assert tokens["cost"] == -(-size // 4) + 50
    assert (tokens["used"], tokens["remaining"], tokens["per"]) == (0, 4_000, {"user": "ann"})
    assert (
        found["tokens"]
        == f"input {-(-size // 4)}: {size} bytes of body, 4 to a token; output 50: what the client allows"
    )


def test_limits_that_do_not_count_it_say_which_condition_failed(office: CommandLine) -> None:
    found = limits(explained(office, "POST", CHAT, "--body", body(office, model="demo")))
    assert {name for name, limit in found.items() if limit["applies"]} == {"rpm", "user-tokens", "watched", "all"}
    assert found["gpt"]["because"] == "only for models gpt-*, and its model is demo"
    assert found["streams"]["because"] == "only when the answer is streamed, and it asks for no stream"
    assert "only on /files/*, and the path is" in found["beta"]["because"]
    assert "only with the fields x-beta, and it lacks one" in found["beta"]["because"]
    elsewhere = limits(explained(office, "GET", "/files/a", "-H", "X-Beta: 1"))
    assert elsewhere["beta"]["applies"] and not elsewhere["user-tokens"]["applies"]
    assert "tokens are not known" in elsewhere["user-tokens"]["because"]


def test_a_refusal_names_the_limit_and_when_it_fits_again(office: CommandLine) -> None:
    use(office, 3)
    found = explained(office, "POST", CHAT, "--body", body(office))
    verdict = found["verdict"]
    assert (verdict["admitted"], verdict["status"], verdict["limit"]) == (False, 429, "rpm")
    assert 3_500_000 < verdict["retry_after_ms"] <= 3_600_000
    watched = limits(found)["watched"]
    assert watched["fits_in_ms"] > 0 and watched["shadow"]
    text = office.do("explain", "POST", CHAT, "--org", "acme", "--body", body(office)).out
    assert "refused: 429 rate_limit_exceeded: Limit 'rpm'" in text and "It would fit in 59m" in text


def test_explaining_takes_nothing(office: CommandLine) -> None:
    use(office, 2)
    with redis.Redis.from_url(office.env["REDIS_URL"]) as server:
        before = {key: server.dump(key) for key in server.scan_iter()}
        for _ in range(3):
            explained(office, "POST", CHAT, "--body", body(office))
        assert {key: server.dump(key) for key in server.scan_iter()} == before


def test_a_request_that_never_fits_is_told_so(office: CommandLine) -> None:
    found = explained(office, "POST", CHAT, "--body", body(office, max_tokens=5_000))
    assert (found["verdict"]["code"], found["verdict"]["limit"]) == ("request_exceeds_limit", "user-tokens")


def test_an_estimate_that_was_cut_says_so(office: CommandLine) -> None:
    office.do("limits", "set", "acme", "user-tokens", "500")
    found = explained(office, "POST", CHAT, "--body", body(office))
    assert "the policy reserves 1024, cut to what its limits let through" in found["tokens"]
    assert limits(found)["user-tokens"]["overridden"] and limits(found)["user-tokens"]["cost"] == 500


def test_without_a_body_it_says_what_it_took_for_granted(office: CommandLine) -> None:
    found = explained(office, "POST", CHAT)
    assert "No --body was given" in found["notes"][0]
    assert found["body"]["bytes"] == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/nowhere", 404, "unknown_route"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("GET", "/files/%2e%2e/v1/chat", 400, "ambiguous_path"),
        ("GET", "files", 400, "bad_request"),
    ],
)
def test_a_request_without_a_route_says_why(
    office: CommandLine, method: str, path: str, status: int, code: str
) -> None:
    found = explained(office, method, path)
    assert (found["verdict"]["status"], found["verdict"]["code"]) == (status, code)
    assert found["route"] is None and found["limits"] == []
    if code == "method_not_allowed":
        assert "Allowed: POST." in office.do("explain", method, path, "--org", "acme").out


def test_a_body_that_cannot_be_read_is_refused_as_the_gateway_would(office: CommandLine) -> None:
    file = office.directory / "bad.json"
    file.write_text("{")
    assert explained(office, "POST", CHAT, "--body", str(file))["verdict"]["code"] == "bad_request"
    assert office("explain", "POST", CHAT, "--org", "acme", "--body", "none.json").exit_code == 2


def test_who_asks_is_found_out_from_a_credential_that_no_process_list_shows(office: CommandLine) -> None:
    secret = office.do("keys", "add", "acme", "--user", "ann", "--json").json()["secret"]
    by_stdin = office("explain", "GET", "/files/a", "--key-stdin", "--json", stdin=secret.encode() + b"\n").json()
    file = office.directory / "key"
    file.write_text(secret)
    by_file = office.do("explain", "GET", "/files/a", "--key-file", str(file), "--json").json()
    for found in (by_stdin, by_file):
        assert (found["org"], found["user"], found["plan"], found["verdict"]["admitted"]) == (
            "acme",
            "ann",
            "trial",
            True,
        )
    nobody = office("explain", "GET", "/files/a", "--key-stdin", "--json", stdin=b"gw_nobody").json()
    assert (nobody["org"], nobody["verdict"]["status"], nobody["verdict"]["code"]) == (None, 401, "invalid_api_key")
    assert secret not in json.dumps(by_stdin)


def test_too_few_credits_are_a_verdict_too(office: CommandLine) -> None:
    (office.directory / "policies" / "trial.yaml").write_text(LIMITS.replace("per_request: 2", "per_request: 200"))
    found = explained(office, "GET", "/files/a")
    assert (found["verdict"]["status"], found["verdict"]["code"]) == (402, "request_exceeds_balance")


def test_an_org_or_plan_that_is_not_there_is_said(office: CommandLine) -> None:
    assert "--plan" in office("explain", "GET", "/files/a", "--org", "nobody").err
    found = explained(office, "GET", "/files/a", "--plan", "platinum")
    assert (found["verdict"]["status"], found["verdict"]["code"]) == (403, "unknown_plan")


@pytest.mark.parametrize(
    "args",
    [
        ("GET",),
        (),
        ("GET", "/files/a", "--org", "acme", "-H", "nonsense"),
        ("GET", "/files/a", "--org", "acme", "--claim", "nonsense"),
        ("--request-id", "x"),
        ("--log", "x"),
        ("GET", "/files/a", "--key-stdin", "--body", "-"),
        ("GET", "/files/a", "--org", "acme", "--key-stdin"),
    ],
)
def test_options_that_do_not_go_together_are_a_usage_error(office: CommandLine, args: tuple[str, ...]) -> None:
    assert office("explain", *args, stdin=b"").exit_code == 2


# From the log

AT = "2026-11-24T03:00:00.250000Z"
LINE: dict[str, Any] = {
    "at": AT, "event": "request", "request_id": "r1", "method": "POST", "path": CHAT, "client_ip": "192.0.2.1",
    "route": f"POST {CHAT}", "org": "acme", "user": "ann", "key": "key_1", "plan": "pro", "policy": "pro",
    "identity": "api_key", "stream": False, "body_bytes": 400, "max_output_tokens": 50, "model": "gpt-4",
    "judged_at_us": 1_795_489_200_000_000, "ms": {"total": 250.0},
}  # fmt: skip


def happened(gateway: CommandLine, lines: list[dict[str, Any]], request_id: str = "r1", *args: str) -> Said:
    log = gateway.directory / "access.log"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return gateway("explain", "--request-id", request_id, "--log", str(log), *args)


def story(gateway: CommandLine, **members: Any) -> str:
    said = happened(gateway, [LINE | members])
    assert said.exit_code == 0, said
    return said.out


def test_an_admitted_request_is_told_from_its_line_alone(gateway: CommandLine) -> None:
    gateway.config.unlink()  # no configuration is needed
    limits = [
        {"name": "rpm", "cost": 1, "used": 4, "limit": 20, "actual": 1},
        {"name": "tpm", "cost": 150, "used": 900, "limit": 1000, "subject": "s00abc", "warned": True, "actual": 60},
        {"name": "talks", "cost": 0, "used": 3, "limit": 5, "actual": 0},
    ]
    text = story(
        gateway, status=200, decision="admitted", hold_id="h1", limits=limits, outcome="complete", input_tokens=40,
        output_tokens=20, basis="exact", charged_ucredits=1_500_000, available_ucredits=9_000_000, turn=2,
        settled_at_us=1_795_489_200_200_000, overrides={"rpm": 20},
    )  # fmt: skip
    for part in (
        f"POST {CHAT} from 192.0.2.1, answered with 200 at 2026-11-24 03:00:00.250Z.",
        "user ann of org acme with key_1 (api_key); plan pro, policy pro.",
        "It asked for gpt-4, at most 50 tokens of output, in 400 bytes.",
        "The org had values of its own in place of its policy's: rpm = 20.",
        "Limit rpm: 4 of 20 were used, and it needed 1: it fitted.",
        "Limit tpm (portion s00abc): 900 of 1000 were used, and it needed 150: it fitted, and the client was warned; "
        "in the end it took 60.",
        "its session was counted already",
        "Admitted. It was turn 2 of its session.",
        "It was answered in full, 40 tokens in and 20 out; what it used is known exactly.",
        "It was charged 1.5 credits; 9 were left beside it.",
    ):
        assert part in text, part


def test_who_refused_and_why_is_told(gateway: CommandLine) -> None:
    limits = [
        {"name": "rpm", "cost": 1, "used": 20, "limit": 20, "retry_ms": 12_300},
        {"name": "tpm", "cost": 9, "used": 1000, "limit": 1000, "retry_ms": 400},
        {"name": "dark", "cost": 9, "used": 5, "limit": 5, "retry_ms": 99_000, "shadow": True},
    ]
    text = story(gateway, status=429, decision="rate_limit_exceeded", limit="rpm", limits=limits)
    assert "Refused by limit rpm, until 12.3 s later. It did not fit tpm either." in text
    assert "it would have been refused, were this no shadow" in text
    assert "remembered" not in text
    limits[0]["denied_at_us"] = 1_795_489_199_000_000
    text = story(gateway, status=429, decision="rate_limit_exceeded", limit="rpm", limits=limits[:1])
    assert "The gateway remembered this denial" in text and "what its other limits had used" in text


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        ("unknown_route", "No route of the gateway serves this path"),
        ("method_not_allowed", "not for this method"),
        ("ambiguous_path", "can be read in more than one way"),
        ("invalid_api_key", "Its credential was missing"),
        ("too_many_failures", "Its network had sent too many requests"),
        ("store_unavailable", "did not answer in time"),
        ("unknown_plan", "not in the gateway's configuration"),
        ("insufficient_credits", "too few credits"),
        ("request_exceeds_limit", "Waiting does not help"),
        ("something_new", "ended before it was admitted"),
    ],
)
def test_requests_that_were_refused_before_their_admission_are_told_as_well(
    gateway: CommandLine, decision: str, words: str
) -> None:
    nobody = {key: LINE[key] for key in ("at", "event", "request_id", "method", "path", "client_ip", "ms")}
    text = happened(gateway, [nobody | {"status": 400, "decision": decision, "limit": "tpm"}]).out
    assert words in text
    assert "The log cannot tell which route it was meant for; whose it was" in text


def test_every_line_of_an_id_is_told_and_one_that_is_not_there_is_a_failure(gateway: CommandLine) -> None:
    done = LINE | {"status": 200, "decision": "admitted", "hold_id": "h1"}
    again = done | {"hold_id": "h2"}
    other = done | {"request_id": "r2", "hold_id": "h3"}
    told = happened(gateway, [done, other, again], "r1", "--json").json()
    assert [one["request_id"] for one in told] == ["r1", "r1"]
    assert happened(gateway, [done, other, again], "h3", "--json").json()[0]["request_id"] == "r2"
    said = happened(gateway, [done], "r9")
    assert (said.exit_code, said.out) == (1, "") and "no request r9" in said.err


def test_packed_logs_and_standard_input_are_read_too(gateway: CommandLine) -> None:
    text = (json.dumps(LINE | {"status": 200, "decision": "admitted", "hold_id": "h1"}) + "\nnonsense\n").encode()
    packed = gateway.directory / "access.log.gz"
    packed.write_bytes(gzip.compress(text))
    said = gateway.do("explain", "--request-id", "r1", "--log", str(packed))
    assert "Admitted." in said.out and f"{packed}:2: is no JSON object" in said.err
    assert "Admitted." in gateway("explain", "--request-id", "r1", "--log", "-", stdin=text).out
    assert gateway("explain", "--request-id", "r1", "--log", "none.log").exit_code == 1

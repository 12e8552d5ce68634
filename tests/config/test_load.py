"""The loader: files, environment, and every mistake at once."""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.config import JwtSource, Limit, Settings, TrustedHeaderSource, load, load_text
from gateway.errors import ConfigError

EXAMPLES = Path(__file__).parents[1] / "policies"
SMALLEST = (EXAMPLES / "good_smallest.yaml").read_text()
EVERYTHING = (EXAMPLES / "good_everything.yaml").read_text()
TRIAL = (EXAMPLES / "good_policy_trial.yaml").read_text()
EVERY_LIMIT = (EXAMPLES / "good_policy_everything.yaml").read_text().replace("policy: everything", "policy: trial")
POLICIES = {"trial.yaml": TRIAL}
ENVIRON = {"ROUTER_PORT": "3000", "JWT_SECRET": "a-shared-secret-of-enough-characters"}
SECRET = "0123456789abcdef0123456789abcdef"


def problems_of(
    text: str, policies: Mapping[str, str] = POLICIES, environ: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_text(text, policies, environ)
    return caught.value.problems


def problems_at(file: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    return caught.value.problems


def test_mistakes_in_several_files_are_all_reported_at_once() -> None:
    text = SMALLEST.replace("upstream: router", "upstream: ruter").replace("credits: 100", "credits: many")
    policies = {
        "pro.yaml": "policy: pro\nlimits:\n  - { name: rpm, count: requests, limit: 0 }\n",
        "broken.yaml": "policy: [\n",
        "trial.yaml": TRIAL + "price:\n  per_requst: 1\n  per_request: 1.5\ntokens: 7\n",
    }
    assert problems_of(text + "listen: { port: 0, prot: 1 }\n", policies) == (
        "gateway.yaml:6: plans.trial.credits: expected a whole number, got text 'many'",
        "gateway.yaml:8: routes[0].upstream: unknown upstream 'ruter', did you mean 'router'?",
        "gateway.yaml:9: listen: unknown key 'prot', did you mean 'port'?",
        "policies/broken.yaml:1: not YAML: expected the node content, but found '<stream end>'"
        " (while parsing a flow node)",
        "policies/pro.yaml:3: limits[0].limit: must be at least 1, got 0",
        "policies/pro.yaml:3: limits[0]: a limit on requests needs a 'window' such as 1m",
        "policies/trial.yaml:6: price: unknown key 'per_requst', did you mean 'per_request'?",
        "policies/trial.yaml:7: price.per_request: expected a whole number, got the number 1.5",
        "policies/trial.yaml:8: tokens: expected a mapping (key: value), got the number 7",
    )


def test_a_policy_file_that_cannot_be_read_is_not_also_an_unknown_policy() -> None:
    assert len(problems_of(SMALLEST, {"trial.yaml": "policy: {"})) == 1


def test_policies_are_checked_even_when_gateway_yaml_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("upstreams: [\n")
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "trial.yml").write_text("policy: trial\nlimit: 5\n")
    (tmp_path / "policies" / "README.md").write_text("not a policy\n")
    (tmp_path / "policies" / ".draft.yaml").write_text("not a policy\n")
    found = problems_at(tmp_path / "gateway.yaml")
    assert [line.rsplit("/", 1)[1].partition(": ")[0] for line in found] == ["gateway.yaml:1", "trial.yml:2"]


# -- files


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    assert problems_at(tmp_path / "gateway.yaml") == (f"{tmp_path}/gateway.yaml:1: no such file",)


def test_a_directory_is_a_problem(tmp_path: Path) -> None:
    assert problems_at(tmp_path) == (f"{tmp_path}:1: is not a regular file",)


def test_a_pipe_is_a_problem_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gateway.yaml")
    assert problems_at(tmp_path / "gateway.yaml") == (f"{tmp_path}/gateway.yaml:1: is not a regular file",)


def test_an_impossible_file_name_is_a_problem() -> None:
    assert len(problems_at(Path("gateway\0.yaml"))) == 1
    assert len(problems_at(Path("x" * 5000))) == 1


def test_a_file_over_one_mebibyte_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    assert "larger than 1MiB" in problems_at(tmp_path / "gateway.yaml")[0]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(SMALLEST, encoding="utf-8-sig")
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "trial.yaml").write_text(TRIAL)
    assert load(tmp_path / "gateway.yaml", {}).plans["trial"].credits == 100


def test_file_names_are_relative_to_gateway_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc" / "rules").mkdir(parents=True)
    (tmp_path / "etc" / "rules" / "trial.yaml").write_text(TRIAL)
    (tmp_path / "etc" / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    text = SMALLEST.replace("[demo]", "[demo], ca_file: ca.pem") + "policies: rules\n"
    (tmp_path / "etc" / "gateway.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    loaded = load("etc/gateway.yaml", {})
    assert loaded.upstreams["router"].ca_file == str(tmp_path / "etc" / "ca.pem")
    assert list(loaded.policies) == ["trial"]


def test_more_policy_files_than_anybody_writes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(SMALLEST)
    (tmp_path / "policies").mkdir()
    for number in range(257):
        (tmp_path / "policies" / f"p{number}.yaml").write_text(
            "policy: trial\n" if number == 0 else f"policy: p{number}\n"
        )
    assert "holds 257 policy files, at most 256" in problems_at(tmp_path / "gateway.yaml")[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000,
        "a: " * 2 + "[" * 900 + "]" * 900,
        'a: "\\UFFFFFFFF"',
        "%YAML 9.9\n---\na: 1",
        "? [a]\n: 1",
        "\x00",
        "a: *b",
    ],
)
def test_hostile_yaml_is_a_problem_and_never_a_traceback(text: str) -> None:
    assert problems_of(text)


def test_aliases_that_would_grow_without_bound_cost_nothing() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(c + 1)}: &{chr(c + 1)} [*{chr(c)}, *{chr(c)}]\n" for c in range(97, 121))
    assert any("aliases" in problem for problem in problems_of(bomb))


# -- environment


def credits_with(written: str, environ: Mapping[str, str]) -> int:
    return (
        load_text(SMALLEST.replace("credits: 100", f'credits: "{written}"'), POLICIES, environ).plans["trial"].credits
    )


def test_a_variable_gives_the_value() -> None:
    assert credits_with("${CREDITS}", {"CREDITS": "7"}) == 7
    assert credits_with("${CREDITS:-5}", {"CREDITS": "7"}) == 7
    assert credits_with("1${CREDITS}${CREDITS}", {"CREDITS": "7"}) == 177


def test_a_default_stands_in_for_a_variable_that_is_unset_or_empty() -> None:
    assert credits_with("${CREDITS:-5}", {}) == 5
    assert credits_with("${CREDITS:-5}", {"CREDITS": ""}) == 5


def test_a_variable_cannot_add_keys_and_is_not_expanded_again() -> None:
    environ = {"HOST": "a: {b: 1}", "OTHER": "${HOST}"}
    text = SMALLEST + 'listen: { host: "${OTHER}" }\n'
    assert load_text(text, POLICIES, environ).listen.host == "${HOST}"


def test_a_dollar_is_escaped_by_a_dollar() -> None:
    text = SMALLEST + 'listen: { host: "$${HOST} costs 5$" }\n'
    assert load_text(text, POLICIES).listen.host == "${HOST} costs 5$"


def test_an_empty_variable_leaves_an_optional_key_out() -> None:
    text = SMALLEST + 'sessions: { signing_key: "${KEY:-}" }\n'
    assert load_text(text, POLICIES).sessions.signing_key is None


def test_the_process_environment_is_read_when_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "trial.yaml").write_text(TRIAL)
    (tmp_path / "gateway.yaml").write_text(SMALLEST.replace("100", '"${GATEWAY_TEST_CREDITS}"'))
    monkeypatch.setenv("GATEWAY_TEST_CREDITS", "12")
    assert load(tmp_path / "gateway.yaml").plans["trial"].credits == 12


def test_policies_take_variables_too() -> None:
    policies = {"trial.yaml": TRIAL.replace("limit: 20,", 'limit: "${RPM}",')}
    assert load_text(SMALLEST, policies, {"RPM": "9"}).policies["trial"].limits[0].limit == 9
    assert problems_of(SMALLEST, policies) == (
        "policies/trial.yaml:3: limits[0].limit: environment variable RPM is not set"
        " (write ${RPM:-default} to give a default)",
    )


# -- values


def test_settings_carry_units_in_their_attributes_and_survive_pickling() -> None:
    loaded = load_text(SMALLEST, POLICIES)
    assert loaded.upstreams["router"].timeouts.first_byte_ms == 120_000
    assert loaded.routes[0].body_bytes_max == 10 << 20
    assert loaded.policies["trial"].limits[0].window_ms == 60_000
    assert loaded.routes[0].name == "POST /v1/chat/completions"
    everything = load_text(EVERYTHING, POLICIES, ENVIRON)
    assert pickle.loads(pickle.dumps(everything)) == everything


def test_settings_cannot_be_changed() -> None:
    loaded = load_text(SMALLEST, POLICIES)
    with pytest.raises(ValueError, match="frozen"):
        loaded.listen.port = 1  # type: ignore[misc]  # what the test is about


def test_secrets_appear_neither_in_settings_nor_in_problems() -> None:
    everything = load_text(EVERYTHING, POLICIES, ENVIRON)
    assert "secret" not in repr(everything).replace("JwtKey", "")
    text = EVERYTHING.replace("postgresql://gateway:secret@db.internal/app", "mysql://gateway:hunter2@db/app")
    text = text.replace("rediss://user:secret@", "cache://user:hunter2@").replace("${JWT_SECRET}", "hunter2")
    text = text.replace("http://127.0.0.1", "http://me:hunter2@127.0.0.1")
    found = problems_of(text, POLICIES, ENVIRON)
    assert len(found) == 5
    assert not any("hunter2" in problem for problem in found)


def test_a_secret_of_the_wrong_type_is_not_repeated_either() -> None:
    text = SMALLEST.replace("  - api_key:", "  - jwt: { keys: [{ secret: 20260401 }], org: o, plan: p }")
    found = problems_of(text + "sessions: { signing_key: 20260402 }\n", POLICIES)
    assert found == (
        "gateway.yaml:4: identity[0].jwt.keys[0].secret: expected text, got a number: put it in quotes",
        "gateway.yaml:9: sessions.signing_key: expected text, got a number: put it in quotes",
    )


def test_headers_and_methods_are_normalised() -> None:
    everything = load_text(EVERYTHING, POLICIES, ENVIRON)
    assert everything.sessions.header == "x-conversation"
    assert everything.routes[0].method == ("POST", "GET")
    assert everything.routes[1].usage is None
    assert everything.upstreams["router"].targets == ("http://127.0.0.1:3000", "https://[::1]:8443")


@pytest.mark.parametrize(
    ("key", "algorithms"),
    [(f"secret: {SECRET}", ("HS256",)), ("jwks: 'http://issuer:8080/jwks'", ("RS256", "ES256"))],
)
def test_jwt_algorithms_follow_from_the_keys(key: str, algorithms: tuple[str, ...]) -> None:
    source = f"  - jwt: {{ keys: [{{ {key} }}], org: org_id, plan: plan }}"
    loaded = load_text(SMALLEST.replace("  - api_key:", source), POLICIES)
    (jwt,) = loaded.identity
    assert isinstance(jwt, JwtSource)
    assert jwt.algorithms == algorithms


def test_no_value_exists_that_breaks_a_rule_of_its_section() -> None:
    with pytest.raises(ValueError, match="needs a 'window'"):
        Limit.model_validate({"name": "rpm", "count": "requests", "limit": 1})
    with pytest.raises(ValueError, match="trusts everybody"):
        TrustedHeaderSource.model_validate({"org": "x-org", "plan": "x-plan", "from": ["0.0.0.0/0"]})
    with pytest.raises(ValueError, match="algorithm confusion"):
        keys = [{"secret": SECRET}, {"jwks": "https://issuer.example/jwks"}]
        JwtSource.model_validate({"keys": keys, "org": "o", "plan": "p"})


# -- whatever is written

_JUNK: st.SearchStrategy[object] = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1.5,
        10**30,
        "",
        "x",
        "1m",
        "${",
        "${UNSET}",
        "${ROUTER_PORT}",
        [],
        [None],
        [[1]],
        {},
        {"x": {}},
    ]
)


def _paths(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    below: list[tuple[str | int, object]] = []
    if isinstance(value, dict):
        below = list(value.items())
    elif isinstance(value, list):
        below = list(enumerate(value))
    return [path, *(found for key, inner in below for found in _paths(inner, (*path, key)))]


def _replaced(value: object, path: tuple[str | int, ...], junk: object) -> object:
    if not path:
        return junk
    if isinstance(value, dict):
        return {k: _replaced(v, path[1:], junk) if k == path[0] else v for k, v in value.items()}
    assert isinstance(value, list)
    return [_replaced(v, path[1:], junk) if i == path[0] else v for i, v in enumerate(value)]


def assert_answered(text: str, policy: str) -> None:
    """It loads, or every problem names a file and a line of it."""
    try:
        loaded = load_text(text, {"trial.yaml": policy}, ENVIRON)
    except ConfigError as exc:
        lines = {"gateway.yaml": text, "policies/trial.yaml": policy}
        for problem in exc.problems:
            match = re.fullmatch(r"([^:]+):(\d+): \S[^\n]*", problem)
            assert match, problem
            assert 1 <= int(match[2]) <= max(1, len(lines[match[1]].splitlines()))
            assert "nput should" not in problem and "pydantic" not in problem, problem
    else:
        assert isinstance(loaded, Settings)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), in_policy=st.booleans())
def test_any_value_in_any_place_is_taken_or_answered(data: st.DataObject, in_policy: bool) -> None:
    parsed = yaml.safe_load(EVERY_LIMIT if in_policy else EVERYTHING.replace("${JWT_SECRET}", SECRET))
    path = data.draw(st.sampled_from(_paths(parsed)))
    text = yaml.safe_dump(_replaced(parsed, path, data.draw(_JUNK)))
    assert_answered(SMALLEST if in_policy else text, text if in_policy else TRIAL)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(EVERYTHING)), st.integers(0, 12), st.text("{}[]:,&*!|>'\"%@`#- \n\tab1$", max_size=6))
def test_any_slip_of_the_keyboard_is_taken_or_answered(at: int, removed: int, typed: str) -> None:
    assert_answered(EVERYTHING[:at] + typed + EVERYTHING[at + removed :], TRIAL)

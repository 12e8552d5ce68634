"""`gateway check`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from tests.cli.conftest import CommandLine


def test_check_shows_what_each_plan_meets_on_each_route(gateway: CommandLine) -> None:
    said = gateway.do("check")
    assert "POST /v1/chat/completions → router" in said.out
    assert "/files/* → router" in said.out
    assert said.out.count("rpm: 20 requests in 1m per org") == 4
    assert said.out.count("tpm: 20000 tokens in 1m per org (not here") == 2
    assert "404 unknown_route" in said.out


def test_check_speaks_json(gateway: CommandLine) -> None:
    answer = gateway.do("check", "--json").json()
    assert answer["ok"] is True
    assert [(row["route"], row["plan"], row["price"]) for row in answer["rows"]] == [
        ("POST /v1/chat/completions", "trial", 2),
        ("POST /v1/chat/completions", "pro", 2),
        ("/files/*", "trial", 2),
        ("/files/*", "pro", 2),
    ]


def test_check_names_every_mistake_at_once(gateway: CommandLine) -> None:
    gateway.configure("upstream: router, dialect", "upstream: ruter, dialect")
    gateway.configure("credits: 100,", "credits: -1,")
    said = gateway("check")
    assert said.exit_code == 2
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert any("did you mean 'router'?" in line for line in lines)
    assert all(line.startswith(f"{gateway.config}:") for line in lines)


def test_check_speaks_json_of_mistakes_too(gateway: CommandLine) -> None:
    gateway.configure("credits: 100,", "credits: -1,")
    said = gateway("check", "--json")
    assert said.exit_code == 2
    assert said.json() == {"ok": False, "problems": said.err.splitlines()}


@pytest.mark.parametrize(("option", "key"), [("--schema", "upstreams"), ("--policy-schema", "limits")])
def test_a_schema_needs_no_configuration(gateway: CommandLine, option: str, key: str) -> None:
    gateway.config.unlink()
    schema = gateway.do("check", option).json()
    assert schema["$schema"].endswith("2020-12/schema")
    assert key in schema["properties"]


def test_two_schemas_at_once_are_refused(gateway: CommandLine) -> None:
    assert gateway("check", "--schema", "--policy-schema").exit_code == 2


def test_a_missing_file_is_a_configuration_error(gateway: CommandLine) -> None:
    gateway.config.unlink()
    said = gateway("check")
    assert (said.exit_code, said.err) == (2, f"{gateway.config}:1: no such file\n")


def test_the_file_may_be_named_by_the_environment(gateway: CommandLine, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["check"], env={"GATEWAY_CONFIG": str(gateway.config)})
    assert result.exit_code == 0
    assert f"{gateway.config} is valid" in result.stderr

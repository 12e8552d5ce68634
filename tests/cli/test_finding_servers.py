"""How commands find their servers, and what they say when there are none; a few runs as a process of their own."""

import json
import os
import subprocess
import sys

import pytest

from tests.cli.conftest import CommandLine

NOTHING_RUNS = "error: nothing is configured and `gateway run` is not running here; set DATABASE_URL or start it\n"


def write_run_file(gateway: CommandLine, text: str) -> None:
    state = gateway.directory / ".gateway"
    state.mkdir()
    (state / "run.json").write_text(text)


def a_dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid


def test_without_servers_the_way_out_is_named(gateway: CommandLine) -> None:
    for command in (("orgs", "list"), ("keys", "list", "acme"), ("credits", "balance", "acme"), ("migrate",)):
        said = gateway(*command)
        assert (said.exit_code, said.out, said.err) == (1, "", NOTHING_RUNS)


def test_the_servers_of_a_running_gateway_are_found(migrated: CommandLine) -> None:
    document = {
        "redis": migrated.env.pop("REDIS_URL"),
        "postgres": migrated.env.pop("DATABASE_URL"),
        "ai_router": "http://127.0.0.1:1",
        "address": "http://127.0.0.1:8080",
        "pid": os.getpid(),
    }
    write_run_file(migrated, json.dumps(document))
    migrated.do("orgs", "add", "acme", "--plan", "trial")
    report = migrated.do("credits", "balance", "acme", "--json").json()
    assert report["in_redis"]["available_ucredits"] == 100_000_000
    findings = {finding["name"]: finding for finding in migrated("doctor", "--json").json()["findings"]}
    assert findings["redis.reachable"]["status"] == findings["postgres.reachable"]["status"] == "ok"
    assert "http://127.0.0.1:1 takes no connection" in findings["upstream.router"]["says"]


def test_what_a_dead_gateway_left_behind_is_not_believed(gateway: CommandLine) -> None:
    urls = {"redis": "redis://127.0.0.1:1", "postgres": "postgresql://127.0.0.1:1/x", "pid": a_dead_pid()}
    write_run_file(gateway, json.dumps(urls))
    assert gateway("orgs", "list").err == NOTHING_RUNS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"pid": 1}',
        '{"pid": "1", "redis": "", "postgres": ""}',
        '{"pid": -1, "redis": "x", "postgres": "y"}',
    ],
)
def test_a_run_file_that_makes_no_sense_is_not_believed(gateway: CommandLine, text: str) -> None:
    write_run_file(gateway, text)
    assert gateway("orgs", "list").err == NOTHING_RUNS


def test_a_configured_server_comes_before_a_running_one(migrated: CommandLine) -> None:
    urls = {"redis": "redis://127.0.0.1:1", "postgres": "postgresql://127.0.0.1:1/x", "pid": os.getpid()}
    write_run_file(migrated, json.dumps(urls))
    assert migrated.do("orgs", "list", "--json").json() == []


def test_an_unreachable_database_is_told_in_one_sentence_without_the_password(gateway: CommandLine) -> None:
    gateway.env["DATABASE_URL"] = "postgresql://ann:hunter2@127.0.0.1:1/gateway"
    said = gateway("orgs", "list")
    assert (said.exit_code, said.out) == (1, "")
    assert said.err.startswith("error: postgres: ") and "`gateway doctor` looks closer" in said.err
    assert len(said.err.splitlines()) == 1
    assert "hunter2" not in said.err


def test_a_wrong_configuration_ends_every_command_with_2(gateway: CommandLine) -> None:
    gateway.configure("api_key:", "apikey:")
    for command in (("orgs", "list"), ("migrate",), ("run",), ("serve",), ("doctor",)):
        said = gateway(*command)
        assert said.exit_code == 2
        assert "api_key" in said.out + said.err


def test_serve_starts_nothing_by_itself(gateway: CommandLine) -> None:
    said = gateway("serve")
    assert said.exit_code == 2
    assert "set DATABASE_URL, or use `gateway run`" in said.err


def process(gateway: CommandLine, *args: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_URL")} | gateway.env
    command = [sys.executable, "-m", "gateway", "--config", str(gateway.config), *args]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_process_ends_with_the_exit_code_and_no_traceback(gateway: CommandLine) -> None:
    ended = process(gateway, "orgs", "list")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", NOTHING_RUNS)


def test_a_process_keeps_the_secret_apart_from_the_words(acme: CommandLine) -> None:
    ended = process(acme, "keys", "add", "acme")
    assert ended.returncode == 0
    assert ended.stdout.startswith("gw_") and ended.stdout.count("\n") == 1
    assert "cannot be shown again" in ended.stderr


def test_the_version_is_told() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "gateway", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.startswith("gateway ")

"""`gateway doctor`, against servers that are well, ill in one way, or away."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.cli.diagnosis.redis import PROBE_KEY
from tests import servers
from tests.cli.conftest import CommandLine

Findings = dict[str, dict[str, str]]


def examine(gateway: CommandLine, exit_code: int) -> Findings:
    """What the doctor found, by name."""
    said = gateway("doctor", "--json")
    assert said.exit_code == exit_code, said
    report = said.json()
    assert report["ok"] is (exit_code == 0)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert all(finding["hint"] for finding in findings.values() if finding["status"] != "ok")
    return findings


def problems(findings: Findings) -> set[str]:
    return {name for name, finding in findings.items() if finding["status"] == "problem"}


@pytest.fixture
def well(migrated: CommandLine, demo_router_url: str) -> CommandLine:
    migrated.env["AI_ROUTER_URL"] = demo_router_url
    return migrated


@contextlib.contextmanager
def told(gateway: CommandLine, *command: str, undo: tuple[str, ...]) -> Iterator[None]:
    """The Redis of this run was told `command`, which is undone afterwards: other tests use it too."""
    with redis.Redis.from_url(gateway.env["REDIS_URL"]) as client:
        try:
            client.execute_command(*command)
            yield
        finally:
            client.execute_command(*undo)


async def in_database(gateway: CommandLine, statement: str) -> None:
    await servers.execute(gateway.env["DATABASE_URL"], statement)


async def examine_aside(gateway: CommandLine, exit_code: int) -> Findings:
    return await asyncio.to_thread(examine, gateway, exit_code)


@pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
def test_everything_is_well(well: CommandLine, stores: str) -> None:
    findings = examine(well, 0)
    assert set(findings) >= {
        "redis.version",
        "redis.eviction",
        "redis.persistence",
        "redis.scripts",
        "redis.clock",
        "postgres.version",
        "postgres.schema",
        "postgres.ai_credits",
        "postgres.write",
        "postgres.connections",
        "postgres.clock",
        "postgres.notify",
        "upstream.router",
    }
    # The test servers give up safety on disk for speed, and a busy machine is slow; the doctor sees both.
    tolerated = {"postgres.durability", "postgres.latency", "redis.latency"}
    assert {name for name, found in findings.items() if found["status"] != "ok"} <= tolerated
    shown = well.do("doctor").out
    assert "redis.scripts" in shown


def test_an_examination_leaves_nothing_behind(well: CommandLine) -> None:
    examine(well, 0)
    with redis.Redis.from_url(well.env["REDIS_URL"]) as client:
        assert client.keys() == []
    assert well.do("orgs", "list", "--json").json() == []


def test_servers_that_are_away_do_not_hide_each_other(gateway: CommandLine) -> None:
    gateway.env = {
        "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
        "DATABASE_URL": "postgresql://ann:hunter2@127.0.0.1:1/gateway",
        "AI_ROUTER_URL": "http://127.0.0.1:1",
    }
    assert problems(examine(gateway, 1)) == {"redis.reachable", "postgres.reachable", "upstream.router"}
    said = gateway("doctor")
    assert said.exit_code == 1
    assert "3 problems" in said.out
    assert "hunter2" not in said.out + said.err


def test_an_address_that_cannot_exist_does_not_hide_the_others(gateway: CommandLine) -> None:
    gateway.env = {"REDIS_URL": f"redis://{'a' * 70}/0", "DATABASE_URL": "postgresql://127.0.0.1:1/x?sslmode=bogus"}
    found = problems(examine(gateway, 1))
    assert "postgres.reachable" in found
    assert found & {"redis", "redis.reachable"}


def test_with_nothing_configured_and_nothing_running_the_doctor_says_so(gateway: CommandLine) -> None:
    findings = examine(gateway, 1)
    assert "`gateway run` is not running here" in findings["redis.reachable"]["says"]
    assert "`gateway run` is not running here" in findings["postgres.reachable"]["says"]
    assert findings["upstream.router"]["status"] == "warning"


def test_a_broken_configuration_is_a_finding_per_mistake(gateway: CommandLine) -> None:
    gateway.configure("credits: 100,", "credits: -1,")
    said = gateway("doctor", "--json")
    assert said.exit_code == 2
    assert [finding["status"] for finding in said.json()["findings"]] == ["problem"]


def test_a_server_that_never_answers_is_given_up(
    gateway: CommandLine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cli.diagnosis.redis.ASK_TIMEOUT_MS", 200)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        gateway.env = {"REDIS_URL": f"redis://127.0.0.1:{port}", "DATABASE_URL": database_url}
        findings = examine(gateway, 1)
    assert "redis.reachable" in problems(findings)


def test_a_wrong_redis_password_is_called_that(well: CommandLine) -> None:
    head, _, place = well.env["REDIS_URL"].rpartition("@")
    assert head
    well.env["REDIS_URL"] = f"redis://:wrong@{place}"
    assert "password" in examine(well, 1)["redis.reachable"]["hint"]


def test_eviction_of_anything_is_a_problem(well: CommandLine) -> None:
    policy = ("CONFIG", "SET", "maxmemory-policy")
    with told(well, *policy, "allkeys-lru", undo=(*policy, "noeviction")):
        assert problems(examine(well, 1)) == {"redis.eviction"}
    with told(well, *policy, "volatile-ttl", undo=(*policy, "noeviction")):
        examine(well, 0)


def test_full_memory_is_a_problem(well: CommandLine) -> None:
    with told(well, "CONFIG", "SET", "maxmemory", "1", undo=("CONFIG", "SET", "maxmemory", "0")):
        assert problems(examine(well, 1)) == {"redis.memory", "redis.scripts"}


def test_a_replica_is_a_problem(well: CommandLine) -> None:
    with told(well, "REPLICAOF", "127.0.0.1", "1", undo=("REPLICAOF", "NO", "ONE")):
        findings = examine(well, 1)
    assert problems(findings) == {"redis.role", "redis.scripts"}
    assert "primary" in findings["redis.scripts"]["hint"]


def test_without_persistence_what_may_be_lost_is_said(well: CommandLine) -> None:
    appendonly = ("CONFIG", "SET", "appendonly")
    with told(well, *appendonly, "no", undo=(*appendonly, "yes")):
        found = examine(well, 0)["redis.persistence"]
    assert found["status"] == "warning"
    assert "charges not yet posted" in found["says"]


def test_a_redis_user_without_rights_is_told_which_it_needs(well: CommandLine) -> None:
    place = well.env["REDIS_URL"].rpartition("@")[2]
    few = ("ACL", "SETUSER", "few", "on", ">pw", "~other:*", "+@all", "-config")
    with told(well, *few, undo=("ACL", "DELUSER", "few")):
        well.env["REDIS_URL"] = f"redis://few:pw@{place}"
        findings = examine(well, 1)
    assert problems(findings) == {"redis.scripts"}
    assert "{ai_credits:*" in findings["redis.scripts"]["hint"]
    assert PROBE_KEY.startswith("{ai_credits:")


def test_a_redis_user_who_may_not_learn_which_process_it_talks_to_is_told_so(well: CommandLine) -> None:
    """Nobody would notice that a restart has brought back an older state."""
    place = well.env["REDIS_URL"].rpartition("@")[2]
    with told(well, "ACL", "SETUSER", "few", "on", ">pw", "~*", "+@all", "-info", undo=("ACL", "DELUSER", "few")):
        well.env["REDIS_URL"] = f"redis://few:pw@{place}"
        findings = examine(well, 1)
    assert problems(findings) == {"redis.reachable"}
    assert "info" in findings["redis.reachable"]["says"]
    assert "may not do what the gateway needs" in findings["redis.reachable"]["hint"]


def test_pending_migrations_are_a_problem(empty: CommandLine, demo_router_url: str) -> None:
    empty.env["AI_ROUTER_URL"] = demo_router_url
    findings = examine(empty, 1)
    assert problems(findings) == {"postgres.schema"}
    assert "`gateway migrate`" in findings["postgres.schema"]["hint"]


async def test_a_database_of_a_newer_release_is_a_problem(well: CommandLine) -> None:
    await in_database(well, "INSERT INTO gateway.migration (version, name, sha256) VALUES (9999, 'later', '')")
    findings = await examine_aside(well, 1)
    assert "newer than this release" in findings["postgres.schema"]["says"]
    said = await asyncio.to_thread(well, "orgs", "list")
    assert said.exit_code == 1
    assert "newer than this release" in said.err


async def test_a_database_that_takes_no_writes_is_a_problem(well: CommandLine) -> None:
    name = well.env["DATABASE_URL"].rpartition("/")[2]
    await in_database(well, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert problems(await examine_aside(well, 1)) == {"postgres.role", "postgres.write"}


async def test_a_table_of_the_application_that_does_not_fit_is_a_problem(well: CommandLine) -> None:
    await in_database(well, "ALTER TABLE ai_credits DROP CONSTRAINT ai_credits_pkey")
    assert "not unique" in (await examine_aside(well, 1))["postgres.ai_credits"]["says"]
    await in_database(well, "DROP TABLE ai_credits CASCADE; CREATE TABLE ai_credits (organization_id uuid, amount int)")
    says = (await examine_aside(well, 1))["postgres.ai_credits"]["says"]
    assert "organization_id is uuid, not text" in says
    assert "credits is missing" in says


async def test_a_trigger_that_is_off_is_a_problem(well: CommandLine) -> None:
    await in_database(well, "ALTER TABLE ai_credits DISABLE TRIGGER note_external_change")
    assert problems(await examine_aside(well, 1)) == {"postgres.trigger"}


async def test_charges_that_belong_to_nobody_are_a_warning(well: CommandLine) -> None:
    columns = "(org_id, request_id, kind, amount)"
    await in_database(well, f"INSERT INTO gateway.dead_letter {columns} VALUES ('gone', 'r1', 'settle', -1)")
    assert (await examine_aside(well, 0))["postgres.dead_letters"]["status"] == "warning"


def test_orgs_of_a_plan_that_is_gone_are_a_problem(well: CommandLine) -> None:
    well.do("orgs", "add", "acme", "--plan", "trial")
    well.configure("  trial: { credits: 100, policy: trial }\n", "")
    findings = examine(well, 1)
    assert "plan 'trial' is not configured" in findings["postgres.plans"]["says"]


def test_each_target_is_asked_by_itself(well: CommandLine) -> None:
    well.configure('targets: ["${AI_ROUTER_URL:-demo}"]', 'targets: ["${AI_ROUTER_URL:-demo}", "http://127.0.0.1:1"]')
    said = well("doctor", "--json")
    found = [finding["status"] for finding in said.json()["findings"] if finding["name"] == "upstream.router"]
    assert found == ["ok", "problem"]


def test_a_secret_that_can_be_guessed_is_a_problem_and_stays_unsaid(well: CommandLine) -> None:
    well.configure("routes:", f"sessions: {{ signing_key: {'abcd' * 8} }}\nroutes:")
    assert problems(examine(well, 1)) == {"config.signing_key"}
    said = well("doctor")
    assert "abcdabcd" not in said.out + said.err
    well.configure("abcd" * 8, "please-CHANGE-me-0192837465-qwertzuiop")
    assert examine(well, 0)["config.signing_key"]["status"] == "warning"
    well.configure("please-CHANGE-me-0192837465-qwertzuiop", "kN3vX9qTz7RfW2bYc8MhJ5sLp4GdA6uE")
    assert examine(well, 0)["config.signing_key"]["status"] == "ok"


class Issuer(ThreadingHTTPServer):
    """Answers every GET with `body`."""

    body = b""


class IssuerAnswer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Issuer)
        self.send_response(200)
        self.send_header("content-length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer(("127.0.0.1", 0), IssuerAnswer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_signing_keys_are_read(well: CommandLine, issuer: Issuer) -> None:
    url = f"http://127.0.0.1:{issuer.server_port}/keys?token=hunter2"
    well.configure("  - api_key:\n", f'  - jwt: {{ keys: [{{ jwks: "{url}" }}], org: org_id, default_plan: trial }}\n')
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    issuer.body = json.dumps({"keys": [jwt.algorithms.ECAlgorithm.to_jwk(public, as_dict=True)]}).encode()
    assert "holds 1 usable keys" in examine(well, 0)["identity.jwks"]["says"]
    issuer.body = b'{"keys": []}'
    assert problems(examine(well, 1)) == {"identity.jwks"}
    well.configure(str(issuer.server_port), "1")
    findings = examine(well, 1)
    assert "cannot be read" in findings["identity.jwks"]["says"]
    assert "hunter2" not in json.dumps(findings)

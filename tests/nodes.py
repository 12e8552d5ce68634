"""Redis servers by the handful: each with a directory of its own, configured at will, killed without a word."""

import contextlib
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from gateway.embedded.binaries import valkey_binary
from gateway.embedded.process import Command, ServerProcess
from tests.authority import Pems

START_TIMEOUT_S = 30.0

_CONFIG = """\
bind 127.0.0.1
dir "{directory}"
requirepass {password}
{listen}
{more}
"""
_TLS = """\
port 0
tls-port {port}
tls-cert-file {tls.cert}
tls-key-file {tls.key}
tls-ca-cert-file {tls.ca}
tls-replication yes
"""


@dataclass
class Node:
    """One server, running or killed."""

    port: int
    password: str
    process: ServerProcess
    #: What it was started as: primary, replica or sentinel.
    role: str
    tls: Pems | None

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return redis_url("", [self], "/0")

    @property
    def alive(self) -> bool:
        return self.process.exit_code is None

    def do(self, *command: str | int) -> Any:
        """The reply as the server gave it. Asked twice when it hangs up, as one that changes its role does."""
        try:
            return self._do(command)
        except redis.ConnectionError:
            if not self.alive:
                raise
            return self._do(command)

    def _do(self, command: tuple[str | int, ...]) -> Any:
        with redis.Redis.from_url(self.url, decode_responses=True, protocol=2) as client:
            client.response_callbacks.clear()
            return client.execute_command(*command)

    def info(self, section: str = "everything") -> dict[str, str]:
        lines = self.do("INFO", section).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def kill(self) -> None:
        """It has ended, without a word to anybody."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            wait_until(lambda: not self.alive)

    def answers(self) -> bool:
        assert self.alive, self.process.log_tail()
        with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
            return bool(self.do("PING"))
        return False


class Nodes:
    """Servers of one binary and one password."""

    def __init__(self, directory: Path, binary: Path, tls: Pems | None) -> None:
        self._directory = directory
        self._binary = binary
        self._tls = tls
        self.password = secrets.token_hex(8)
        self.started: list[Node] = []

    def start(self, role: str, port: int, more: str = "") -> Node:
        """A server that answers. more: lines of its configuration."""
        directory = self._directory / str(port)
        directory.mkdir()
        listen = _TLS.format(port=port, tls=self._tls) if self._tls else f"port {port}"
        config = directory / "server.conf"
        config.write_text(_CONFIG.format(directory=directory, password=self.password, listen=listen, more=more))
        process = ServerProcess(directory)
        flags = ("--sentinel",) if role == "sentinel" else ()
        process.start(Command((str(self._binary), str(config), *flags), directory, signal.SIGTERM))
        node = Node(port, self.password, process, role, self._tls)
        self.started.append(node)
        wait_until(node.answers)
        return node


@contextmanager
def nodes(binary: Path | None = None, tls: Pems | None = None) -> Iterator[Nodes]:
    """Whatever is started inside the block is gone after it. binary: in place of the embedded Valkey."""
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        servers = Nodes(Path(folder).resolve(), binary or valkey_binary(), tls)
        try:
            yield servers
        finally:
            for node in servers.started:
                node.kill()


def redis_url(kind: str, servers: Sequence[Node], path: str, **options: str) -> str:
    """kind: the end of the scheme, such as `+cluster`. The servers have one password."""
    tls = servers[0].tls
    files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key} if tls else {}
    query = "&".join(f"{name}={value}" for name, value in {**files, **options}.items())
    places = ",".join(node.place for node in servers)
    secure = "s" if tls else ""
    return f"redis{secure}{kind}://:{servers[0].password}@{places}{path}" + (f"?{query}" if query else "")


def wait_until(condition: Callable[[], object], timeout_s: float = START_TIMEOUT_S) -> None:
    """The condition holds. Where no event loop runs, or none has anything better to do; tests have `waiting.until`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {timeout_s} s"
        time.sleep(0.02)

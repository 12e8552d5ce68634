"""The demo AI router as a child process: what an upstream target `demo` means to `run`."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway.embedded.lifecycle import EmbeddedServer
from gateway.embedded.process import Command, stop_leftovers

_MODULE = "gateway.embedded.demo_router"
_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0


class EmbeddedDemoRouter(EmbeddedServer):
    """One demo router on a free port of 127.0.0.1, at a base URL; its log lives in `<state_dir>/demo`.

    flags: of `python -m gateway.embedded.demo_router`, such as `("--chunk-delay", "20ms")`; file names absolute.
    """

    def __init__(self, state_dir: Path, *, flags: Sequence[str] = ()) -> None:
        super().__init__(state_dir.resolve() / "demo", "the demo AI router", _START_TIMEOUT_S, _STOP_TIMEOUT_S)
        self._flags = tuple(flags)
        # The directory above the package: there Python finds the module whether the gateway is installed or not.
        self._root = Path(__file__).resolve().parents[2]

    async def _launch(self) -> str:
        await stop_leftovers((self._process.pid_path,), _MODULE, signal.SIGTERM, _STOP_TIMEOUT_S)
        self._process.start(Command((sys.executable, "-m", _MODULE, *self._flags), self._root, signal.SIGTERM))
        if not await self._until(self._has_told_its_port):
            raise self._failure("did not start")
        return f"http://127.0.0.1:{self._told_port()}"

    async def _has_told_its_port(self) -> bool:
        return self._told_port() is not None

    def _told_port(self) -> int | None:
        """The router listens before it writes the port, so a whole line with a number means that it answers."""
        first, newline, _ = self._process.log_path.read_text().partition("\n")
        return int(first) if newline and first.isdigit() else None

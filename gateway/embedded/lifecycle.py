"""What every embedded server goes through: its directory locked, leftovers stopped, the process ready, and its end.

Knows nothing of the servers themselves; those are `valkey`, `postgres` and `demo`.

    stopped --start--> starting --ready--> running --stop--> stopped
                          |  fails or is cancelled               ^
                          +--------------------------------------+
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import TracebackType

from gateway.embedded.process import Command, EmbeddedError, ServerProcess, StateLock, free_port, make_directory
from gateway.shield import shielded

_POLL_S = 0.01
_PORT_ATTEMPTS = 5


class EmbeddedServer(ABC):
    """One server on 127.0.0.1 whose state lives in `directory`.

    product: its name in messages. start_timeout_s bounds the wait for a started process; stop_timeout_s the wait for
    an orderly end, after which it is killed.
    """

    def __init__(self, directory: Path, product: str, start_timeout_s: float, stop_timeout_s: float) -> None:
        self._directory = directory
        self._product = product
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._lock = StateLock(directory)
        self._process = ServerProcess(directory)

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return self._process.pid

    async def start(self) -> str:
        """The server answers at the returned URL, which contains the password if it has one.

        Raises EmbeddedError when its programs are missing, another run uses the directory, the data cannot be used,
        or it does not come up in time; nothing runs then. The same holds when the start is cancelled.
        """
        make_directory(self._directory)
        self._lock.acquire()
        try:
            return await self._launch()
        except OSError as exc:
            await self._give_back()
            raise EmbeddedError(f"{self._product} cannot be started in {self._directory}: {exc}") from exc
        except BaseException:
            await self._give_back()
            raise

    async def stop(self) -> None:
        """The server has ended, its data are on disk, and the directory is free. May be called at any time."""
        await self._process.stop(self._stop_timeout_s)
        self._lock.release()

    async def __aenter__(self) -> str:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._give_back()

    @abstractmethod
    async def _launch(self) -> str:
        """Stop leftovers, start the process, wait until it is ready; the URL."""

    async def _on_free_port(self, command: Callable[[int], Command], ready: Callable[[int], Awaitable[bool]]) -> int:
        """The port on which the process of `command` became `ready`.

        Somebody else may take a port between our choosing it and the server's listening on it: then another is tried.
        """
        for _ in range(_PORT_ATTEMPTS):
            port = free_port()
            self._process.start(command(port))
            if await self._until(partial(ready, port)):
                return port
            if "in use" not in self._process.log_tail():
                break
        raise self._failure("did not start")

    async def _until(self, ready: Callable[[], Awaitable[bool]]) -> bool:
        """True once the process is `ready`; False when it ended instead. Raises EmbeddedError when it is late."""
        deadline = time.monotonic() + self._start_timeout_s
        while self._process.exit_code is None:
            if await ready():
                return True
            if time.monotonic() > deadline:
                raise self._failure(f"is not ready after {self._start_timeout_s:.0f} s")
            await asyncio.sleep(_POLL_S)
        return False

    def _failure(self, what: str) -> EmbeddedError:
        return EmbeddedError(f"{self._product} {what}; the end of its log:\n{self._process.log_tail()}")

    async def _give_back(self) -> None:
        await shielded(self.stop(), self._stop_timeout_s * 2)

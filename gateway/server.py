"""Listening: uvicorn around the application, one process or several behind one socket, and the way it all ends.

SIGTERM/SIGINT → `/-/ready` says no → after `grace` nothing new is accepted → open requests finish, at most
`drain_timeout` → what still runs is ended, in its dialect where that can still be said, and settled → stores are
flushed and closed. A second signal skips the waiting, not the settling.
"""

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType

import structlog
import uvicorn
import uvloop

from gateway.app import App, create_app
from gateway.config import Settings
from gateway.downstream import Bounds, connection_type
from gateway.errors import ConfigError

BACKLOG = 4096
KEEP_ALIVE_S = 75
WORKER_POLL_S = 0.2
#: How often open requests are ended once the time to drain is over.
END_AGAIN_S = 0.1
#: A worker that died is replaced, at most this often.
RESPAWN_PAUSE_S = 1.0

log = structlog.get_logger("gateway.server")


class Server(uvicorn.Server):
    """A uvicorn server that turns readiness off before it stops, and always closes the application."""

    def __init__(self, app: App, settings: Settings, on_started: Callable[[], None] | None = None) -> None:
        listen = settings.listen
        super().__init__(
            uvicorn.Config(
                app,
                http=connection_type(
                    Bounds(
                        head_timeout_s=listen.client_idle_ms / 1000,
                        body_timeout_s=listen.body_timeout_ms / 1000,
                        connections_max=listen.connections_max,
                        on_refusal=app.note_refusal,
                    )
                ),
                ws="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                # Requests that were ended get as long as settling may take; then uvicorn cancels what is left.
                timeout_graceful_shutdown=(listen.drain_timeout_ms + _ending_ms(settings)) // 1000 + 2,
            )
        )
        self._app = app
        self._grace_s = listen.grace_ms / 1000
        self._drain_s = listen.drain_timeout_ms / 1000
        self._on_started = on_started
        self._loop = asyncio.get_running_loop()
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        match self._signals:
            case 1:
                self._app.begin_drain()
                self._loop.call_soon_threadsafe(self._loop.call_later, self._grace_s, self._stop)
            case 2:
                self.should_exit = True
                self._loop.call_soon_threadsafe(self._end_open)
            case _:
                self.force_exit = True

    def _stop(self) -> None:
        self.should_exit = True
        self._loop.call_later(self._drain_s, self._end_open)

    def _end_open(self) -> None:
        """Again and again, because a connection may have brought one more request just before it was told to stop."""
        self._app.end_open()
        self._loop.call_later(END_AGAIN_S, self._end_open)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


async def serve(settings: Settings) -> None:
    """The gateway has answered on `listen.host:port` until a signal ended it. Raises ConfigError when it cannot
    listen there."""
    listener = bind(settings.listen.host, settings.listen.port)
    await serve_on(listener, settings, lambda: log.info("listening", address=address(listener)))


async def serve_on(listener: socket.socket, settings: Settings, on_started: Callable[[], None]) -> None:
    """Like `serve`, on a socket that listens already; closes it. `on_started` runs once requests can come."""
    try:
        if settings.listen.workers == 1:
            await _serve_here(settings, listener, on_started)
        else:
            await _Workers(settings, listener).run(on_started)
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError that names the address and what stands in the way."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        reason = exc.strerror or str(exc)
        raise ConfigError(
            [f"cannot listen on {host}:{port}: {reason} (`listen`, or GATEWAY_PORT, names another)"]
        ) from exc
    listener.setblocking(False)
    return listener


def address(listener: socket.socket) -> str:
    """The base URL a client on this machine can use."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve_here(settings: Settings, listener: socket.socket, on_started: Callable[[], None] | None) -> None:
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # that it starts and stops, we say ourselves
    app = create_app(settings)
    # Modules and configuration live as long as the process. Looked at again by every full collection, they would stop
    # all requests for some 50 ms every few thousand of them.
    gc.collect()
    gc.freeze()
    await Server(app, settings, on_started).serve([listener])


def _work(settings: Settings, listener: socket.socket) -> None:
    """A worker's whole life."""
    # Out of the terminal's process group: Ctrl-C comes once, from the parent, not twice.
    os.setpgid(0, 0)
    uvloop.run(_serve_as_worker(settings, listener))


async def _serve_as_worker(settings: Settings, listener: socket.socket) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    loop = asyncio.get_running_loop()

    def orphaned() -> None:
        loop.remove_reader(parent.sentinel)
        log.error("the parent process is gone, so this worker ends")
        signal.raise_signal(signal.SIGTERM)

    # Nobody would replace, stop or even know a worker whose parent was killed.
    loop.add_reader(parent.sentinel, orphaned)
    await _serve_here(settings, listener, None)


class _Workers:
    """`workers` processes that accept from one socket; one that dies is replaced."""

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self._settings = settings
        self._listener = listener
        # Spawned, not forked: a worker must not inherit this process's event loop.
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._stopping = asyncio.Event()

    async def run(self, on_started: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._pass_on, number)
        try:
            for _ in range(self._settings.listen.workers):
                self._spawn()
            on_started()
            while not self._stopping.is_set():
                await self._replace_dead()
            while any(process.is_alive() for process in self._processes):
                await asyncio.sleep(WORKER_POLL_S)
        finally:
            for process in self._processes:
                process.kill()
                process.join()

    def _spawn(self) -> None:
        process = self._context.Process(target=_work, args=(self._settings, self._listener), daemon=False)
        process.start()
        self._processes.append(process)

    async def _replace_dead(self) -> None:
        try:
            async with asyncio.timeout(WORKER_POLL_S):
                await self._stopping.wait()
        except TimeoutError:
            dead = [process for process in self._processes if not process.is_alive()]
            for process in dead:
                log.error("worker died", pid=process.pid, exitcode=process.exitcode)
                self._processes.remove(process)
                await asyncio.sleep(RESPAWN_PAUSE_S)
                self._spawn()

    def _pass_on(self, number: int) -> None:
        self._stopping.set()
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)


def _ending_ms(settings: Settings) -> int:
    """The longest that a request may take to end once it was told to."""
    closing = max((route.websocket.close_timeout_ms for route in settings.routes if route.websocket), default=0)
    return closing + settings.credits.settle_timeout_ms

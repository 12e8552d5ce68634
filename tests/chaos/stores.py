"""The stores of a run: killed, emptied, stopped, brought back. Each gateway reaches them through relays of its own."""

import asyncio
import contextlib
import os
import secrets
import signal
from pathlib import Path

import asyncpg
import redis.asyncio as redis_client

from gateway.embedded import EmbeddedPostgres
from gateway.embedded.binaries import valkey_binary
from gateway.embedded.process import Command, ServerProcess, free_port
from tests.waiting import until
from tests.walk.raw import Relay

_CONFIG = 'bind 127.0.0.1\nport {port}\ndir "{directory}"\nrequirepass {password}\nmasterauth {password}\n{more}\n'
#: What of its state each kind of Redis has after it was killed.
KINDS = {
    "aof": "appendonly yes\nappendfsync everysec",
    "none": 'save ""\nappendonly no',
    "replica": 'save ""\nappendonly no\nrepl-diskless-sync-delay 0',
}


class RedisServer:
    """One server of a kind; `kill` and `start` any number of times, on the same port and the same files."""

    def __init__(self, directory: Path, kind: str, password: str) -> None:
        directory.mkdir()
        self.port = free_port()
        self.url = f"redis://:{password}@127.0.0.1:{self.port}/0"
        self._directory = directory
        self._process: ServerProcess | None = None
        config = _CONFIG.format(port=self.port, directory=directory, password=password, more=KINDS[kind])
        (directory / "server.conf").write_text(config)

    async def start(self) -> None:
        """It answers, with whatever of its data it has kept."""
        self._process = ServerProcess(self._directory)
        argv = (str(valkey_binary()), str(self._directory / "server.conf"))
        self._process.start(Command(argv, self._directory, signal.SIGTERM))
        await until(self._answers, 30)

    async def _answers(self) -> bool:
        with contextlib.suppress(redis_client.ConnectionError, redis_client.BusyLoadingError):
            return bool(await self.do("PING"))
        return False

    async def do(self, *command: str | int) -> object:
        async with redis_client.Redis.from_url(self.url) as client:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    async def kill(self) -> None:
        process = self._process
        if process is not None and process.exit_code is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: process.exit_code is not None)


class Stores:
    """A Redis of a kind (with a replica, for `replica`) and a PostgreSQL."""

    def __init__(self, directory: Path, kind: str) -> None:
        password = secrets.token_hex(8)
        self.kind = kind
        self.redis = RedisServer(directory / "redis-a", kind, password)
        self._replica = RedisServer(directory / "redis-b", kind, password) if kind == "replica" else None
        self._postgres = EmbeddedPostgres(directory / "postgres")
        self.postgres_url = ""
        self.redis_relays: list[Relay] = []
        self.postgres_relays: list[Relay] = []

    async def start(self, gateways: int) -> None:
        await self.redis.start()
        if self._replica is not None:
            await self._replica.start()
            await self._follow()
        self.postgres_url = await self._postgres.start()
        for _ in range(gateways):
            self.redis_relays.append(Relay(self.redis.url))
            self.postgres_relays.append(Relay(self.postgres_url))
        for relay in (*self.redis_relays, *self.postgres_relays):
            await relay.open()

    async def stop(self) -> None:
        for relay in (*self.redis_relays, *self.postgres_relays):
            relay.thaw()
            await relay.close()
        await self.redis.kill()
        if self._replica is not None:
            await self._replica.kill()
        await self._postgres.stop()

    async def _follow(self) -> None:
        assert self._replica is not None
        await self._replica.do("REPLICAOF", "127.0.0.1", self.redis.port)

        async def follows() -> bool:
            assert self._replica is not None
            role = await self._replica.do("ROLE")
            return isinstance(role, list) and role[3] == b"connected"

        await until(follows, 30)

    async def kill_redis(self, pause_s: float) -> None:
        """It dies without a word. After `pause_s` it is back with what it had on disk; or its replica is the primary
        and it comes back as the replica of that."""
        await self.redis.kill()
        await asyncio.sleep(pause_s)
        if self._replica is None:
            await self.redis.start()
            return
        await self._replica.do("REPLICAOF", "NO", "ONE")
        self.redis, self._replica = self._replica, self.redis
        await _retarget(self.redis_relays, self.redis.url)
        await self._replica.start()
        await self._follow()

    async def stop_postgres(self, pause_s: float) -> None:
        """In an orderly way: what it had is there when it is back."""
        await self._postgres.stop()
        await self._start_postgres_again(pause_s)

    async def kill_postgres(self, pause_s: float) -> None:
        """It dies without a word, and recovers what it had committed."""
        pid = self._postgres.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await self._postgres.stop()
        await self._start_postgres_again(pause_s)

    async def _start_postgres_again(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        self.postgres_url = await self._postgres.start()
        await _retarget(self.postgres_relays, self.postgres_url)

    async def sql(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """On a connection of its own, past all relays."""
        connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(self.postgres_url, timeout=5)
        try:
            return await connection.fetch(statement, *args, timeout=20)
        finally:
            connection.terminate()


async def _retarget(relays: list[Relay], url: str) -> None:
    for relay in relays:
        await relay.close()
        await relay.open(url)

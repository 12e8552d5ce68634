"""Several workers behind one socket are one gateway."""

import os
import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from gateway import server
from gateway.errors import ConfigError
from tests.waiting import until
from tests.walk.house import CREDIT, House, Process
from tests.walk.test_money import storm


def children(pid: int) -> list[int]:
    """The worker processes of a gateway; multiprocessing's own helper is not one of them."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


async def test_two_workers_share_credits_and_a_dead_one_is_replaced(house: House) -> None:
    house.settings["workers"] = "2"
    await house.credits(20)
    async with Process(house) as gateway:
        assert gateway.process is not None
        parent = gateway.process.pid
        await until(lambda: len(children(parent)) == 2)
        await until(lambda: len(gateway.events("gateway open")) == 2)
        statuses: Counter[int] = await storm(house, [gateway.address], 100)
        assert statuses[200] == 20
        await house.settled()
        assert await house.charges() == [("settle", CREDIT)] * 20

        killed = children(parent)[0]
        os.kill(killed, signal.SIGKILL)
        await until(lambda: len(gateway.events("gateway open")) == 3, 30)
        workers = children(parent)
        assert len(workers) == 2 and killed not in workers
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{gateway.address}/-/health")).status_code == 200
        assert await gateway.end(signal.SIGTERM) == 0
        assert [worker for worker in workers if Path(f"/proc/{worker}").exists()] == []


async def test_workers_do_not_outlive_a_killed_parent(house: House) -> None:
    house.settings["workers"] = "2"
    async with Process(house) as gateway:
        assert gateway.process is not None
        await until(lambda: len(gateway.events("gateway open")) == 2)
        workers = children(gateway.process.pid)
        await gateway.end(signal.SIGKILL)
        await until(lambda: [worker for worker in workers if Path(f"/proc/{worker}").exists()] == [])


def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    taken = server.bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: Address already in use .*GATEWAY_PORT"):
        server.bind("127.0.0.1", port)
    taken.close()

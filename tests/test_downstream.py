"""The client's side, without a server: messages as ASGI gives them."""

import asyncio
from typing import Any

import pytest

from gateway.downstream import HIGH_WATER_BYTES, Client, Patience
from tests.waiting import until


class Wire:
    """What the client sends, one message at a time; `leave` is its disconnect."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, body: bytes, *, more: bool) -> None:
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()


async def deliver(_: object) -> None:
    return None


@pytest.mark.parametrize("size", [0, 1, HIGH_WATER_BYTES, 2 * HIGH_WATER_BYTES])
async def test_a_leaving_client_is_noticed_whatever_the_size_of_its_body(size: int) -> None:
    wire = Wire()
    wire.send(b"x" * size, more=False)

    async def walk() -> None:
        client = Client(wire.receive, deliver, Patience(60_000))
        try:
            assert await client.arrived() == b"x" * size
            wire.leave()
            await asyncio.Event().wait()
        finally:
            assert client.left
            client.close()

    task = asyncio.create_task(walk())
    await until(task.done)
    assert task.cancelled()


async def test_a_body_that_is_not_read_is_not_taken_in_full() -> None:
    wire = Wire()
    for _ in range(100):
        wire.send(b"x" * 64 * 1024, more=True)
    client = Client(wire.receive, deliver, Patience(60_000))
    await until(lambda: wire.messages.qsize() == 100 - HIGH_WATER_BYTES // (64 * 1024))
    for _ in range(10):
        await asyncio.sleep(0)
    assert wire.messages.qsize() == 100 - HIGH_WATER_BYTES // (64 * 1024)
    client.close()

"""Upstreams through the whole gateway: who does not fit is told so and pays nothing, and metrics show the targets."""

import asyncio

import httpx

from tests.upstream.scripted import OK, Peer, Server
from tests.waiting import until
from tests.walk.house import CREDIT, House, in_process


async def test_a_busy_upstream_is_a_503_that_costs_nothing(house: House) -> None:
    release = asyncio.Event()

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await release.wait()
            await peer.send(OK)

    async with Server(script) as server:
        house.upstream_url = server.origin
        house.settings |= {"connections_max": "1", "queue_timeout": "20ms"}
        await house.credits(10)
        key = {"authorization": f"Bearer {house.secret}"}
        async with (
            in_process(house) as gateway,
            httpx.AsyncClient(base_url=gateway.address, headers=key, timeout=30) as client,
        ):
            first = asyncio.create_task(client.get("/open"))
            await until(lambda: server.connections == 1)
            busy = await client.get("/open")
            assert (busy.status_code, busy.json()["code"]) == (503, "upstream_busy")
            assert (busy.headers["retry-after"], busy.headers["x-should-retry"]) == ("1", "true")
            metrics = (await client.get("/-/metrics")).text
            labels = f'target="{server.origin}",upstream="ai_router"'
            assert 'gateway_upstream_requests{state="in_flight",upstream="ai_router"} 1.0' in metrics
            assert f"gateway_upstream_target_healthy{{{labels}}} 1.0" in metrics
            assert f"gateway_upstream_target_requests{{{labels}}} 1.0" in metrics
            release.set()
            assert (await first).status_code == 200
            await house.settled()
            assert [charged for _, charged in await house.charges() if charged] == [house.price * CREDIT]

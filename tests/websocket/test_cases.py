"""Case by case: what an echo server says to a client is the same, byte for byte, with the room between them."""

import asyncio

from gateway.config import WebSocket
from tests.websocket.cases import Case, cases, play
from tests.websocket.echo import echo_server
from tests.websocket.ends import door

TOGETHER = 20
RULES = WebSocket.model_construct(message_bytes_max=32 << 20)


async def test_every_case_ends_as_it_does_without_us(full: bool) -> None:
    wanted = list(cases(full))
    assert len(wanted) >= (500 if full else 450)
    async with echo_server() as server, door(server, RULES) as between:
        direct = f"{server[0]}:{server[1]}"
        limit = asyncio.Semaphore(TOGETHER)

        async def differs(case: Case) -> str:
            async with limit:
                expected = await play(case, direct, "/", {})
                assert expected.head.startswith(b"HTTP/1.1 101") and expected.ended == "end", case.name
                assert expected.frames, case.name
                got = await play(case, between.address, "/", {})
            difference = got.differs_from(expected)
            return difference and f"{case.name}: {difference}"

        found = await asyncio.gather(*(differs(case) for case in wanted))
    assert [difference for difference in found if difference] == []

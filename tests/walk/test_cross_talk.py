"""Nobody ever gets an answer that is not his own, whoever else is killed in the middle of whatever.

Every request says who it is in its path, a field and its body; the upstream answers with what it read of each. The
upstream keeps a record of requests that disagree with themselves, that are not whole, or that come when none may come.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import uvloop

from tests.waiting import until
from tests.walk import raw
from tests.walk.house import House
from tests.walk.raw import Visit
from tests.walk.storm.clients import Plan
from tests.walk.storm.exchanges import BODY_BYTES_MIN, Wish, answer_body, request, request_body
from tests.walk.storm.running import CHAT, DRAINED, PLAIN, TOKENS, storm, storm_gateway, storm_upstream

#: What the gateway is served with.
LOOPS = {"uvloop": uvloop.new_event_loop}

POOL = 16
FATES = {"stay": 60, "pair": 5, "request": 20, "waiting": 5, "answer": 8, "end": 2}


@pytest.fixture
async def house(house: House) -> House:
    house.limits = [TOKENS]
    house.settings["connections_max"] = str(POOL)
    await house.credits(1_000_000)
    return house


@pytest.mark.timeout(1200)
async def test_every_answer_is_the_askers_own(
    house: House, full: bool, record_property: Callable[[str, object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storm_upstream() as upstream:
        house.upstream_url = upstream.url
        async with storm_gateway(house, monkeypatch) as gateway:
            plan = Plan(
                address=gateway.address,
                secret=house.secret,
                paths=(CHAT, PLAIN, PLAIN, DRAINED),
                clients=96,
                fates=FATES,
                seed=1,
                answers=100_000 if full else 3_000,
            )
            report = await storm(plan)
            await until(lambda: gateway.gateway.admission.open_count == 0 and gateway.gateway.settling.idle)
            record = await upstream.record()
            await house.settled(60)
    record_property("answers", report.answers)
    record_property("left", dict(report.left))
    record_property("busy", dict(report.busy))
    record_property("seconds", report.seconds)
    record_property("answers_per_second", round(report.answers / report.seconds))
    assert report.wrong == []
    assert report.answers >= plan.answers
    assert record["offences"] == []
    twice = [id for id, count in Counter(record["ids"]).items() if count > 1]
    assert twice == [], "a request was sent more than once"
    assert record["open_max"] >= POOL, "the connections were never all in use"


@dataclass
class Keeper:
    """An upstream in this process that keeps its connections, and every request that came to its end on one."""

    #: (id, body) in the order in which they were complete.
    whole: list[tuple[str, bytes]] = field(default_factory=list)
    #: Ids of those whose head arrived.
    begun: list[str] = field(default_factory=list)

    def has_begun(self, id: str) -> bool:
        return id in self.begun

    async def serve(self, visit: Visit) -> None:
        reader = visit.reader
        while True:
            head = await visit.read_head()
            lines = (line.partition(b": ") for line in head.split(b"\r\n")[1:-2])
            fields = {name.lower(): value for name, _, value in lines}
            id = fields[b"x-storm-id"].decode()
            self.begun.append(id)
            body = b""
            if b"content-length" in fields:
                body = await reader.readexactly(int(fields[b"content-length"]))
            elif b"transfer-encoding" in fields:
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
            self.whole.append((id, body))
            answer = answer_body(id, id, body, Wish.read(fields[b"x-wish"].decode()))
            await visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("path", [CHAT, PLAIN], ids=["read first", "passed on"])
async def test_a_body_whose_sender_left_never_ends_on_a_kept_connection(
    house: House, path: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither empty nor shortened: where the next request would follow it, it would be taken for its rest."""
    wish = Wish(BODY_BYTES_MIN + 20, "length", 10, 1, 0)
    keeper = Keeper()

    def request_of(id: str) -> bytes:
        return request(id, wish, path=path, secret=house.secret, session="one", chunked=chunked)

    async with raw.upstream(keeper.serve) as upstream:
        house.upstream_url = upstream.url
        async with storm_gateway(house, monkeypatch) as gateway:
            async with raw.connection(gateway.address) as (reader, writer):

                async def stay(id: str) -> None:
                    """One who stays, on a connection of his own that is kept."""
                    writer.write(request_of(id))
                    head = await reader.readuntil(b"\r\n\r\n")
                    due = answer_body(id, id, request_body(id, wish.body_bytes), wish)
                    assert head.startswith(b"HTTP/1.1 200") and await reader.readexactly(len(due)) == due

                await stay(f"{0:016x}")
                wire = request_of("f" * 16)
                for at in range(wire.index(b"\r\n\r\n") + 4, len(wire)):
                    leaver = f"{at:016x}"
                    async with raw.connection(gateway.address) as (_, leaving):
                        leaving.write(request_of(leaver)[:at])
                        await leaving.drain()
                        if path == PLAIN:
                            await until(partial(keeper.has_begun, leaver))
                        elif at % 2:
                            await asyncio.sleep(0.001)
                        leaving.transport.abort()
                    await stay(f"{at:x}".rjust(16, "a"))
                await until(lambda: all(stats.in_use == 0 for stats in gateway.gateway.upstreams.stats().values()))
    assert len(keeper.whole) == 1 + len(wire) - (wire.index(b"\r\n\r\n") + 4)
    assert all(body == request_body(id, wish.body_bytes) for id, body in keeper.whole)
    if path == CHAT:
        assert len(keeper.begun) == len(keeper.whole), "a request was begun whose body had not arrived"

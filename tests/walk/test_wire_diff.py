"""Transparent on the wire: a raw client and a raw upstream get the same bytes with a gateway between them as without
one, but for the differences that docs/transparency.md lists. How it is done: tests/walk/wire/.
"""

import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import redis
import uvloop

from tests import servers
from tests.walk.wire import answers, configured, dialogues, requests
from tests.walk.wire.case import CONFIGURED, METERED, PLAIN, Case, ask, once
from tests.walk.wire.differences import NAMES
from tests.walk.wire.exchange import Setting
from tests.walk.wire.gateways import Gateways, gateways
from tests.walk.wire.messages import messages
from tests.walk.wire.proof import compare, connection_through, expected, learned
from tests.walk.wire.refusals import Refusal, refusals

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "transparency.md"
CASES = (*requests.cases(), *answers.cases(), *dialogues.cases(), *configured.cases())
REFUSALS = tuple(refusals())
PLAYED = [(case, way) for case in CASES for way in case.ways]

#: As in production.
LOOPS = {"uvloop": uvloop.new_event_loop}
#: One event loop for the module, so that the gateways are started once.
together = pytest.mark.asyncio(loop_scope="module")


class Proof:
    """Plays each case once per way, however many tests ask for it."""

    def __init__(self, played: Gateways) -> None:
        self._gateways = played
        #: (case, way) -> the differences that were met, once the case has been proven that way.
        self._used: dict[tuple[str, str], frozenset[str]] = {}

    async def met(self, case: Case, way: str) -> frozenset[str]:
        """The differences of `case`; fails when there are others than the documented ones."""
        if (case.name, way) not in self._used:
            self._used[case.name, way] = await self.play(case, way, self.setting(way))
        return self._used[case.name, way]

    def setting(self, way: str) -> Setting:
        return self._gateways.ways[way].setting

    async def refused(self, request: bytes) -> tuple[bytes, bytes]:
        return await self._gateways.refused(request)

    async def play(self, case: Case, way: str, setting: Setting) -> frozenset[str]:
        began_ms = time.time_ns() // 1_000_000
        direct = await self._gateways.directly(case, way)
        through = await self._gateways.through(case, way, connection_through(direct.asked))
        assert through.asked == direct.asked
        asked = messages(direct.asked)
        chosen = learned(through, [request.method for request in asked])
        wanted = expected(case, direct, setting, chosen)
        differs = [
            compare("to the upstream", wanted.to_upstream, through.to_upstream),
            compare("to the client", wanted.to_client, through.to_client),
            compare("connection", wanted.connection.encode(), through.connection.encode()),
        ]
        if any(differs):
            pytest.fail("\n".join(("", *filter(None, differs))), pytrace=False)
        assert len({one.request_id for one in chosen}) == len(chosen) == len(asked)
        ended_ms = time.time_ns() // 1_000_000
        if setting.mint:
            assert all(began_ms <= one.created_ms <= ended_ms for one in chosen)
        if setting.signing_key:
            assert all(began_ms // 1_000 <= one.signed_s <= ended_ms // 1_000 for one in chosen)
        return wanted.used


@pytest.fixture(scope="module")
def store_urls(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Redis, emptied, and the PostgreSQL server. Not async: starting a server takes an event loop of its own."""
    embedded = request.config.getoption("--stores") == "embedded"
    redis_url: str = request.getfixturevalue("valkey_url" if embedded else "system_redis_url")
    postgres_url: str = request.getfixturevalue("postgres_server_url" if embedded else "system_postgres_server_url")
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url, postgres_url


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def proof(store_urls: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proof]:
    redis_url, postgres_url = store_urls
    name = f"test_{uuid.uuid4().hex}"
    await servers.execute(postgres_url, f"CREATE DATABASE {name}")
    try:
        directory = tmp_path_factory.mktemp("wire")
        async with gateways(directory, redis_url, postgres_url.rpartition("/")[0] + f"/{name}") as played:
            yield Proof(played)
    finally:
        await servers.execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize(("case", "way"), PLAYED, ids=[f"{case.name} ({way})" for case, way in PLAYED])
@together
async def test_only_the_documented_differences(proof: Proof, case: Case, way: str) -> None:
    await proof.met(case, way)


@pytest.mark.parametrize("refusal", REFUSALS, ids=[f"{one.name} {at}" for at, one in enumerate(REFUSALS)])
@together
async def test_what_is_refused_never_reaches_the_upstream(proof: Proof, refusal: Refusal) -> None:
    to_upstream, to_client = await proof.refused(refusal.request)
    assert to_client.startswith(b"HTTP/1.1 %d " % refusal.status), to_client
    assert to_upstream == b""


@together
async def test_every_documented_difference_is_met(proof: Proof) -> None:
    met = [await proof.met(case, way) for case, way in PLAYED]
    assert frozenset().union(*met) == frozenset(NAMES)


@together
async def test_the_metered_routes_differ_in_nothing_else(proof: Proof) -> None:
    """A route that looks at what passes makes the same differences as one that does not."""
    for case in CASES:
        if PLAIN in case.ways and METERED in case.ways:
            assert await proof.met(case, METERED) == await proof.met(case, PLAIN)


@together
async def test_an_undocumented_difference_is_noticed(proof: Proof) -> None:
    """The proof can fail: it does where the gateway is not the one that it was told of."""
    case = Case("one more field", once(ask()))
    with pytest.raises(pytest.fail.Exception, match="Via: 1.1 edge"):
        await proof.play(case, CONFIGURED, replace(proof.setting(CONFIGURED), via=b""))
    with pytest.raises(pytest.fail.Exception, match="x-user-id"):
        await proof.play(case, PLAIN, replace(proof.setting(PLAIN), user=None))


def test_the_document_lists_exactly_these() -> None:
    differences, refused = _table("What differs"), _table("What is refused")
    assert differences == list(NAMES)
    assert refused == list(dict.fromkeys(one.name for one in REFUSALS))


def test_there_are_as_many_cases_as_promised() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 150


def _table(heading: str) -> list[str]:
    """The names in the first column of the tables under a heading of the document."""
    section = DOCUMENT.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [row[1] for row in re.finditer(r"^\| `([a-z0-9.-]+)` \|", section, re.MULTILINE)]

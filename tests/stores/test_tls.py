"""TLS to servers whose certificate an authority of our own has signed, and who want to see ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.embedded.process import free_port
from gateway.errors import StoreUnavailable
from gateway.stores import Redis
from tests.authority import Pems, make_pems
from tests.cluster import cluster, sentinels
from tests.nodes import Node, nodes
from tests.stores.conftest import COUNT, Connect, system_redis
from tests.waiting import until


@pytest.fixture(scope="module")
def server(pems: Pems) -> Iterator[Node]:
    """The machine's own Redis: the embedded Valkey is built without TLS."""
    with nodes(system_redis(), pems) as started:
        yield started.start("primary", free_port())


async def outage(url: str) -> str:
    redis = Redis(url, timeout_ms=1_000, connect_timeout_ms=1_000)
    redis.start()
    with pytest.raises(StoreUnavailable) as caught:
        await redis.call("PING")
    await redis.close()
    return str(caught.value)


async def test_a_server_of_our_own_authority_is_believed(server: Node, connect: Connect) -> None:
    assert "ssl_certfile" in server.url
    store = await connect(server.url)
    assert await store.run(COUNT, ["a"], [1]) == 1


async def test_a_server_of_an_unknown_authority_is_not(server: Node, pems: Pems, tmp_path: Path) -> None:
    other = make_pems(tmp_path)
    assert "CERTIFICATE_VERIFY_FAILED" in await outage(server.url.replace(str(pems.ca), str(other.ca)))
    assert "CERTIFICATE_VERIFY_FAILED" in await outage(server.url.replace(f"ssl_ca_certs={pems.ca}&", ""))


async def test_a_certificate_is_for_the_host_that_was_asked_for(server: Node) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in await outage(server.url.replace("127.0.0.1", "127.1"))


async def test_without_our_certificate_the_server_turns_us_away(server: Node) -> None:
    assert server.url.partition("&ssl_certfile")[1]
    assert server.place in await outage(server.url.partition("&ssl_certfile")[0])


async def test_files_that_are_not_there_are_an_outage_not_a_crash(server: Node, pems: Pems) -> None:
    assert "No such file" in await outage(server.url.replace(str(pems.cert), "/nowhere.pem"))


async def test_clusters_and_sentinels_speak_it_too(pems: Pems, connect: Connect) -> None:
    with cluster(nodes=2, binary=system_redis(), tls=pems) as handle:
        assert handle.url.startswith("rediss+cluster://")
        store = await connect(handle.url)
        await until(lambda: store.trouble is None)
        assert [await store.run(COUNT, [key], [1]) for key in ("a", "b", "c", "d")] == [1, 1, 1, 1]
    with sentinels(replicas=0, count=1, binary=system_redis(), tls=pems) as watched:
        assert watched.url.startswith("rediss+sentinel://")
        store = await connect(watched.url)
        assert await store.run(COUNT, ["a"], [1]) == 1

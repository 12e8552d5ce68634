"""What every test may ask for: `redis_url`, an empty Redis-compatible server, and `database_url`, a database with the
schema of this release and nothing in it; `empty_database_url` has no schema either.

`demo_router_url` is an AI router to stand behind the gateway (gateway/embedded/demo_router.py).

The stores are the embedded servers unless the run says `--stores=system`, or a test asks for the machine's own Redis
and PostgreSQL as well: `@pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)`.
"""

import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import redis
import structlog

from gateway.ledger import migrate
from gateway.stores import Postgres
from tests import servers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stores",
        choices=("embedded", "system"),
        default="embedded",
        help="servers behind redis_url and database_url: from wheels (embedded) or of this machine (system)",
    )
    parser.addoption("--full", action="store_true", help="storms and transfers in their full size; takes minutes")


#: Where every test is there for both kinds of server. The machine's own ones wait for `--full` or `--stores=system`,
#: except where scripts are held against their oracle.
TWICE = ("tests/stores/", "tests/limits/", "tests/cli/test_redis_diagnosis.py")
BOTH_AT_ONCE = ("test_histories.py", "test_promise.py", "test_once.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full") or config.getoption("--stores") == "system":
        return
    later = [item for item in items if _waits(item)]
    config.hook.pytest_deselected(items=later)
    items[:] = [item for item in items if not _waits(item)]


def _waits(item: pytest.Item) -> bool:
    place = item.path.relative_to(item.config.rootpath).as_posix()
    on_system = "system" in getattr(getattr(item, "callspec", None), "id", "").split("-")
    return on_system and place.startswith(TWICE) and not place.endswith(BOTH_AT_ONCE)


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether this run is to prove things in their full size."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def _as_nobody_configured_logging() -> None:
    """A gateway of an earlier test, in this process, has set the level and the form of the log."""
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """The embedded Valkey of this run; shared, so tests use `redis_url`."""
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session")
def postgres_server_url() -> Iterator[str]:
    """The embedded PostgreSQL of this run; shared, so tests use `database_url`."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def system_redis_url() -> Iterator[str]:
    """A Redis started from this machine's own `redis-server`."""
    binary = servers.system_redis()
    if binary is None:
        pytest.skip("no redis-server on PATH")
    with servers.valkey(binary) as url:
        yield url


@pytest.fixture(scope="session")
def system_postgres_server_url() -> Iterator[str]:
    """A PostgreSQL started from this machine's own installation."""
    bin_dir = servers.system_postgres()
    if bin_dir is None:
        pytest.skip("no PostgreSQL server on PATH or in /usr/lib/postgresql")
    with servers.postgres(bin_dir) as url:
        yield url


@pytest.fixture
def stores(request: pytest.FixtureRequest) -> str:
    """Which servers this test runs against: `embedded` or `system`."""
    kind: str = getattr(request, "param", request.config.getoption("--stores"))
    return kind


@pytest.fixture
def redis_url(stores: str, request: pytest.FixtureRequest) -> str:
    """URL, password included, of a server without a key and without a cached script."""
    url: str = request.getfixturevalue("valkey_url" if stores == "embedded" else "system_redis_url")
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.script_flush()
        client.config_resetstat()
    return url


@pytest.fixture
def _postgres_url(stores: str, request: pytest.FixtureRequest) -> str:
    # A fixture of its own and not async: starting a server takes an event loop, which must not run already.
    url: str = request.getfixturevalue("postgres_server_url" if stores == "embedded" else "system_postgres_server_url")
    return url


@pytest.fixture(scope="session")
def migrated_servers() -> set[str]:
    """PostgreSQL servers that have a database `migrated` to copy: a third of what migrating each time takes."""
    return set()


@pytest.fixture
async def database_url(_postgres_url: str, migrated_servers: set[str]) -> AsyncIterator[str]:
    """URL of a database that was created for this test and goes with it."""
    if _postgres_url not in migrated_servers:
        await servers.execute(_postgres_url, "CREATE DATABASE migrated")
        postgres = Postgres(_postgres_url.rpartition("/")[0] + "/migrated", timeout_ms=10_000, pool_max=1)
        await postgres.open()
        await migrate(postgres)
        await postgres.close()
        migrated_servers.add(_postgres_url)
    async with _database(_postgres_url, "TEMPLATE migrated STRATEGY file_copy") as url:
        yield url


@pytest.fixture
async def empty_database_url(_postgres_url: str) -> AsyncIterator[str]:
    """The same without any schema."""
    async with _database(_postgres_url, "") as url:
        yield url


@asynccontextmanager
async def _database(server_url: str, options: str) -> AsyncIterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    await servers.execute(server_url, f"CREATE DATABASE {name} {options}")
    try:
        yield server_url.rpartition("/")[0] + f"/{name}"
    finally:
        await servers.execute(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def demo_router_url() -> Iterator[str]:
    """Base URL of the demo AI router of this run; it keeps nothing between requests, so tests may share it."""
    with servers.demo_router() as url:
        yield url

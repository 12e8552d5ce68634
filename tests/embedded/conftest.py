"""State directories for tests of the embedded servers.

Neither is under pytest's own temporary directory, which only its owner may enter: some servers run as another user.
"""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.embedded import embedded
from gateway.embedded.process import make_directory


@pytest.fixture
def empty_state_dir() -> Iterator[Path]:
    """A directory for one test."""
    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        yield Path(folder).resolve()


@pytest.fixture(scope="package")
def used_state_dir() -> Iterator[Path]:
    """A state directory with a run behind it, shared by tests that leave its data whole: creating them takes a second.

    A first attempt at its PostgreSQL was broken off half-way.
    """

    async def create(state_dir: Path) -> None:
        async with embedded(state_dir, valkey=True, postgres=True, progress=lambda text: None):
            pass

    with tempfile.TemporaryDirectory(prefix="gateway-test-") as folder:
        state_dir = Path(folder).resolve() / "state"
        make_directory(state_dir / "postgres")
        half = state_dir / "postgres/data.new/global"
        half.mkdir(parents=True)
        (half / "pg_control").write_bytes(b"half")
        asyncio.run(create(state_dir))
        yield state_dir

"""A journal, and the disk it is on."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.journal import Journal
from tests.journal.disk import Disk, terms


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / "journal", monkeypatch)


@pytest.fixture
async def journal(disk: Disk) -> AsyncIterator[Journal]:
    journal = Journal(disk.directory, terms())
    await journal.open()
    yield journal
    disk.room = None
    disk.open.set()
    await journal.close()

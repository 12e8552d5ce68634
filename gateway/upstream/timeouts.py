"""How long a request may wait, and for what. Owns the arithmetic between configured milliseconds and loop seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Deadlines of one upstream. Each covers one wait; none covers a whole request, because streams are long."""

    #: Name resolution, TCP and TLS.
    connect_ms: int = 2_000
    #: From the last byte of the request to the end of the answer's head.
    first_byte_ms: int = 120_000
    #: Between two reads of the answer's body.
    idle_ms: int = 60_000
    #: Until the upstream takes more of the request body.
    write_ms: int = 60_000
    #: For a free connection when all `connections_max` are in use.
    pool_ms: int = 2_000


@dataclass(frozen=True, slots=True)
class Deadlines:
    """`Timeouts` in seconds, as the event loop counts. `inf` waits for ever."""

    connect_s: float
    first_byte_s: float
    idle_s: float
    write_s: float
    pool_s: float

    @classmethod
    def of(cls, timeouts: Timeouts) -> "Deadlines":
        return cls(
            timeouts.connect_ms / 1000,
            timeouts.first_byte_ms / 1000,
            timeouts.idle_ms / 1000,
            timeouts.write_ms / 1000,
            timeouts.pool_ms / 1000,
        )

    def overridden(self, seconds: Mapping[str, float | None]) -> "Deadlines":
        """These, with what a request's `timeout` extension says instead (httpx: None means no deadline).

        httpx knows only `read`; so `read` covers the first byte as well unless `first_byte` is named.
        """

        def pick(name: str, default: float) -> float:
            value = seconds.get(name, default)
            return inf if value is None else value

        return Deadlines(
            pick("connect", self.connect_s),
            pick("first_byte", pick("read", self.first_byte_s)),
            pick("read", self.idle_s),
            pick("write", self.write_s),
            pick("pool", self.pool_s),
        )

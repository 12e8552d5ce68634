"""`concurrent`: at most `limit` requests in flight. Each holds a lease that its gateway renews; the lease of a
gateway that died runs out, so a slot is never lost for longer than `window_ms`."""

from gateway.types import Demand


class Concurrent:
    lua = "concurrent"

    def algorithm(self, demand: Demand) -> str:
        return "concurrent"


CONCURRENT = Concurrent()

"""`sliding`: never more than `limit` admitted in any interval of length `window_ms`.

Two algorithms keep that one promise (limits_credits.md §1.1). An exact log of every admission while it is small:
no false denial, 40 bytes per admitted request. Conservative sub-buckets beyond, and for weighted costs: constant
memory, a request may be denied up to window/60 longer than strictly needed.
"""

from gateway.types import Demand

#: Redis keeps a sorted set of at most 128 members in its compact form; the log stays inside it.
EXACT_LIMIT_MAX = 128


class Sliding:
    lua = "sliding"

    def algorithm(self, demand: Demand) -> str:
        unit_cost = demand.unit == "requests"
        return "sliding_log" if unit_cost and demand.limit <= EXACT_LIMIT_MAX else "sliding_buckets"


SLIDING = Sliding()

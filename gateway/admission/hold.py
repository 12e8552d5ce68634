"""What one admitted request has taken, and how it is booked when it ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway import keys, limits
from gateway.types import Charge, Demand, Entry, Principal


@dataclass(frozen=True, slots=True)
class Rules:
    """How long things are held. All from `credits:` in gateway.yaml."""

    lease_ms: int
    heartbeat_ms: int
    settle_timeout_ms: int
    outbox_entries_max: int
    mirror_ttl_s: int


@dataclass(slots=True)
class Hold:
    """What one admitted request has taken. The walk sets `charge` and `meta`; leaving the block settles them."""

    hold_id: str
    principal: Principal
    demands: tuple[Demand, ...]
    ucredits: int
    #: Redis time of admission in ms; 0 while it is unknown whether the server admitted.
    taken_at_ms: int = 0
    #: Used of each demand's limit before this request, in order of `demands`.
    used: tuple[int, ...] = ()
    #: What the org can still spend beside this hold; None for a request that costs nothing.
    available_ucredits: int | None = None
    #: What leaving the block books. None: the upstream never saw the request, everything is given back.
    charge: Charge | None = None
    #: Goes into the ledger entry beside the amount.
    meta: Mapping[str, Any] = field(default_factory=dict)
    #: The Redis keys that every script takes, made when the hold is taken: account, holds, deadlines, outbox,
    #: tombstone; and one counter per demand.
    keys: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)

    @property
    def token_estimate(self) -> int:
        return max((demand.cost for demand in self.demands if demand.unit == "tokens"), default=0)


def account_keys(hold: Hold) -> list[str]:
    """What every script that ends or begins a hold works on, in the order it takes them."""
    org_id = hold.principal.org_id
    return [
        keys.account(org_id),
        keys.holds(org_id),
        keys.deadlines(org_id),
        keys.outbox(org_id),
        keys.tombstone(org_id, hold.hold_id),
    ]


def counter_keys(hold: Hold) -> list[str]:
    """One Redis key per demand. The algorithm and the window are part of it, so a changed policy starts afresh."""
    return [
        keys.limit(
            hold.principal.org_id,
            f"{demand.name}:{limits.algorithm(demand)}:{demand.window_ms}",
            demand.scope,
            demand.subject,
        )
        for demand in hold.demands
    ]


def entry_of(hold: Hold) -> Entry:
    """The ledger's line for the hold as it ended."""
    charge = hold.charge
    meta = {**hold.meta, "basis": charge.basis} if charge else {}
    return Entry(hold.principal.org_id, hold.hold_id, "settle", -charge.ucredits if charge else 0, meta)


def actual_of(demand: Demand, charge: Charge | None) -> int:
    """What the request really used of one demand (outcome table, DESIGN.md §6)."""
    if charge is None:
        return 0
    if demand.unit == "tokens":
        return demand.cost if charge.tokens is None else charge.tokens
    return demand.cost if charge.keep_requests else 0

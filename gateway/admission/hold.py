"""What one admitted request has taken, and how it is booked when it ends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway import keys, limits
from gateway.types import Balance, Charge, Demand, Entry, LimitState, Principal, Quote

_TOKEN_UNITS = ("tokens", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Rules:
    """How long things are held. All from `credits:` and `limits:` in gateway.yaml."""

    lease_ms: int
    heartbeat_ms: int
    settle_timeout_ms: int
    outbox_entries_max: int
    mirror_ttl_s: int
    #: How long a denial is remembered in this process, and how many are; 0: none.
    deny_cache_ms: int = 0
    deny_cache_entries_max: int = 0
    #: Redis owes at most its cap (`on_state_loss: cap`).
    capped: bool = True
    #: Every hold is in PostgreSQL (`write: through`), or those for which Redis is away (`without_redis: postgres`).
    through: bool = False
    holds_in_postgres: bool = True
    #: Limits are counted here while Redis is away; else such requests are refused.
    counts_locally: bool = True
    #: Charges that PostgreSQL does not have yet, in this process.
    unconfirmed_entries_max: int = 100_000


@dataclass(slots=True, eq=False)
class Hold:
    """What one admitted request has taken. The walk sets `charge` and `meta`; leaving the block settles them."""

    hold_id: str
    principal: Principal
    #: Those that may refuse, then the shadows.
    demands: tuple[Demand, ...]
    quote: Quote
    #: Held for it: what was wanted, or less; what more was granted later is in it.
    ucredits: int = 0
    #: Used so far; the walk keeps it current while an answer passes.
    used_ucredits: int = 0
    #: More was asked for, and may have been granted already.
    extending: bool = False
    #: Where the credits are held: `redis` or `postgres`.
    where: str = "redis"
    #: Who judged the limits: `redis`, or this process while Redis was away (`local`).
    judged_by: str = "redis"
    #: The epoch of the account in Redis that the credits are held in.
    epoch: int = 0
    #: Whose keys it stands in: the org's, or keys.SHARED.
    owner: str = ""
    #: Redis time of admission or refusal and of the settlement, in us; 0 while unknown.
    judged_at_us: int = 0
    settled_at_us: int = 0
    #: Each of `demands` as it was judged.
    states: tuple[LimitState, ...] = ()
    #: Where `states` are remembered: when the server had judged each, by its clock.
    denied_at_us: tuple[int, ...] = ()
    #: The server had a record of the request's session; None where no limit counts sessions.
    session_known: bool | None = None
    #: What the org can still spend beside this hold; None for a request that costs nothing.
    available_ucredits: int | None = None
    #: What leaving the block books. None: the upstream never saw the request, everything is given back.
    charge: Charge | None = None
    #: How it ended is in the journal.
    noted: bool = False
    #: Its charge is in PostgreSQL, which Redis does not know yet: the state that says so.
    posted: Balance | None = None
    #: Goes into the ledger entry beside the amount.
    meta: Mapping[str, Any] = field(default_factory=dict)
    #: What it takes of limits that no org owns.
    shared: "Hold | None" = None
    #: The Redis keys that every script takes, made when the hold is taken: account, holds, deadlines, outbox,
    #: tombstone; and those of the demands' counters.
    keys: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owner = self.owner or self.principal.org_id
        self.ucredits = self.quote.want_ucredits
        self.used_ucredits = self.quote.price.flat_ucredits
        if any(demand.limit.shadow for demand in self.demands):
            self.demands = tuple(sorted(self.demands, key=lambda demand: demand.limit.shadow))

    @property
    def enforced(self) -> int:
        """How many of `demands` may refuse."""
        return sum(not demand.limit.shadow for demand in self.demands)

    @property
    def token_estimate(self) -> int:
        """The tokens reserved; 0 when no limit counts them."""
        return max((demand.cost for demand in self.demands if demand.limit.unit in _TOKEN_UNITS), default=0)


def account_keys(hold: Hold) -> list[str]:
    """What every script that ends or begins a hold works on, in the order it takes them."""
    owner = hold.owner
    return [
        keys.account(owner),
        keys.holds(owner),
        keys.deadlines(owner),
        keys.outbox(owner),
        keys.tombstone(owner, hold.hold_id),
    ]


def counter_keys(owner: str, demands: Sequence[Demand]) -> list[str]:
    """The Redis keys of all demands, as the scripts take them: a counter each, and for one that counts sessions the
    record that tells whether the session is an old one."""
    names = []
    for demand in demands:
        names.append(keys.counter(owner, limits.counter_name(demand)))
        if demand.member:
            names.append(keys.session_record(owner, demand.member))
    return names


def counters_by_demand(hold: Hold) -> Iterator[tuple[Demand, str]]:
    """Each demand with the key of its counter."""
    position = 0
    for demand in hold.demands:
        yield demand, hold.counters[position]
        position += 2 if demand.member else 1


def entry_of(hold: Hold) -> Entry:
    """The ledger's line for the hold as it ended."""
    charge = hold.charge
    amount_ucredits = charge.ucredits if charge and hold.quote.want_ucredits else 0
    meta = {**hold.meta, "basis": charge.basis} if charge else {}
    return Entry(hold.owner, hold.hold_id, "settle", -amount_ucredits, meta)


def actual_of(demand: Demand, charge: Charge | None) -> int:
    """What the request really used of one demand (the table of docs/walk.md)."""
    if charge is None:
        return 0
    match demand.limit.unit:
        case "ucredits":
            return charge.ucredits
        case "tokens" | "input_tokens" | "output_tokens" as unit:
            if charge.usage is None:
                return demand.cost
            used = charge.usage.total_tokens if unit == "tokens" else getattr(charge.usage, unit)
            return max(used, demand.cost) if charge.at_least else used
        case _:
            return demand.cost if charge.keep_requests else 0

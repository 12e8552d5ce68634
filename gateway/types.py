"""The nouns every room speaks: frozen values without behaviour beyond their own arithmetic.

Money is micro-credits (`ucredits`, 1 credit = 1,000,000), time is milliseconds, sizes are bytes, all `int`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

UCREDITS_PER_CREDIT = 1_000_000

#: Header fields as they stood on the wire: order and duplicates kept.
HeaderList = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks, from a credential that was verified; nothing in it comes from an unverified header or the body."""

    org_id: str
    plan: str
    user_id: str | None
    #: Public id of the API key or JWT, safe to log; never the credential itself.
    key_id: str | None
    #: The identity source that recognised the credential: `api_key`, `jwt`, `trusted_header`.
    source: str
    #: Verified claims of the credential that some limit is per, by name.
    claims: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the request's head says, before any byte of its body is read."""

    request_id: str
    method: str
    #: Percent-decoded path: what routes are matched on.
    path: str
    #: Raw path and query as received: what is forwarded.
    target: bytes
    #: Names in lower case.
    headers: HeaderList
    #: The client's address: the socket peer, or what a trusted proxy says of it.
    client_ip: str
    #: The socket peer itself, which no header can change; empty when there is none (a Unix socket).
    peer_ip: str
    #: `headers` with their names as they stood on the wire, field for field; empty when nobody kept them.
    fields: HeaderList = ()
    #: `http` or `https`, as the client reached us.
    scheme: str = "http"
    http_version: str = "1.1"

    def header(self, name: bytes) -> str | None:
        """First value of the field `name` (lower case), decoded as latin-1; None when absent."""
        for key, value in self.headers:
            if key == name:
                return value.decode("latin-1")
        return None


@dataclass(frozen=True, slots=True)
class Peek:
    """What a route's format lets us learn from a buffered request body."""

    body_bytes: int
    model: str | None = None
    stream: bool = False
    #: The largest of the client's max-token fields, times `n`; None when it named none.
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Calendar:
    """When the periods of a quota begin: at `anchor`, in the local time of `zone`."""

    #: `hour`, `day`, `week` or `month`.
    period: str
    #: IANA name.
    zone: str = "UTC"
    #: Minutes after the natural beginning of the period; for `week` that is Monday, for `month` the first, at midnight.
    anchor_minutes: int = 0


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit as it binds one org: compiled from a policy, shared by every Demand on it."""

    name: str
    #: The limit kind that judges it: a key of `limits.KINDS`.
    kind: str
    #: What is counted: `requests`, `tokens`, `input_tokens`, `output_tokens`, `ucredits`, `concurrent`, `sessions`.
    unit: str
    #: Whose share it is, for people: `org`, `user`, `user+model`, ...; of a shared one `everybody`, `upstream`, ...
    scope: str
    #: In `unit`. For `gcra` what flows back in each `window_ms`.
    limit: int
    #: Length of the window; for `concurrent` of a lease, for `calendar` of a period, nominally.
    window_ms: int
    #: `gcra` only: the most that may be taken at once.
    burst: int = 0
    #: `calendar` only.
    calendar: Calendar | None = None
    #: Judged and counted, never a reason to refuse.
    shadow: bool = False
    #: The part of it from which on clients are warned.
    warn_at: float | None = None
    #: It belongs to no org.
    shared: bool = False

    @property
    def capacity(self) -> int:
        """The most that one request can ever be given."""
        return self.burst or self.limit

    def __hash__(self) -> int:
        # Looked up several times per request, so not over all fields. Names alone would not do: every org that has a
        # number of its own for a limit has a Limit of that name.
        return hash((self.name, self.limit, self.burst))


@dataclass(frozen=True, slots=True)
class Demand:
    """One limit applied to one request: `cost` of it for `subject`."""

    limit: Limit
    #: Stands in the counter's key: empty for the whole org, else of fixed length and bounded in number.
    subject: str
    cost: int
    #: What is counted once, however often it comes: the digest of the session, for `sessions`.
    member: str = ""


class LimitState(NamedTuple):
    """One limit as it was judged for one request. A tuple, since each request makes one for each of its limits."""

    limit: Limit
    cost: int
    #: Before this request.
    used: int
    #: After it: what was asked is taken off when the request was admitted.
    remaining: int
    #: 0: it fits; else when it would, if nobody else takes it.
    retry_ms: int
    #: Until all of it is there again if nothing more is taken; None where nobody can know.
    reset_ms: int | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the gateway itself answers instead of the upstream; a dialect turns it into bytes."""

    status: int
    #: Stable, part of the public surface.
    code: str
    message: str
    #: When the same request would fit; None when waiting does not help.
    retry_after_ms: int | None = None
    #: What `x-should-retry` says to SDKs; None leaves the header out.
    should_retry: bool | None = None
    #: Facts a program can act on (limit, scope, used, ...); JSON values only.
    details: Mapping[str, Any] = field(default_factory=dict)
    #: Every limit that was judged, the most restrictive first.
    limits: tuple[LimitState, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens an answer reported. `exact` is False when the answer ended before its final count."""

    input_tokens: int
    output_tokens: int
    exact: bool = True
    model: str | None = None

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class Outcome(StrEnum):
    """How a forwarded request ended: the rows of the outcome table (`charge.py`)."""

    NEVER_REACHED = "never_reached"
    UPSTREAM_REFUSED = "upstream_refused"
    COMPLETE = "complete"
    UPSTREAM_BROKE = "upstream_broke"
    CLIENT_LEFT = "client_left"
    #: The gateway itself ended it: it was shutting down, or the answer broke a bound.
    CUT = "cut"
    #: The gateway ended it because the org's credits were used up.
    OUT_OF_CREDITS = "out_of_credits"


@dataclass(frozen=True, slots=True)
class Price:
    """What one request costs: flat, and by the token at rates in micro-credits per million tokens."""

    flat_ucredits: int = 0
    input_rate: int = 0
    output_rate: int = 0

    @property
    def by_token(self) -> bool:
        return bool(self.input_rate or self.output_rate)

    def of(self, input_tokens: int, output_tokens: int) -> int:
        """Micro-credits, rounded up once."""
        millionths = input_tokens * self.input_rate + output_tokens * self.output_rate
        return self.flat_ucredits - (-millionths // 1_000_000)


@dataclass(frozen=True, slots=True)
class Quote:
    """What a request may cost and how much of it is to be held, before it runs. All in micro-credits."""

    price: Price
    #: To be held; less will do, down to `least_ucredits`.
    want_ucredits: int
    least_ucredits: int
    #: The charge when nobody learns what was used.
    estimate_ucredits: int
    #: By how much a hold grows when what was used comes near it; 0: it does not.
    step_ucredits: int = 0

    @classmethod
    def flat(cls, ucredits: int) -> "Quote":
        """For a price that is known before."""
        return cls(Price(ucredits), ucredits, ucredits, ucredits)


@dataclass(frozen=True, slots=True)
class Charge:
    """What a finished request costs, once."""

    ucredits: int
    #: Tokens to book in place of the estimate; None keeps the estimate.
    usage: Usage | None
    #: False gives the request counts back (the upstream never saw the request).
    keep_requests: bool
    #: `exact`, `estimated`, `under_estimate` or `released`: how well the charge is known.
    basis: str
    #: `usage` is a lower bound: it may raise the estimate, never lower it.
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One line for the ledger. `amount_ucredits` is signed: a charge is negative."""

    org_id: str
    request_id: str
    #: `opening`, `grant`, `external`, `settle`, `orphan`, `correction`, `expire`.
    kind: str
    amount_ucredits: int
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Balance:
    """An org's account in PostgreSQL as of `version`, which grows with every change of any of it."""

    org_id: str
    #: Posted.
    ucredits: int
    version: int
    #: What of it may not be spent through Redis: held in PostgreSQL itself, or possibly owed by a state of Redis that
    #: was lost.
    set_aside_ucredits: int = 0
    #: What Redis may owe at once, holds and unposted charges together.
    cap_ucredits: int = 0
    #: Grows whenever the cap goes to another Redis hash; `birth` is of the one that has it, empty when none has.
    epoch: int = 1
    birth: str = ""
    #: End of the current grant period, in ms since 1970; 0: there is none.
    period_ends_ms: int = 0
    #: The org has a row in the application's table.
    present: bool = True


@dataclass(frozen=True, slots=True)
class Session:
    """The conversation a request belongs to, as of before this request."""

    session_id: str
    #: 1 for the first admitted request of the conversation.
    turn: int
    new: bool
    created_ms: int
    total_tokens: int = 0
    last_model: str | None = None
    #: False when the session store could not be asked.
    available: bool = True

"""What a search covers (`Scope`), and the rules of the protocol, each of which a mutant may break (`Rules`)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scope:
    """How small the world is, and what may go wrong in it. Counts are upper bounds."""

    name: str
    credits: int = 3
    requests: int = 2
    gateways: int = 2
    #: A hold of `want`, or of at least `least` when there is less; `owed` is what a sweeper charges.
    want: int = 2
    least: int = 1
    owed: int = 1
    #: What a request may hold in the end; above `want`: it asks for more while it runs.
    most: int = 2
    #: What a request may turn out to cost; None: all that it holds.
    charge: int | None = None
    floor: int = 1
    kills: int = 0
    flushes: int = 0
    rollbacks: int = 0
    evictions: int = 0
    topups: int = 0
    #: States of the account that are under way to Redis and may arrive at any time, any number of times;
    #: 0: whoever reads the account installs it at once.
    mails: int = 0
    flushers: int = 1
    #: A flusher may forget what it does, at any of its steps.
    flusher_dies: bool = False
    #: A reply to an admission or an extension arrives later than what happens meanwhile.
    slow_replies: bool = False
    #: Replies may be lost, though what was asked was done.
    lost_replies: bool = False
    #: A call whose caller gave up may still arrive.
    ghosts: bool = False
    #: Leases of living gateways may run out.
    stalls: bool = False
    #: Heartbeats, beside what a gateway registers again after a loss.
    beats: bool = False
    #: Holds in PostgreSQL while Redis is away (`fallback`) or always (`through`).
    redis_holds: bool = True
    postgres_holds: bool = False
    #: A charge may go straight to PostgreSQL though Redis is there for others.
    direct_posts: bool = False
    #: How often PostgreSQL comes back as it was when it was saved last.
    restores: int = 0
    #: How often the cap is taken back.
    lowerings: int = 0
    #: `on_state_loss: cap`.
    capped: bool = True


@dataclass(frozen=True, slots=True)
class Rules:
    """The protocol when nothing is named; each switch is a mutant of it."""

    #: The protocol before births: one hash is not told from another of the same epoch.
    without_births: bool = False
    ack_before_commit: bool = False
    no_unique_key: bool = False
    additive_reseed: bool = False
    #: And with the account goes what it owes.
    delete_on_invalidate: bool = False
    settle_needs_account: bool = False
    no_incarnation: bool = False
    hold_counts_as_spent: bool = False
    cap_not_checked: bool = False
    no_tombstone: bool = False
    missing_keeps_cap: bool = False
    older_installed: bool = False
    lost_dropped_at_once: bool = False
    owed_not_kept: bool = False
    acknowledges_unregistered: bool = False
    acknowledges_under_way: bool = False
    acknowledges_unposted: bool = False
    sweeps_unshown: bool = False
    drops_before_install: bool = False
    postgres_ignores_cap: bool = False
    orphan_not_deducted: bool = False
    orphan_outranks_settle: bool = False
    confirms_by_absence: bool = False
    fallback_under_same_id: bool = False
    applied_subtracts_twice: bool = False
    older_subtracts: bool = False
    lower_may_raise: bool = False
    lowers_what_changed: bool = False
    renew_grows_nothing: bool = False
    extends_past_cap: bool = False
    extends_on_stale_word: bool = False


PROTOCOL = Rules()

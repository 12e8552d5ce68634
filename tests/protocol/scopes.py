"""What is searched: scopes in which the protocol holds, the one that is known not to, and mutants with the scope that
shows them."""

from dataclasses import replace
from typing import NamedTuple

from tests.protocol.rules import Rules, Scope

#: One credit, and who gets it.
_ONE = Scope("", credits=1, want=1, most=1)
_TWO = Scope("", credits=2, want=1, most=1)

KILL = Scope("kill, flusher dies", kills=1, flusher_dies=True)
FLUSHERS = Scope("two flushers, both die", flushers=2, flusher_dies=True)
DIRECT = replace(_ONE, name="kill, charges past Redis", requests=3, kills=1, direct_posts=True, owed=0)
FLUSHALL = Scope("FLUSHALL", flushes=1)
FLUSHALL_LATE = Scope("FLUSHALL, rows arrive late", flushes=1, gateways=1, mails=1)
FLUSHALL_FLUSHER = replace(_TWO, name="FLUSHALL, flusher dies", flushes=1, gateways=1, flusher_dies=True)
FLUSHALL_KILL = replace(_ONE, name="FLUSHALL, kill, flusher dies", flushes=1, kills=1, flusher_dies=True)
FLUSHALL_TWICE = replace(_ONE, name="FLUSHALL twice", flushes=2)
FLUSHALL_BEATS = replace(_ONE, name="FLUSHALL, heartbeats", flushes=1, beats=True)
FLUSHALL_GHOST = replace(_TWO, name="FLUSHALL, late admission", gateways=1, flushes=1, ghosts=True)
FLUSHALL_EXTEND = replace(
    _TWO, name="FLUSHALL, extension, slow replies", gateways=1, flushes=1, most=2, slow_replies=True
)
FLUSHALL_STORES = replace(
    _TWO, name="FLUSHALL, holds in both stores", gateways=1, flushes=1, requests=3, postgres_holds=True
)
FLUSHALL_STALL = replace(_ONE, name="FLUSHALL, stalls, heartbeats", gateways=1, flushes=1, stalls=True, beats=True)
ROLLBACK = replace(_TWO, name="rollback", gateways=1, rollbacks=1)
ROLLBACK_KILL = replace(_ONE, name="rollback, kill", rollbacks=1, kills=1)
ROLLBACK_FLUSHALL = replace(_ONE, name="rollback, FLUSHALL", rollbacks=1, flushes=1, gateways=1)
ROLLBACK_EXTEND = replace(_TWO, name="rollback, extension", gateways=1, rollbacks=1, most=2)
LOST_REPLIES = replace(
    _TWO, name="slow and lost replies, late admission", ghosts=True, slow_replies=True, lost_replies=True
)
STORES = Scope("late admission, holds in both stores", gateways=1, ghosts=True, lost_replies=True, postgres_holds=True)
STORES_EXTEND = replace(_TWO, name="extension, holds in both stores", credits=3, most=3, postgres_holds=True)
STALLS = replace(_TWO, name="stalls, heartbeats", stalls=True, beats=True)
LOWER = replace(_ONE, name="FLUSHALL, cap taken back", gateways=1, requests=3, flushes=1, lowerings=1)
LOWER_STORES = replace(
    _TWO, name="cap taken back, holds in both stores", gateways=1, requests=3, lowerings=2, postgres_holds=True
)
EVICTION = replace(_TWO, name="eviction, top-up", evictions=1, topups=1)
RESTORED = replace(_ONE, name="PostgreSQL is restored", gateways=1, requests=4, restores=1)
RESTORED_TOPUP = replace(_ONE, name="PostgreSQL is restored, top-up", gateways=1, requests=3, restores=1, topups=1)
RESTORED_LATE = replace(
    _ONE, name="PostgreSQL is restored, rows arrive late", gateways=1, requests=3, restores=1, mails=1
)
RESTORED_KILL = replace(_ONE, name="PostgreSQL is restored, kill", requests=3, restores=1, kills=1)
RESTORED_LOWER = replace(
    _TWO, name="PostgreSQL is restored, cap taken back", gateways=1, requests=3, restores=1, lowerings=1
)
RESTORED_FLUSHERS = replace(
    _ONE, name="PostgreSQL is restored, two flushers, both die", requests=3, restores=1, flushers=2, flusher_dies=True
)
THROUGH = Scope(
    "through: kill, stalls, lost replies, extension",
    requests=3,
    want=1,
    redis_holds=False,
    postgres_holds=True,
    kills=1,
    stalls=True,
    lost_replies=True,
)

SCOPES = (
    KILL, FLUSHERS, DIRECT, FLUSHALL, FLUSHALL_LATE, FLUSHALL_FLUSHER, FLUSHALL_KILL, FLUSHALL_TWICE, FLUSHALL_BEATS,
    FLUSHALL_GHOST, FLUSHALL_EXTEND, FLUSHALL_STORES, FLUSHALL_STALL, ROLLBACK, ROLLBACK_KILL, ROLLBACK_FLUSHALL,
    ROLLBACK_EXTEND, LOST_REPLIES, STORES, STORES_EXTEND, STALLS, LOWER, LOWER_STORES, EVICTION, RESTORED,
    RESTORED_TOPUP, RESTORED_LATE, RESTORED_KILL, THROUGH,
)  # fmt: skip

#: The same with more of everything, for `--full`.
LARGE = (
    RESTORED_LOWER, RESTORED_FLUSHERS,
    replace(_TWO, name="FLUSHALL, three requests", flushes=1, requests=3),
    replace(_TWO, name="FLUSHALL, kill, flusher dies", flushes=1, kills=1, flusher_dies=True),
    replace(_TWO, name="FLUSHALL twice", flushes=2),
    replace(_TWO, name="FLUSHALL, slow and lost replies, late admission", gateways=1, flushes=1,
            slow_replies=True, lost_replies=True, ghosts=True),
    replace(_TWO, name="FLUSHALL, eviction, top-up", gateways=1, flushes=1, evictions=1, topups=1),
    replace(_TWO, name="FLUSHALL, stalls, heartbeats", flushes=1, stalls=True, beats=True),
    replace(_TWO, name="FLUSHALL, cap taken back", gateways=1, requests=3, flushes=1, lowerings=1),
    replace(_TWO, name="rollback, two gateways", rollbacks=1),
    replace(_TWO, name="rollback, kill", rollbacks=1, kills=1),
    replace(_ONE, name="rollback, FLUSHALL, two gateways", rollbacks=1, flushes=1),
    replace(_TWO, name="rollback, holds in both stores", gateways=1, requests=3, rollbacks=1, postgres_holds=True),
)  # fmt: skip

#: `on_state_loss: optimistic` promises less, and is seen to.
OPTIMISTIC = (
    Scope("optimistic, FLUSHALL", flushes=1, capped=False),
    Scope("optimistic, rollback", rollbacks=1, capped=False),
)


class Mutant(NamedTuple):
    rules: Rules
    scope: Scope
    #: The invariant that tells.
    breaks: str

    @property
    def name(self) -> str:
        return next(name for name in Rules.__dataclass_fields__ if getattr(self.rules, name))


MUTANTS = (
    Mutant(Rules(ack_before_commit=True), FLUSHERS, "C4"),
    Mutant(Rules(no_unique_key=True), FLUSHERS, "C2"),
    Mutant(Rules(applied_subtracts_twice=True), FLUSHERS, "C5"),
    Mutant(Rules(older_subtracts=True), RESTORED, "C4"),
    Mutant(Rules(hold_counts_as_spent=True), FLUSHERS, "C5"),
    Mutant(Rules(additive_reseed=True), FLUSHERS, "C5"),
    Mutant(Rules(delete_on_invalidate=True), FLUSHALL_LATE, "C4"),
    Mutant(Rules(older_installed=True), FLUSHALL_LATE, "C4"),
    Mutant(Rules(settle_needs_account=True), FLUSHALL, "C5"),
    Mutant(Rules(cap_not_checked=True), FLUSHALL, "C4"),
    Mutant(Rules(missing_keeps_cap=True), FLUSHALL, "C4"),
    Mutant(Rules(without_births=True), FLUSHALL_TWICE, "C4"),
    Mutant(Rules(lost_dropped_at_once=True), FLUSHALL, "C4"),
    Mutant(Rules(owed_not_kept=True), FLUSHALL_STORES, "C4"),
    Mutant(Rules(acknowledges_unregistered=True), FLUSHALL_TWICE, "C4"),
    Mutant(Rules(acknowledges_under_way=True), FLUSHALL_EXTEND, "C4"),
    Mutant(Rules(acknowledges_unposted=True), FLUSHALL_TWICE, "C4"),
    Mutant(Rules(confirms_by_absence=True), FLUSHALL_TWICE, "C3"),
    Mutant(Rules(drops_before_install=True), DIRECT, "C4"),
    Mutant(Rules(sweeps_unshown=True), DIRECT, "C4"),
    Mutant(Rules(no_incarnation=True), ROLLBACK, "C3"),
    Mutant(Rules(no_tombstone=True), LOST_REPLIES, "C2"),
    Mutant(Rules(fallback_under_same_id=True), STORES, "C4"),
    Mutant(Rules(postgres_ignores_cap=True), FLUSHALL_STORES, "C4"),
    Mutant(Rules(orphan_not_deducted=True), STALLS, "C2"),
    Mutant(Rules(orphan_outranks_settle=True), replace(DIRECT, owed=1), "C2"),
    Mutant(Rules(lower_may_raise=True), replace(LOWER, credits=2), "C4"),
    Mutant(Rules(lowers_what_changed=True), LOWER_STORES, "C4"),
    Mutant(Rules(renew_grows_nothing=True), ROLLBACK_EXTEND, "C4"),
    Mutant(Rules(extends_past_cap=True), STORES_EXTEND, "C4"),
    Mutant(Rules(extends_on_stale_word=True), FLUSHALL_EXTEND, "C4"),
)

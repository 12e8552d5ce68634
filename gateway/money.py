"""The rooms that handle credits, wired: what admission needs of the ledger, and the ledger of admission.

    admission ──charges──▶ Redis ──outbox──▶ PostgreSQL ──freshness, accounts──▶ Redis
        └── losses: what it holds and is owed, told again when Redis has forgotten

Nothing here decides anything; who calls whom does.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from gateway import admission, idempotency, ledger
from gateway.admission import Admission, Settling
from gateway.config import Settings
from gateway.errors import StoreUnavailable
from gateway.idempotency import Idempotency
from gateway.journal import Journal, Terms
from gateway.ledger import Accounts, Freshness, Losses, Outbox, PostgresHolds, Sweeper
from gateway.stores import Postgres, Redis
from gateway.types import UCREDITS_PER_CREDIT, Entry

#: With what is left to the requests, in connections: half of a small pool, never more than this.
POSTGRES_AT_ONCE_MAX = 8

log = structlog.get_logger("gateway.money")


class Money:
    """`open()`, then `work` runs for ever; `drain()` while it still does, `close()` when it does no more.

    `background` is the connection to Redis for what no request waits for."""

    def __init__(self, settings: Settings, redis: Redis, background: Redis, postgres: Postgres) -> None:
        credits = settings.credits
        capped, mirror_ttl_s = credits.on_state_loss == "cap", credits.mirror_ttl_ms // 1000
        self.losses = Losses(
            postgres,
            ledger.Knowledge(
                register=lambda org_id, epoch: self.admission.register(org_id, epoch),
                answered=lambda org_id: self.admission.answered(org_id),
                install=lambda balance: self.accounts.install(balance),
            ),
            grace_ms=credits.loss_grace_ms,
        )
        terms = ledger.Terms(
            mirror_ttl_s=mirror_ttl_s,
            capped=capped,
            cap_floor_ucredits=credits.cap_floor * UCREDITS_PER_CREDIT,
            cap_percent=credits.cap_percent,
            through=credits.write == "through",
            loss_grace_ms=credits.loss_grace_ms,
            provision=credits.provision,
            postgres_at_once=max(1, min(POSTGRES_AT_ONCE_MAX, settings.stores.postgres_pool_max // 2)),
        )
        self.accounts = Accounts(
            redis, postgres, settings.plans, terms, arrive=self.losses.arrive, on_loss=self.losses.on_loss
        )
        self.freshness = Freshness(background, postgres, self.accounts, polls=credits.schema_ == "readonly")
        self.outbox = Outbox(
            background,
            postgres,
            flush_ms=credits.flush_ms,
            batch_max=credits.batch_max,
            mirror_ttl_s=mirror_ttl_s,
            confirmed=lambda org_id, request_ids: self.settling.confirmed(org_id, request_ids),
        )
        self.sweeper = Sweeper(
            background,
            postgres,
            ledger.SweeperPowers(
                mark_dirty=self.outbox.mark,
                refresh=self.accounts.refresh,
                retire=self.accounts.retire,
                trim=ledger.Trimming(background, postgres, self.accounts, terms).trim,
                changed=self.freshness.on_notification,
            ),
            sweep_ms=credits.sweep_ms,
            mirror_ttl_s=mirror_ttl_s,
            on_expiry=credits.on_expiry,
        )
        self.holds = PostgresHolds(postgres, self.losses.instance, lease_ms=credits.lease_ms, capped=capped)
        self.journal = _journal(settings)
        powers = admission.Powers(
            load=self.accounts.load,
            raise_cap=self.accounts.raise_cap,
            begin_period=self.accounts.periods.begin,
            turn_period=self.accounts.periods.turn,
            carry=self.outbox.carry,
            recheck=self.freshness.recheck,
            refresh=self.freshness.on_notification,
            recover=self.losses.recover,
            post=lambda entries: ledger.post(postgres, entries),
            install=self.accounts.install,
            take_in_postgres=self.holds.take,
            extend_in_postgres=self.holds.extend,
            renew_in_postgres=self.holds.renew,
            instances=lambda: self.losses.instances_count,
            mark_dirty=self.outbox.mark,
            journal=self.journal,
        )
        rules = _rules(settings)
        self.settling = Settling(redis, rules, powers)
        self.admission = Admission(redis, rules, self.settling, powers)
        self.idempotency = Idempotency(
            postgres, redis, idempotency.Rules(running_ms=credits.lease_ms, beat_ms=credits.heartbeat_ms)
        )
        self._postgres = postgres

    async def open(self) -> None:
        """Requests may be admitted. Needs no store to be there yet."""
        if self.journal is not None:
            await self.journal.open()

    @property
    def channels(self) -> Mapping[str, Callable[[str], None]]:
        """What the database announces, and who wants to know."""
        return {
            ledger.CREDITS_CHANNEL: self.freshness.on_notification,
            ledger.EPOCHS_CHANNEL: self.losses.on_notification,
        }

    @property
    def work(self) -> tuple[tuple[str, Callable[[], Coroutine[Any, Any, None]]], ...]:
        """What is to run as long as requests come, by name."""
        return (
            ("admission", self.admission.run),
            ("outbox", self.outbox.run),
            ("sweeper", self.sweeper.run),
            ("balances", self.freshness.run),
            ("losses", self.losses.run),
            ("idempotency keys", self.idempotency.run),
            *((("journals", self._recover_journals),) if self.journal is not None else ()),
        )

    async def _recover_journals(self) -> None:
        """What processes of this machine left that died before this one started is in the ledger."""
        assert self.journal is not None

        async def post(entries: Sequence[Entry]) -> None:
            for balance in await ledger.post(self._postgres, entries):
                self.freshness.on_notification(balance.org_id)  # no outbox brings Redis the new balance

        await self.journal.recover(post)
        await asyncio.Event().wait()

    async def drain(self, timeout_s: float) -> None:
        """Requests have ended and are settled, their charges are posted as far as the stores allow."""
        await self.admission.drain(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self.outbox.flush()
                # Whatever Redis has lost of it, or another gateway carries.
                await self.settling.post_unconfirmed()
        except (StoreUnavailable, TimeoutError) as exc:
            log.warning("outbox left for the next gateway", error=str(exc))
        await self.idempotency.drain(timeout_s)

    async def close(self) -> None:
        """Nothing runs any more, and nobody waits for what this process knows: it has told all."""
        await self.losses.close()
        if self.settling.idle and not self.settling.unconfirmed_count and not self.admission.open_count:
            try:
                await self.losses.leave()
            except StoreUnavailable as exc:
                log.debug("left without a word", error=str(exc))
        await self.freshness.close()
        await self.outbox.close()
        await self.accounts.close()
        if self.journal is not None:
            await self.journal.close()


def _rules(settings: Settings) -> admission.Rules:
    credits, limits = settings.credits, settings.limits
    return admission.Rules(
        lease_ms=credits.lease_ms,
        heartbeat_ms=credits.heartbeat_ms,
        settle_timeout_ms=credits.settle_timeout_ms,
        outbox_entries_max=credits.outbox_entries_max,
        mirror_ttl_s=credits.mirror_ttl_ms // 1000,
        deny_cache_ms=limits.deny_cache_ms,
        deny_cache_entries_max=limits.deny_cache_entries_max,
        capped=credits.on_state_loss == "cap",
        through=credits.write == "through",
        holds_in_postgres=credits.without_redis == "postgres",
        counts_locally=limits.without_redis == "local",
        unconfirmed_entries_max=credits.unconfirmed_entries_max,
    )


def _journal(settings: Settings) -> Journal | None:
    credits = settings.credits
    if credits.journal is None:
        return None
    orphan_after_ms = credits.lease_ms + 2 * credits.sweep_ms
    return Journal(Path(credits.journal), Terms(on_expiry=credits.on_expiry, orphan_after_ms=orphan_after_ms))

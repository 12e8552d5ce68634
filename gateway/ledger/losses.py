"""When Redis has lost its state: every gateway tells again what it knows, and PostgreSQL sets nothing aside any more.

    raise_cap finds another hash ──▶ epoch + 1, what the lost one may have owed is set aside, who lives is waited for
        └─ each gateway: its open holds are in Redis again, its charges in PostgreSQL, no admission of before is
           unanswered ──acknowledge──▶ waited for no more; the last one's word, or `lost_until`, ends the loss

A gateway learns of it by announcement, by its own raise, and by every beat, which names the orgs that wait for it: so
nothing is lost with an announcement, and what failed is tried again. State: orgs that are being told of, and when this
process was last told of a loss.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from gateway.errors import StoreUnavailable
from gateway.ledger import books
from gateway.ledger.rounds import Rounds
from gateway.stores import Postgres
from gateway.types import Balance

#: Channel on which the database announces a loss: `ORG EPOCH`.
EPOCHS_CHANNEL = "gateway_epochs"

BEAT_S = 1.0
#: Orgs told of at once: what is sent to PostgreSQL must leave connections to the requests.
AT_ONCE = 4
RETRY_PAUSE_MIN_S = 0.05
RETRY_PAUSE_MAX_S = 1.0
#: Rounds of one telling: each ends with another loss of the same org.
ROUNDS_MAX = 5
#: Beats without a loss after which a wave of them is over.
QUIET_BEATS = 3
#: Orgs of which it is remembered what was told.
TOLD_MAX = 100_000

log = structlog.get_logger("gateway.losses")


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What this process knows, and how it is told. Each raises StoreUnavailable when it could not be done."""

    #: (org, epoch): what is held for it in Redis is there again, its charges are in PostgreSQL: what the hash owes, and
    #: its birth; 0 and "": nothing is held. What an older epoch admits from now on has to be told again (`recover`).
    register: Callable[[str, int], Awaitable[tuple[int, str]]]
    #: (org): the admissions that were under way are answered.
    answered: Callable[[str], Awaitable[None]]
    #: (balance): Redis has it.
    install: Callable[[Balance], Awaitable[None]]


class Losses:
    """`run()` for ever; `leave()` when all is told and nothing is held any more; then `close()`."""

    def __init__(self, postgres: Postgres, knowledge: Knowledge, *, grace_ms: int) -> None:
        self._postgres = postgres
        self._knowledge = knowledge
        self._grace_ms = grace_ms
        #: What PostgreSQL knows this process by.
        self.instance = uuid.uuid4().hex
        #: Processes that live, this one included, as of the last beat.
        self.instances_count = 1
        #: Losses of an org that this process has told all about.
        self.told_count = 0
        self._tellings = Rounds(self._tell)
        self._at_once = asyncio.Semaphore(AT_ONCE)
        #: The newest epoch that is known of an org that is being told of, and the last one that was told of an org.
        self._epochs: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wave = _Wave()
        self._is_known = False

    @property
    def waiting_count(self) -> int:
        """Orgs whose state was lost and that this process has not told all about yet."""
        return len(self._tasks)

    def on_notification(self, payload: str) -> None:
        """The database announces a loss."""
        org_id, _, epoch = payload.rpartition(" ")
        if org_id and epoch.isdecimal():
            self.on_loss(org_id, int(epoch))

    def on_loss(self, org_id: str, epoch: int) -> None:
        """Redis has lost the org's state, which has this epoch since: what this process knows will be told, if it was
        not already."""
        if self._told.get(org_id, 0) < epoch:
            self._begin(org_id, epoch)

    def _begin(self, org_id: str, epoch: int) -> None:
        if self._epochs.get(org_id, 0) >= epoch:
            return
        self._epochs[org_id] = epoch
        self._wave.on_loss(org_id)
        if org_id not in self._tasks:
            self._tasks[org_id] = asyncio.create_task(self._keep_telling(org_id))

    async def _keep_telling(self, org_id: str) -> None:
        """What is known of the org is told, however long a store makes us wait."""
        pause_s = RETRY_PAUSE_MIN_S
        try:
            while True:
                epoch = self._epochs[org_id]
                try:
                    async with self._at_once:
                        await self._tellings.join(org_id)
                except StoreUnavailable as exc:
                    log.debug("what was lost is not told yet", org=org_id, error=str(exc))
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_PAUSE_MAX_S)
                    continue
                if self._epochs[org_id] == epoch:
                    return
        finally:
            del self._tasks[org_id]
            self._epochs.pop(org_id, None)

    async def recover(self, org_id: str) -> None:
        """What this process holds for the org is in Redis and was told to PostgreSQL, once more: something was admitted
        by a state that is lost, after the others had been told of. Raises StoreUnavailable when that could not be
        done."""
        await self._tellings.join(org_id)

    async def _tell(self, org_id: str) -> None:
        epoch = self._epochs.get(org_id)
        if epoch is None:
            epoch = (await books.read(self._postgres, [org_id]))[org_id].epoch
        for _ in range(ROUNDS_MAX):
            told = await self._tell_once(org_id, epoch)
            if told <= epoch:
                self.told_count += 1
                if len(self._told) >= TOLD_MAX:
                    self._told.clear()
                self._told[org_id] = epoch
                return
            epoch = told
        raise StoreUnavailable(detail=f"the account of {org_id} is lost again and again")

    async def _tell_once(self, org_id: str, epoch: int) -> int:
        """The epoch that PostgreSQL has afterwards: a later one means that all has to be told again."""
        known = self._knowledge
        # Twice: what the lost state had admitted, and nobody knew of yet, has its answer in between.
        await known.register(org_id, epoch)
        await known.answered(org_id)
        owed_ucredits, birth = await known.register(org_id, epoch)
        balance = await books.acknowledge(
            self._postgres, self.instance, org_id, epoch, birth, owed_ucredits, self._grace_ms
        )
        if birth:
            await known.install(balance)
        return balance.epoch

    async def run(self) -> None:
        failing = False
        while True:
            try:
                await self.beat()
                failing = False
            except StoreUnavailable as exc:
                if not failing:
                    log.debug("no beat", error=str(exc))  # the connection's own log tells of the outage
                failing = True
            await asyncio.sleep(BEAT_S)

    async def arrive(self) -> None:
        """PostgreSQL knows this process: whoever finds a loss from now on waits for it. Raises StoreUnavailable."""
        if not self._is_known:
            await self.beat()

    async def beat(self) -> None:
        """The others know that this process lives, and it knows who waits for it. Raises StoreUnavailable."""
        beat = await books.beat(self._postgres, self.instance)
        self._is_known = True
        self.instances_count = max(1, beat.instances)
        for org_id, epoch in beat.waiting:
            self._begin(org_id, epoch)
        self._wave.on_beat(bool(self._tasks))

    async def leave(self) -> None:
        """Nobody waits for this process any more. Raises StoreUnavailable."""
        await books.leave(self._postgres, self.instance)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tellings.close()


class _Wave:
    """One line in the log when losses begin, one when they are over: a server that forgets, forgets all orgs."""

    def __init__(self) -> None:
        self._orgs: set[str] = set()
        self._quiet_beats = 0

    def on_loss(self, org_id: str) -> None:
        if not self._orgs:
            log.warning("redis has lost its state, what is known here is told again", first_org=org_id)
        self._orgs.add(org_id)
        self._quiet_beats = 0

    def on_beat(self, busy: bool) -> None:
        self._quiet_beats = 0 if busy else self._quiet_beats + 1
        if self._orgs and self._quiet_beats >= QUIET_BEATS:
            log.info("what was lost is told again", orgs=len(self._orgs))
            self._orgs.clear()

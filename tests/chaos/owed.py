"""What each request owes, by what its upstream delivered and its customer has seen, and what may have come between.

Its gateway lives: what the customer has seen ≤ charge ≤ what the upstream delivered; the price where the answer is
whole; a flat price is owed by whatever reached the upstream.

Its gateway was killed (C6): its last checkpoint ≤ charge ≤ what the upstream delivered; a flat price is in the first
checkpoint. An answer that was over for a while had been settled.

And Redis lost what it was told before that was posted: nothing is owed for sure, unless the gateway had written it to
PostgreSQL (`write: through`) or to a journal (docs/guarantees.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.clients import Seen
from tests.chaos.faults import LOSSES
from tests.chaos.upstream import Delivery, tokens_of
from tests.chaos.world import HEARTBEAT_S, LEASE_S, RATE, SWEEP_S, Happening
from tests.walk.house import CREDIT

#: What a stream had delivered so long ago is in a checkpoint: a heartbeat may be left out while the hold grows.
TOLD_WITHIN_S = 2 * HEARTBEAT_S + 0.5
#: Once its answer is over a request is settled within so long, where no store is away.
SETTLED_WITHIN_S = 1.0
#: What Redis was told is in PostgreSQL after so long, where neither is away: by the outbox or, of a gateway that died,
#: by the sweep at the end of the lease. With room for processes that wait for a processor.
POSTED_WITHIN_S = LEASE_S + SWEEP_S + 2 * SETTLED_WITHIN_S


@dataclass(frozen=True)
class Owed:
    """Micro-credits that may be charged. `forgivable`: less than `least` is no more than what was never promised."""

    least: int
    most: int
    forgivable: bool = False


@dataclass(frozen=True)
class Circumstances:
    """`keeps`: charges survive their gateway and Redis together (`write: through`, or a journal)."""

    died_at_s: dict[str, float]
    happened: Sequence[Happening]
    keeps: bool

    def owed(self, delivery: Delivery, plan: str, seen: Seen) -> Owed:
        died_at_s = self.died_at_s.get(delivery.gateway)
        living = _of_the_living(delivery, plan, seen)
        if died_at_s is None:
            return living
        if plan == "flat" or self._calm_s(_over_s(delivery), died_at_s) > SETTLED_WITHIN_S:
            least = living.least
        else:
            least = self._checkpoint(delivery, died_at_s)
        return Owed(least, price(delivery.delivered_words) if plan != "flat" else CREDIT, self._may_be_lost(delivery))

    def _checkpoint(self, delivery: Delivery, died_at_s: float) -> int:
        """What a heartbeat had told Redis before the end; nothing for sure if there was any trouble at that time."""
        told_s = died_at_s - TOLD_WITHIN_S
        if not delivery.stream or self._calm_s(told_s, died_at_s) < TOLD_WITHIN_S - 0.001:
            return 0
        return price(delivery.words_by(told_s))

    def _may_be_lost(self, delivery: Delivery) -> bool:
        """Redis lost its state while it was the only one to know, and the gateway died before it told that again."""
        died_at_s = self.died_at_s[delivery.gateway]
        for one in self.happened:
            if not self.keeps and one.fault in LOSSES and delivery.at_s <= one.ended_s:
                between = sorted((one.ended_s, died_at_s))
                if one.began_s <= died_at_s <= one.ended_s or self._calm_s(*between) < POSTED_WITHIN_S:
                    return True
        return False

    def _calm_s(self, from_s: float, to_s: float) -> float:
        """Seconds of a time without those in which a store was away, stalled or refusing, or a gateway was stopped."""
        return (
            to_s
            - from_s
            - sum(
                max(0.0, min(to_s, one.ended_s) - max(from_s, one.began_s))
                for one in self.happened
                if one.fault != "gateway_killed"
            )
        )


def _over_s(delivery: Delivery) -> float:
    """When the upstream had written all that it wrote, or the last of it that the gateway took."""
    last_s = delivery.parts[-1][0] if delivery.parts else delivery.at_s
    return delivery.finished_at_s or last_s


def price(words: int) -> int:
    return -(-tokens_of(words) * RATE // 1_000_000)


def _of_the_living(delivery: Delivery, plan: str, seen: Seen) -> Owed:
    if plan == "flat":
        return Owed(CREDIT, CREDIT)
    if seen.end == "200":
        return Owed(price(delivery.words), price(delivery.words))
    return Owed(price(seen.words), price(delivery.delivered_words))

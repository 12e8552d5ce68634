"""Holds in PostgreSQL itself: of requests that come while Redis is away, and of all with `write: through`."""

from collections.abc import Sequence

from gateway.ledger import books
from gateway.stores import Postgres


class PostgresHolds:
    """What one process holds there, beside what Redis may owe. All raise StoreUnavailable."""

    def __init__(self, postgres: Postgres, instance: str, *, lease_ms: int, capped: bool) -> None:
        self._postgres = postgres
        self._instance = instance
        self._lease_ms = lease_ms
        self._capped = capped
        #: Holds taken there by this process since it started.
        self.taken_count = 0

    async def take(
        self, org_id: str, request_id: str, want_ucredits: int, least_ucredits: int, owed_ucredits: int
    ) -> books.Taken:
        """As books.take_hold. After a failure it may be held all the same."""
        taken = await books.take_hold(
            self._postgres,
            org_id,
            request_id,
            want_ucredits,
            least_ucredits,
            owed_ucredits,
            instance=self._instance,
            lease_ms=self._lease_ms,
            capped=self._capped,
        )
        self.taken_count += taken.status == "OK"
        return taken

    async def extend(self, org_id: str, request_id: str, more_ucredits: int) -> books.Taken:
        return await books.extend_hold(self._postgres, org_id, request_id, more_ucredits, capped=self._capped)

    async def renew(self, holds: Sequence[tuple[str, str, int]]) -> None:
        """holds: org, request, used so far."""
        await books.renew_holds(self._postgres, holds, self._lease_ms)

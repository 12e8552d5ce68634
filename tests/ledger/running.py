"""Gateways without a door: everything that handles credits, at work, each with connections of its own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.admission import Hold
from gateway.errors import StoreUnavailable
from gateway.stores import Postgres, Redis
from gateway.types import Charge, Principal, Quote, Refusal
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished

CREDIT = 1_000_000


@asynccontextmanager
async def gateway(
    redis_url: str, database_url: str, *, listens: bool = True, works: bool = True, **credits: object
) -> AsyncIterator[House]:
    """listens: hears what the database announces. works: its background work runs. credits: keys of that section."""
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = Postgres(database_url, timeout_ms=2_000, pool_max=8)
    async with furnished(redis, postgres, **credits) as house:
        if listens:
            postgres.listen(house.money.channels, on_connect=house.freshness.refresh_all)
        tasks = [asyncio.create_task(work()) for _, work in house.money.work if works]
        try:
            yield house
        finally:
            await house.money.drain(2)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def paid(ucredits: int) -> Charge:
    return Charge(ucredits, None, keep_requests=True, basis="exact")


class Request:
    """A request that holds `ucredits` from `begin` to `end`."""

    def __init__(self, house: House, hold_id: str, ucredits: int = CREDIT, org_id: str = ORG) -> None:
        asker = ASKER if org_id == ORG else Principal(org_id, "pro", None, None, "api_key")
        self._context = house.admission.hold(hold_id, asker, (), Quote.flat(ucredits))
        self._ucredits = ucredits
        self.hold: Hold | None = None
        self.refusal: Refusal | None = None

    async def begin(self) -> bool:
        """Whether it was admitted."""
        verdict = await self._context.__aenter__()
        if isinstance(verdict, Refusal):
            self.refusal = verdict
        else:
            self.hold = verdict
        return self.hold is not None

    async def end(self, ucredits: int | None = None) -> None:
        """It was charged what it held, or this."""
        assert self.hold is not None
        self.hold.charge = paid(self._ucredits if ucredits is None else ucredits)
        await self._context.__aexit__(None, None, None)


async def pay(house: House, hold_id: str, ucredits: int = CREDIT, org_id: str = ORG) -> str:
    """One request from beginning to end: `paid`, or why not."""
    request = Request(house, hold_id, ucredits, org_id)
    try:
        if not await request.begin():
            assert request.refusal is not None
            return request.refusal.code
        await request.end()
    except StoreUnavailable as exc:
        return exc.code
    return "paid"


async def state(house: House, org_id: str = ORG) -> dict[str, int]:
    """What PostgreSQL says of the org: whole credits, and its account's row."""
    row = await house.postgres.row(
        "SELECT c.credits, a.micro, a.cap, a.lost, a.held, a.epoch, a.version, cardinality(a.waiting) AS waiting "
        "FROM ai_credits c JOIN gateway.account a ON a.org_id = c.organization_id WHERE a.org_id = $1",
        org_id,
    )
    return {} if row is None else dict(row.items())


async def is_whole(house: House, org_id: str = ORG) -> bool:
    """Nothing is set aside, nobody is waited for."""
    now = await state(house, org_id)
    return now["lost"] == now["waiting"] == 0

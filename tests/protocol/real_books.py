"""The SQL functions, done to one org's account in a real PostgreSQL, and what came of them in the model's own terms."""

import json

from gateway.ledger import books
from gateway.stores import Postgres
from gateway.types import UCREDITS_PER_CREDIT, Balance, Entry
from tests.protocol.books_side import Books, Taken
from tests.protocol.names import UNIT, Names, units
from tests.protocol.redis_state import ORPHAN, SETTLE, Held, Row

LEASE_MS = 600_000
GRACE_MS = 600_000
KINDS = {SETTLE: "settle", ORPHAN: "orphan"}

READ = """
SELECT c.credits * 1000000 + a.micro AS balance, a.version, a.cap, a.lost, a.held, a.epoch, a.birth, a.waiting,
    (SELECT coalesce(json_agg(json_build_array(l.request_id, l.kind, l.amount)), '[]') FROM gateway.ledger l
        WHERE l.org_id = a.org_id)::text AS ledger,
    (SELECT coalesce(json_agg(json_build_array(h.request_id, h.amount, h.used)), '[]') FROM gateway.hold h
        WHERE h.org_id = a.org_id)::text AS holds
FROM gateway.account a JOIN ai_credits c ON c.organization_id = a.org_id WHERE a.org_id = $1
"""


class RealBooks:
    """One org's account. Gateways are there as instances that never die."""

    def __init__(self, postgres: Postgres, org: str, requests: int, gateways: int, names: Names) -> None:
        self._postgres = postgres
        self._org = org
        self._names = names
        self._rids = [f"{org}-{at}" for at in range(requests)]
        self._gateways = [f"gateway-{at}" for at in range(gateways)]
        self._grants = 0

    async def open(self, credits: int) -> None:
        await self._live()
        await self._grant(credits)

    async def _live(self) -> None:
        await self._postgres.rows(
            "INSERT INTO gateway.instance (instance_id, seen_at) "
            "SELECT i, now() + interval '1 day' FROM unnest($1::text[]) AS i "
            "ON CONFLICT (instance_id) DO UPDATE SET seen_at = EXCLUDED.seen_at",
            self._gateways,
        )

    async def _grant(self, credits: int) -> None:
        self._grants += 1
        grant_id = f"grant:{self._grants}"
        await self._postgres.rows("SELECT gateway.grant_credits($1, $2, $3, '{}')", self._org, grant_id, credits * UNIT)

    async def read(self) -> Balance:
        return (await books.read(self._postgres, [self._org]))[self._org]

    async def post(self, *entries: tuple[int, int, int]) -> Balance:
        charged = [Entry(self._org, self._rids[at], KINDS[kind], -charge * UNIT, {}) for at, kind, charge in entries]
        (balance,) = await books.post(self._postgres, charged)
        return balance

    async def sweep_hold(self, request: int) -> int:
        await self._postgres.rows(
            "UPDATE gateway.hold SET deadline = '-infinity' WHERE request_id = $1", self._rids[request]
        )
        swept = await books.sweep_holds(self._postgres, "checkpoint")
        assert [found[:2] for found in swept] in ([], [(self._org, self._rids[request])])
        return units(swept[0][2]) if swept else -1

    async def take_hold(self, request: int, want: int, least: int, owed: int, capped: int) -> Taken:
        taken = await books.take_hold(
            self._postgres,
            self._org,
            self._rids[request],
            want * UNIT,
            least * UNIT,
            owed * UNIT,
            instance=self._gateways[0],
            lease_ms=LEASE_MS,
            capped=bool(capped),
        )
        return Taken(taken.status, units(taken.held_ucredits))

    async def extend_hold(self, request: int, more: int, capped: int) -> Taken:
        taken = await books.extend_hold(
            self._postgres, self._org, self._rids[request], more * UNIT, capped=bool(capped)
        )
        return Taken(taken.status, units(taken.held_ucredits))

    async def raise_cap(self, epoch: int, birth: int, need: int, floor: int, seen: int) -> Balance:
        account = (self._org, epoch, self._names.births[birth])
        return await books.raise_cap(self._postgres, *account, need * UNIT, floor * UNIT, GRACE_MS)

    async def go_on_after(self, version: int, epoch: int) -> Balance:
        return await books.go_on_after(self._postgres, self._org, self._names.versions[version], epoch)

    async def set_back(self, row: Row) -> None:
        await self._postgres.rows(
            "UPDATE gateway.account SET version = $2, epoch = $3 WHERE org_id = $1",
            *(self._org, self._names.versions[row.version], row.epoch),
        )

    async def acknowledge(self, gateway: int, epoch: int, birth: int, owed: int, seen: int) -> Balance:
        account = (self._org, epoch, self._names.births[birth])
        return await books.acknowledge(self._postgres, self._gateways[gateway], *account, owed * UNIT, GRACE_MS)

    async def lower_cap(self, epoch: int, birth: int, version: int, cap: int) -> Balance | None:
        as_of = (epoch, self._names.births[birth], self._names.versions[version])
        return await books.lower_cap(self._postgres, self._org, *as_of, cap * UNIT)

    async def end_grace(self) -> None:
        await self._postgres.rows(
            "UPDATE gateway.account SET lost_until = now() - interval '1 s' WHERE org_id = $1", self._org
        )
        await books.beat(self._postgres, self._gateways[0])
        await self._live()

    async def top_up(self, credits: int) -> None:
        """By hand in the application's table, where that can say it."""
        whole, rest = divmod(credits * UNIT, UCREDITS_PER_CREDIT)
        if rest:
            await self._grant(credits)
        else:
            await self._postgres.rows(
                "UPDATE ai_credits SET credits = credits + $2 WHERE organization_id = $1", self._org, whole
            )

    def row(self, balance: Balance) -> Row:
        """A state as the functions answer it."""
        amounts = units(balance.ucredits), units(balance.set_aside_ucredits), units(balance.cap_ucredits)
        posted, set_aside, cap = amounts
        version, birth = self._names.version(balance.version), self._names.birth(balance.birth)
        return Row(posted, version, set_aside, cap, balance.epoch, birth)

    async def state(self, model: Books) -> Books:
        """The version that the model made up with its last operation gets its name here."""
        found = await self._postgres.row(READ, self._org)
        assert found is not None
        self._names.note_version(model.version, found["version"])
        ledger, holds = (
            json.loads(found["ledger"]),
            {rid: Held(units(a), units(u)) for rid, a, u in json.loads(found["holds"])},
        )
        charges = {(rid, kind): -units(amount) for rid, kind, amount in ledger if kind in KINDS.values()}
        return Books(
            units(found["balance"]),
            self._names.version(found["version"]),
            units(found["cap"]),
            units(found["lost"]),
            units(found["held"]),
            found["epoch"],
            sum(1 << at for at, name in enumerate(self._gateways) if name in found["waiting"]),
            self._names.birth(found["birth"]),
            tuple((charges.get((rid, "settle")), charges.get((rid, "orphan"))) for rid in self._rids),
            tuple(holds.get(rid) for rid in self._rids),
            sum(units(amount) for rid, kind, amount in ledger if kind not in KINDS.values()),
        )

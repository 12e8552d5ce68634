"""What the witnesses say after everything was healed: the ledger, Redis, the upstream, the customers, the access logs.

Owns the invariants C1-C11 of docs/guarantees.md as far as a run can show them; what each request owes is in
owed.py. C7 and C8 are for tests that see every step (tests/limits/). A violation is a sentence that names the org or
request; figures that are allowed but worth knowing stand beside them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gateway import keys
from tests.chaos.clients import Customers, Seen
from tests.chaos.owed import Circumstances, price
from tests.chaos.upstream import Delivery
from tests.chaos.world import Org, World
from tests.walk.house import CREDIT

#: One statement, one snapshot. C1, and what else is true of the books at any moment: a person's change is counted, what
#: is held is the sum of the holds.
BOOKS = """
SELECT a.org_id, c.credits * 1000000 + a.micro AS balance, a.held, a.lost, a.cap, a.waiting,
       c.credits - a.credits_seen AS unseen,
       (SELECT coalesce(sum(l.amount), 0) FROM gateway.ledger l WHERE l.org_id = a.org_id) AS entries,
       (SELECT coalesce(sum(h.amount), 0) FROM gateway.hold h WHERE h.org_id = a.org_id) AS holds
FROM ai_credits c JOIN gateway.account a ON a.org_id = c.organization_id"""


@dataclass
class Charged:
    """What the ledger says of one request."""

    org_id: str
    ucredits: int = 0
    #: Amounts by kind: `settle`, `orphan`.
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass
class Verdict:
    deliveries: int = 0
    charges: int = 0
    #: Spent beyond what there was and beyond what single requests used over their holds (`overrun: debt`), all orgs.
    overspent_ucredits: int = 0
    #: What is owed to that debt.
    debt_ucredits: int = 0
    lost_settles: int = 0
    #: Lost with a gateway that was killed and a Redis that forgot it: `behind` does not promise more.
    forgiven: int = 0
    double_charges: int = 0
    stuck_holds: int = 0
    #: After everything worked again: until nothing was held anywhere, and until all was posted and nothing set aside.
    holds_ended_s: float = 0.0
    rest_s: float = 0.0
    violations: list[str] = field(default_factory=list)


async def judge(world: World, customers: Customers, *, keeps: bool, capped: bool) -> Verdict:
    """Once everything is at rest. keeps, capped: as Circumstances, and `on_state_loss: cap`."""
    verdict = Verdict(deliveries=len(world.router.deliveries))
    verdict.violations += world.fallen()
    rows = await world.stores.sql("SELECT org_id, request_id, kind, amount FROM gateway.ledger ORDER BY seq")
    charged = _charged(rows)
    verdict.charges = len(charged)
    books = await world.stores.sql(BOOKS)
    verdict.violations += wrong_books(books)
    _nobody_overspent(world, books, charged, verdict, capped=capped)
    _deliveries(world, customers, charged, verdict, Circumstances(world.died_at_s, world.happened, keeps))
    _keys_ran_once(world, customers, charged, verdict)
    await _redis_agrees(world, books, verdict)
    if told := await world.seats[0].audited():
        verdict.violations.append(f"`gateway credits audit` says: {told}")
    dead = await world.stores.sql("SELECT count(*) AS n FROM gateway.dead_letter")
    if dead[0]["n"]:
        verdict.violations.append(f"{dead[0]['n']} dead letters")
    return verdict


def wrong_books(books: Iterable[Any]) -> list[str]:
    """C1: every balance is the sum of its ledger, at any moment."""
    return [
        f"C1: {dict(row)}"
        for row in books
        if row["balance"] != row["entries"] or row["held"] != row["holds"] or row["unseen"] or row["lost"] < 0
    ]


def _charged(rows: Iterable[Any]) -> dict[str, Charged]:
    """By request id, which is the hold's id: nobody here may choose it."""
    found: dict[str, Charged] = {}
    for row in rows:
        if row["kind"] in ("settle", "orphan"):
            one = found.setdefault(row["request_id"], Charged(row["org_id"]))
            one.ucredits -= row["amount"]
            one.kinds[row["kind"]] = -row["amount"]
    return found


def _nobody_overspent(
    world: World, books: Iterable[Any], charged: dict[str, Charged], verdict: Verdict, *, capped: bool
) -> None:
    """C4: what an org has spent beyond what it had is what its requests used beyond what was held for them: nothing
    where prices are flat."""
    overruns: defaultdict[str, int] = defaultdict(int)
    held = {line["request_id"]: line["held_ucredits"] for line in world.lines("request") if "held_ucredits" in line}
    # A sweep ends the hold of a gateway that stalled beyond its lease: what is not in its checkpoint may be spent by
    # others before the settle comes (§3, `stalled > lease`). A checkpoint of nothing leaves no entry in the ledger.
    held |= {line["hold"]: 0 for line in world.lines("hold of a lost gateway ended")}
    metered = {org.org_id for org in world.orgs if org.plan == "metered"}
    for request_id, one in charged.items():
        if one.org_id not in metered:
            continue
        paid_for = one.kinds.get("orphan", held.get(request_id, one.ucredits))
        overruns[one.org_id] += max(0, one.ucredits - paid_for)
    for row in books:
        org_id, debt_ucredits = row["org_id"], max(0, -row["balance"])
        verdict.debt_ucredits += min(debt_ucredits, overruns[org_id])
        if debt_ucredits > overruns[org_id]:
            verdict.overspent_ucredits += debt_ucredits - overruns[org_id]
            if capped:
                verdict.violations.append(f"C4: {org_id} is at -{debt_ucredits}, overruns explain {overruns[org_id]}")


def _deliveries(
    world: World, customers: Customers, charged: dict[str, Charged], verdict: Verdict, circumstances: Circumstances
) -> None:
    """C2, C3, C6, C10, C11: what was delivered is charged once and in full, and nothing else is."""
    plans = {org.org_id: org.plan for org in world.orgs}
    reached: set[str] = set()
    for delivery in world.router.deliveries:
        seen = customers.seen[delivery.attempt]
        owed = circumstances.owed(delivery, plans[delivery.org_id], seen)
        one = charged.get(delivery.request_id, Charged(delivery.org_id))
        what = f"{_of(delivery, seen)} is charged {one.ucredits} {one.kinds}"
        if delivery.request_id in reached:
            verdict.violations.append(f"C11: {what}, and reached the upstream twice")
        reached.add(delivery.request_id)
        if one.org_id != delivery.org_id:
            verdict.violations.append(f"C10: {what}, to {one.org_id}")
        if one.ucredits > owed.most:
            verdict.double_charges += 1
            verdict.violations.append(f"C2: {what}, {owed.most} at most")
        elif one.ucredits < owed.least and owed.forgivable:
            verdict.forgiven += 1
        elif one.ucredits < owed.least:
            verdict.lost_settles += 1
            verdict.violations.append(f"C3: {what}, {owed.least} at least")
    for request_id, one in charged.items():
        # A gateway may die between the hold and the upstream; only then nobody can tell that nothing was delivered.
        may = world.died_at_s and "settle" not in one.kinds and one.ucredits <= CREDIT and plans[one.org_id] == "flat"
        if one.ucredits and request_id not in reached and not may:
            verdict.double_charges += 1
            verdict.violations.append(f"C2: {request_id} of {one.org_id} was never delivered: {one.kinds}")


def _of(delivery: Delivery, seen: Seen) -> str:
    kind = "stream" if delivery.stream else "answer"
    return (
        f"{kind} {delivery.request_id} of {delivery.org_id} through {delivery.gateway} (wanted {delivery.words} words, "
        f"{price(delivery.words)}, wrote {delivery.delivered_words}, seen {seen.words}, {seen.end})"
    )


def _keys_ran_once(world: World, customers: Customers, charged: dict[str, Charged], verdict: Verdict) -> None:
    """What carried an Idempotency-Key is charged once at most, however often it was sent, and answered once unless its
    gateway died."""
    paid: defaultdict[str, list[Delivery]] = defaultdict(list)
    whole: Counter[str] = Counter()
    for delivery in world.router.deliveries:
        if delivery.key and delivery.request_id in charged and charged[delivery.request_id].ucredits:
            paid[delivery.key].append(delivery)
        if delivery.key and delivery.gateway not in world.died_at_s:
            whole[delivery.key] += customers.seen[delivery.attempt].end == "200"
    for key, times in paid.items():
        if len(times) > 1:
            verdict.double_charges += 1
            told = [_of(delivery, customers.seen[delivery.attempt]) for delivery in times]
            verdict.violations.append(f"C11: the idempotency key {key} was charged {len(times)} times: {told}")
    verdict.violations += [f"C11: the idempotency key {key} ran {n} times" for key, n in whole.items() if n > 1]


async def holds_have_ended(world: World) -> bool:
    """Nothing is held anywhere, nobody is waited for."""
    for org in world.orgs:
        if await world.stores.redis.do("HLEN", keys.holds(org.org_id)):
            return False
    rows = await world.stores.sql("SELECT count(*) AS n FROM gateway.hold")
    return not rows[0]["n"]


async def at_rest(world: World) -> bool:
    """C5: nothing is held, nothing waits to be posted, nothing is set aside, anywhere; Redis has the balances."""
    books = await world.stores.sql(BOOKS)
    if any(row["held"] or row["lost"] or row["waiting"] for row in books):
        return False
    balances = {row["org_id"]: row["balance"] for row in books}
    for org in world.orgs:
        if await in_motion(world, org) or not await _knows(world, org, balances[org.org_id]):
            return False
    return True


async def _knows(world: World, org: Org, balance_ucredits: int) -> bool:
    """Redis has no other balance of the org."""
    account = await _account(world, org.org_id)
    return account.get("p", balance_ucredits) == balance_ucredits


async def in_motion(world: World, org: Org) -> str:
    """What of the org is not at rest in Redis; empty: nothing."""
    redis = world.stores.redis
    account = await _account(world, org.org_id)
    moving: dict[str, object] = {name: account.get(name, 0) for name in ("u", "h", "s")}
    moving["outbox"] = await redis.do("XLEN", keys.outbox(org.org_id))
    moving["holds"] = await redis.do("HLEN", keys.holds(org.org_id))
    moving["deadlines"] = await redis.do("ZCARD", keys.deadlines(org.org_id))
    return ", ".join(f"{name}={value}" for name, value in moving.items() if value)


async def _account(world: World, org_id: str) -> dict[str, int]:
    flat = await world.stores.redis.do("HGETALL", keys.account(org_id))
    pairs = flat.items() if isinstance(flat, dict) else []
    return {name.decode(): int(value) for name, value in pairs if value.lstrip(b"-").isdigit()}


async def _redis_agrees(world: World, books: Iterable[Any], verdict: Verdict) -> None:
    """C5, C10: what Redis shows of an org is what the ledger has, and nobody touched one that never asked."""
    posted = {row["org_id"]: row for row in books}
    for org in world.orgs:
        row = posted[org.org_id]
        moving = await in_motion(world, org)
        if moving or row["held"] or row["lost"] or row["waiting"]:
            verdict.stuck_holds += 1
            verdict.violations.append(f"C5: {org.org_id} does not come to rest: {moving}, {dict(row)}")
        account = await _account(world, org.org_id)
        if org.idle and account:
            verdict.violations.append(f"C10: {org.org_id} never asked for anything and has an account: {account}")
        if not await _knows(world, org, row["balance"]):
            verdict.violations.append(f"C5: Redis has {account.get('p')} for {org.org_id}, not {row['balance']}")
        mirror = await world.stores.redis.do("GET", keys.mirror(org.org_id))
        shown = str(max(0, row["balance"]) // CREDIT).encode()
        if mirror not in (None, shown):
            verdict.violations.append(f"the mirror of {org.org_id} shows {mirror!r}, not {shown!r}")

"""Idempotency keys over the real stores: who may run, who is told what, what becomes of a key whose gateway died."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

import gateway.idempotency
from gateway import keys
from gateway.admission import Hold
from gateway.errors import BadRequest, StoreUnavailable
from gateway.idempotency import Claim, Idempotency, Rules
from gateway.ledger import post
from gateway.stores import Postgres, Redis
from gateway.telemetry import Record
from gateway.types import Charge, Entry, Facts, HeaderList, Outcome, Principal, Quote, Refusal
from tests.ledger.conftest import ASKER, ORG, House, every_script, furnished
from tests.ledger.faulty import FaultyPostgres, FaultyRedis, Interrupted
from tests.waiting import until

CREDIT = 1_000_000
RULES = Rules(running_ms=30_000, beat_ms=10_000)
#: Of a gateway whose word lapses as soon as it is given.
DYING = Rules(running_ms=0, beat_ms=10_000)
PRICE = Quote.flat(CREDIT)
PAID = Charge(CREDIT, None, keep_requests=True, basis="exact")
TARGET = b"/v1/chat/completions"
EXAMPLES = 40

numbers = itertools.count(1)


def facts(*headers: tuple[bytes, bytes], method: str = "POST", target: bytes = TARGET) -> Facts:
    fields: HeaderList = headers
    return Facts("r", method, target.decode(), target, fields, client_ip="192.0.2.1", peer_ip="192.0.2.1")


Running = Callable[[Record], Awaitable[None]]


async def complete(record: Record) -> None:
    record.outcome, record.status, record.charged_ucredits = Outcome.COMPLETE.value, 200, CREDIT


def ends_as(outcome: Outcome | None, charged: int) -> Running:
    async def end(record: Record) -> None:
        record.outcome, record.charged_ucredits = None if outcome is None else outcome.value, charged

    return end


async def send(
    idempotency: Idempotency,
    key: str = "k1",
    body: bytes = b"{}",
    *,
    asker: Principal = ASKER,
    asked: Facts | None = None,
    run: Running = complete,
) -> Refusal | None:
    """None: the request was run; else what its client was told."""
    number = next(numbers)
    record = Record(f"x{number}", "POST", TARGET.decode(), "192.0.2.1")
    async with idempotency.once(key, asker, asked or facts(), body, f"r{number}", record) as refusal:
        if refusal is None:
            await run(record)
        return refusal


def code(refusal: Refusal | None) -> str:
    return "ran" if refusal is None else refusal.code


@pytest.fixture
def idempotency(house: House) -> Idempotency:
    return Idempotency(house.postgres, house.redis, RULES)


async def outcomes(house: House) -> list[str | None]:
    """Of every key that is known: how its request ended, None while that is not known."""
    rows = await house.postgres.rows("SELECT outcome ->> 'outcome' AS outcome FROM gateway.idempotency ORDER BY at")
    return [row["outcome"] for row in rows]


async def pass_time(house: House, column: str) -> None:
    await house.postgres.rows(f"UPDATE gateway.idempotency SET {column} = clock_timestamp()")


# Who may run


async def test_a_key_is_run_once_and_whoever_repeats_it_is_told_how_it_ended(idempotency: Idempotency) -> None:
    assert await send(idempotency) is None
    for _ in range(2):
        told = await send(idempotency)
        assert told is not None
        assert (told.status, told.code) == (409, "request_finished")
        assert (told.should_retry, told.retry_after_ms) == (False, None)
        first = dict(told.details["first"])
        assert first.pop("at").endswith("+00:00")
        assert first.pop("request_id").startswith("x")
        assert first == {"status": 200, "outcome": "complete", "charged_credits": 1}


async def test_while_it_runs_a_repetition_is_asked_to_come_back(idempotency: Idempotency) -> None:
    told: list[Refusal | None] = []

    async def repeat(record: Record) -> None:
        told.append(await send(idempotency))
        await complete(record)

    assert await send(idempotency, run=repeat) is None
    [refusal] = told
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.should_retry) == (409, "request_in_progress", True)
    assert refusal.retry_after_ms == 1000


@pytest.mark.parametrize(
    "other",
    [(b'{"a": 2}', facts()), (b"{}", facts(method="PUT")), (b"{}", facts(target=TARGET + b"?n=1"))],
    ids=["body", "method", "target"],
)
async def test_a_key_stands_for_one_request(idempotency: Idempotency, other: tuple[bytes, Facts]) -> None:
    body, asked = other
    told: list[Refusal | None] = []

    async def ask_otherwise(record: Record) -> None:
        told.append(await send(idempotency, body=body, asked=asked))
        await complete(record)

    assert await send(idempotency, run=ask_otherwise) is None
    told.append(await send(idempotency, body=body, asked=asked))
    for refusal in told:
        assert refusal is not None
        assert (refusal.status, refusal.code, refusal.should_retry) == (422, "idempotency_key_reused", False)
    assert code(await send(idempotency)) == "request_finished"


async def test_keys_are_an_orgs_own(idempotency: Idempotency) -> None:
    assert await send(idempotency) is None
    assert await send(idempotency, asker=Principal("globex", "pro", None, None, "api_key")) is None


@pytest.mark.parametrize("outcome", [None, Outcome.NEVER_REACHED, Outcome.UPSTREAM_REFUSED])
async def test_what_cost_nothing_may_be_sent_again(
    house: House, idempotency: Idempotency, outcome: Outcome | None
) -> None:
    assert await send(idempotency, run=ends_as(outcome, 0)) is None
    assert await outcomes(house) == []
    assert await send(idempotency, body=b"other") is None


@pytest.mark.parametrize("outcome", [Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.CUT, Outcome.UPSTREAM_BROKE])
async def test_what_delivered_something_is_not_run_again_even_if_it_was_free(
    idempotency: Idempotency, outcome: Outcome
) -> None:
    assert await send(idempotency, run=ends_as(outcome, 0)) is None
    told = await send(idempotency)
    assert told is not None and told.details["first"]["charged_credits"] == 0
    assert told.details["first"]["outcome"] == outcome.value


async def test_an_error_that_is_charged_is_not_run_again(idempotency: Idempotency) -> None:
    assert await send(idempotency, run=ends_as(Outcome.UPSTREAM_REFUSED, 500_000)) is None
    told = await send(idempotency)
    assert told is not None and told.details["first"]["charged_credits"] == 0.5


async def test_a_key_is_free_again_after_its_day(house: House, idempotency: Idempotency) -> None:
    assert await send(idempotency) is None
    await pass_time(house, "expires_at")
    assert code(await send(idempotency)) == "request_finished"  # its gateway may still be at work with it
    await pass_time(house, "running_until")
    assert await send(idempotency, body=b"other") is None
    assert code(await send(idempotency, body=b"other")) == "request_finished"


@pytest.mark.parametrize("bad", [b"", b"two words", b"x" * 256, "schlüssel".encode(), b"tab\t"])
def test_what_is_no_key_is_a_bad_request(bad: bytes) -> None:
    with pytest.raises(BadRequest):
        Idempotency.key(facts((b"idempotency-key", bad)))


def test_a_key_is_named_once() -> None:
    assert Idempotency.key(facts((b"accept", b"*/*"))) is None
    assert Idempotency.key(facts((b"idempotency-key", b'"a-1"'))) == '"a-1"'
    assert Idempotency.key(facts((b"idempotency-key", b"x" * 255))) == "x" * 255
    with pytest.raises(BadRequest):
        Idempotency.key(facts((b"idempotency-key", b"a"), (b"idempotency-key", b"a")))


# Several gateways at once


@dataclass
class Race:
    """Everybody sends the same key at once; who runs it, and whether two ever do at the same time."""

    house: House
    gateways: list[Idempotency]
    key: str
    running: int = 0
    runs: list[tuple[bytes, int]] = field(default_factory=list)

    async def send(self, gateway: int, body: bytes, turns: int, charged: int) -> Refusal | None:
        async def run(record: Record) -> None:
            self.running += 1
            assert self.running == 1, "two run under one key"
            assert not any(cost for _, cost in self.runs), "it was run, and charged, before"
            for _ in range(turns):
                await self.house.postgres.row("SELECT 1")
            self.running -= 1
            self.runs.append((body, charged))
            record.outcome, record.charged_ucredits = ("complete" if charged else "upstream_refused"), charged

        return await send(self.gateways[gateway], self.key, body, run=run)


SENDINGS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from([b"{}", b"{}", b"other"]), st.integers(0, 2), st.sampled_from([0, CREDIT])
    ),
    min_size=2,
    max_size=8,
)
EARLIER = st.sampled_from(["nobody", "died", "died charged"])


def test_of_those_who_race_for_a_key_one_runs(redis_url: str, database_url: str) -> None:
    """From several gateways, for a key that is new or whose gateway died: once at a time, and charged once."""
    with asyncio.Runner() as runner:
        stage = several(redis_url, database_url)
        house, gateways = runner.run(stage.__aenter__())

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )  # fmt: skip
        @hypothesis_given(EARLIER, SENDINGS)
        def play(earlier: str, sendings: list[tuple[int, bytes, int, int]]) -> None:
            runner.run(_play(Race(house, gateways, f"race{next(numbers)}"), earlier, sendings))

        try:
            play()
        finally:
            runner.run(stage.__aexit__(None, None, None))


async def _play(race: Race, earlier: str, sendings: list[tuple[int, bytes, int, int]]) -> None:
    if earlier != "nobody":
        dead = await died(race.house, race.key)
        if earlier == "died charged":
            await post(race.house.postgres, [Entry(ORG, dead, "settle", -CREDIT)])
    told = [code(one) for one in await asyncio.gather(*(race.send(*sending) for sending in sendings))]
    if earlier == "died charged":
        assert not race.runs and "ran" not in told
        assert {code for code in told} <= {"request_finished", "idempotency_key_reused"}
        return
    assert race.runs and len(race.runs) == told.count("ran")
    assert sum(cost > 0 for _, cost in race.runs) <= 1
    await asyncio.gather(*(gateway.tell_kept() for gateway in race.gateways))
    charged = [body for body, cost in race.runs if cost]
    for body in (b"{}", b"other"):
        after = code(await send(race.gateways[0], race.key, body))
        assert after == ("ran" if not charged else "request_finished" if body in charged else "idempotency_key_reused")
        if not charged:
            return


@asynccontextmanager
async def several(redis_url: str, database_url: str) -> AsyncIterator[tuple[House, list[Idempotency]]]:
    """A house, and gateways beside it with connections of their own."""
    redis = Redis(redis_url, timeout_ms=5_000, connect_timeout_ms=1_000, scripts=every_script())
    others = [Postgres(database_url, timeout_ms=10_000, pool_max=3) for _ in range(3)]
    async with furnished(redis, Postgres(database_url, timeout_ms=10_000, pool_max=4)) as house:
        await house.credits(1000)
        for postgres in others:
            await postgres.open()
        yield house, [Idempotency(postgres, redis, RULES) for postgres in others]
        for postgres in others:
            await postgres.close()


# A gateway that died


async def died(house: House, key: str = "k1", body: bytes = b"{}") -> str:
    """Its request has claimed the key, and nothing will be heard of it: what the ledger would know it by."""
    hold_id = f"dead{next(numbers)}"
    facts_of_it = facts()
    digest = sha256(b"\0".join((facts_of_it.method.encode(), facts_of_it.target, body))).digest()
    dying = Idempotency(house.postgres, house.redis, DYING)
    assert await dying._claim(Claim(ORG, sha256(key.encode()).digest(), hold_id), digest) is None
    return hold_id


async def hold(house: House, hold_id: str) -> Hold:
    taken = await house.admission.hold(hold_id, ASKER, (), PRICE).__aenter__()
    assert isinstance(taken, Hold)
    return taken


async def end(house: House, taken: Hold, charge: Charge | None) -> None:
    taken.charge = charge
    taken.meta = {"request_id": "x-of-the-dead", "status": 200, "outcome": "complete"}
    await house.admission.give_back(taken)


async def test_one_that_died_before_it_held_anything_stands_in_nobodys_way(
    house: House, idempotency: Idempotency
) -> None:
    await died(house)
    assert await send(idempotency, body=b"other") is None


@pytest.mark.parametrize(
    ("on_expiry", "after"), [("checkpoint", "request_finished"), ("hold", "request_finished"), ("release", "ran")]
)
@pytest.mark.parametrize("write", ["behind", "through"])
async def test_one_that_died_while_it_held_runs_until_its_lease_is_over(
    redis_url: str, database_url: str, write: str, on_expiry: str, after: str
) -> None:
    """Then it is what the sweeper made of it: charged, or never run."""
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = Postgres(database_url, timeout_ms=5_000, pool_max=4)
    async with furnished(redis, postgres, write=write, on_expiry=on_expiry) as house:
        idempotency = Idempotency(postgres, redis, RULES)
        await house.credits(5)
        hold_id = await died(house)
        taken = await hold(house, hold_id)
        assert taken.where == ("redis" if write == "behind" else "postgres")
        assert code(await send(idempotency)) == "request_in_progress"
        del house.admission._open[hold_id]
        await redis.call("ZADD", keys.deadlines(ORG), "XX", 1, hold_id)
        await postgres.rows("UPDATE gateway.hold SET deadline = clock_timestamp()")
        assert await house.sweeper.sweep() + await house.sweeper.sweep_postgres() == 1
        told = await send(idempotency)
        assert code(told) == after
        if told is not None:
            first = dict(told.details["first"])
            del first["at"]
            assert first == {
                "request_id": hold_id, "status": None, "outcome": "gateway_died", "charged_credits": 1,
            }  # fmt: skip


async def test_one_that_died_after_its_charge_is_finished_wherever_the_charge_is(
    house: House, idempotency: Idempotency
) -> None:
    await house.credits(5)
    taken = await hold(house, await died(house))
    await end(house, taken, PAID)
    assert await house.redis.call("XLEN", keys.outbox(ORG)) == 1
    for key in ("waits in the outbox", "is in the ledger"):
        if key == "is in the ledger":
            await pass_time(house, "outcome = NULL, running_until")
            await house.outbox.flush()
            await house.redis.call("FLUSHALL")
        told = await send(idempotency)
        assert code(told) == "request_finished", key
        assert told is not None and told.details["first"]["charged_credits"] == 1
    assert told is not None
    assert told.details["first"]["request_id"] == "x-of-the-dead"
    assert (told.details["first"]["status"], told.details["first"]["outcome"]) == (200, "complete")


@pytest.mark.parametrize("posted", [False, True])
async def test_one_that_died_after_it_gave_everything_back_may_run_again(
    house: House, idempotency: Idempotency, posted: bool
) -> None:
    """posted: the ledger says so, since Redis did not take it."""
    await house.credits(5)
    hold_id = await died(house)
    if posted:
        await post(house.postgres, [Entry(ORG, hold_id, "settle", 0)])
        await house.redis.close()
    else:
        await end(house, await hold(house, hold_id), None)
    assert await send(idempotency) is None


async def test_while_an_old_charge_waits_nobody_knows_whose_it_is(house: House, idempotency: Idempotency) -> None:
    """A tombstone lasts 15 minutes, and the outbox as long as PostgreSQL makes it wait."""
    await house.credits(5)
    hold_id = await died(house)
    await end(house, await hold(house, hold_id), PAID)
    [[entry_id, fields]] = await house.redis.call("XRANGE", keys.outbox(ORG), "-", "+")
    await house.redis.call("DEL", keys.outbox(ORG), keys.tombstone(ORG, hold_id))
    old = f"{int(entry_id.split(b'-')[0]) - 900_000}-0"
    await house.redis.call("XADD", keys.outbox(ORG), old, *fields)
    assert code(await send(idempotency)) == "request_in_progress"
    await house.outbox.flush()
    assert code(await send(idempotency)) == "request_finished"


async def test_without_redis_nobody_knows_what_became_of_the_dead(house: House) -> None:
    redis = FaultyRedis("redis://127.0.0.1:1", timeout_ms=100, connect_timeout_ms=100)
    redis.arm(0, "")
    redis.away = True
    blind = Idempotency(house.postgres, redis, RULES)
    await died(house)
    with pytest.raises(StoreUnavailable):
        await send(blind)
    assert await send(blind, "k2") is None  # nobody has to be asked about a key that is new
    await blind.tell_kept()
    assert await outcomes(house) == [None, "complete"]


async def test_one_that_is_alive_keeps_its_key_however_long_it_takes(house: House) -> None:
    owner = Idempotency(house.postgres, house.redis, Rules(running_ms=400, beat_ms=50))
    other = Idempotency(house.postgres, house.redis, RULES)
    told: list[str] = []

    async def past_its_first_word(record: Record) -> None:
        [first] = await house.postgres.rows("SELECT running_until FROM gateway.idempotency")

        async def over() -> bool:
            row = await house.postgres.row(
                "SELECT running_until > $1::timestamptz + interval '400 ms' AND clock_timestamp() > $1 AS is_over "
                "FROM gateway.idempotency",
                first["running_until"],
            )
            return bool(row and row["is_over"])

        await until(over)
        told.append(code(await send(other)))
        await complete(record)

    working = asyncio.create_task(owner.run())
    assert await send(owner, run=past_its_first_word) is None
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert told == ["request_in_progress"]


async def test_a_charge_that_comes_late_finds_the_key_taken_by_another(house: House, idempotency: Idempotency) -> None:
    """The dead one was not: what it says of the key is no longer its to say."""
    late = Claim(ORG, sha256(b"k1").digest(), await died(house))
    assert await send(idempotency, run=ends_as(Outcome.COMPLETE, 2 * CREDIT)) is None
    for outcome in ('{"outcome": "late"}', None):
        await idempotency._tell({late: outcome})
    await house.postgres.rows(
        "SELECT gateway.beat_keys($1, $2, $3, 60000)", [ORG], [late.key_digest], [late.request_id]
    )
    told = await send(idempotency)
    assert told is not None and told.details["first"]["charged_credits"] == 2


async def test_of_two_who_find_a_dead_ones_key_the_second_waits_for_the_first(
    house: House, idempotency: Idempotency
) -> None:
    dead = await died(house)
    key, body = sha256(b"k1").digest(), sha256(b"").digest()
    async with house.postgres._connection(None) as first, first.transaction():
        await first.fetch("SELECT FROM gateway.idempotency FOR UPDATE")
        second = asyncio.create_task(send(idempotency, body=b"other"))

        async def waits() -> bool:
            row = await house.postgres.row("SELECT count(*) AS n FROM pg_locks WHERE NOT granted")
            return row is not None and row["n"] == 1

        await until(waits)
        row = await first.fetchrow(gateway.idempotency._CLAIM, ORG, key, body, "first", 30_000, 60_000, dead, None)
        assert row is not None and row["verdict"] == "RUN"
    assert code(await second) == "idempotency_key_reused"


# Stores that fail, cancellation


@asynccontextmanager
async def faulty(redis_url: str, database_url: str) -> AsyncIterator[tuple[House, FaultyPostgres, Idempotency]]:
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=every_script())
    postgres = FaultyPostgres(database_url, timeout_ms=5_000, pool_max=4)
    postgres.arm(0, "")
    async with furnished(redis, postgres) as house:
        yield house, postgres, Idempotency(postgres, redis, RULES)


@pytest.mark.parametrize("fault", ["before", "after", "late"])
async def test_a_claim_that_nobody_answered_leaves_the_key_free(redis_url: str, database_url: str, fault: str) -> None:
    async with faulty(redis_url, database_url) as (house, postgres, idempotency):
        postgres.arm(1, fault)
        with pytest.raises(StoreUnavailable):
            await send(idempotency)
        assert idempotency.kept_count == 1
        await postgres.let_late_ones_arrive()
        await idempotency.tell_kept()
        assert idempotency.kept_count == 0
        assert await outcomes(house) == []
        assert await send(idempotency, body=b"other") is None


@pytest.mark.parametrize("fault", ["before", "after", "late"])
async def test_an_end_that_nobody_took_is_told_later(redis_url: str, database_url: str, fault: str) -> None:
    async with faulty(redis_url, database_url) as (house, postgres, idempotency):

        async def then_lose_postgres(record: Record) -> None:
            await complete(record)
            postgres.arm(1, fault)

        assert await send(idempotency, run=then_lose_postgres) is None
        assert (idempotency.kept_count, idempotency._running) == (1, set())
        if fault != "after":
            await pass_time(house, "running_until")
            await idempotency.beat()
            assert code(await send(idempotency)) == "request_in_progress"
        await postgres.let_late_ones_arrive()
        await idempotency.drain(5)
        assert idempotency.kept_count == 0
        assert await outcomes(house) == ["complete"]


async def test_nothing_runs_under_a_key_without_postgres(house: House, unused_tcp_port: int) -> None:
    gone = Postgres(f"postgresql://127.0.0.1:{unused_tcp_port}/none", timeout_ms=200, pool_max=1)
    await gone.open()
    alone = Idempotency(gone, house.redis, RULES)
    with pytest.raises(StoreUnavailable):
        await send(alone)
    await alone.drain(1)  # in vain, and soon
    assert alone.kept_count == 1
    await gone.close()


@pytest.mark.parametrize(("turns", "times"), [(0, 1), (2, 1), (0, 2)])
async def test_a_cancellation_at_any_wait_leaves_no_key_behind_that_runs(
    house: House, idempotency: Idempotency, turns: int, times: int
) -> None:
    async def run(record: Record) -> None:
        await asyncio.sleep(0)
        await complete(record)

    for at in itertools.count(1):
        interrupted = Interrupted(send(idempotency, f"k{at}", run=run), at, turns, times)
        reached = await interrupted.run()
        await idempotency.tell_kept()
        assert (idempotency._running, idempotency.kept_count) == (set(), 0)
        rows = await house.postgres.rows(
            "SELECT outcome FROM gateway.idempotency WHERE key_digest = $1", sha256(f"k{at}".encode()).digest()
        )
        assert all(row["outcome"] is not None for row in rows), f"cancelled in wait {at}"
        if not reached:
            break
    assert at > 5


async def test_the_ghost_of_a_failed_claim_is_gone_before_the_next_beat(redis_url: str, database_url: str) -> None:
    async with faulty(redis_url, database_url) as (house, postgres, idempotency):
        working = asyncio.create_task(idempotency.run())
        postgres.arm(1, "after")
        with pytest.raises(StoreUnavailable):
            await send(idempotency)
        await until(lambda: not idempotency.kept_count, 5)
        assert await send(idempotency) is None
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_what_is_kept_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.idempotency, "KEPT_MAX", 3)
    idempotency = Idempotency(house.postgres, house.redis, RULES)
    for number in range(5):
        idempotency._keep(Claim(ORG, bytes(32), f"r{number}"), None)
    assert [claim.request_id for claim in idempotency._kept] == ["r2", "r3", "r4"]


async def test_all_that_is_long_past_is_forgotten_however_much_it_is(
    house: House, idempotency: Idempotency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.idempotency, "TOGETHER", 100)
    await house.postgres.rows(
        "INSERT INTO gateway.idempotency (org_id, key_digest, body_digest, request_id, running_until, expires_at) "
        "SELECT 'acme', sha256(n::text::bytea), sha256(''), n, now() - interval '1 s', now() - interval '1 s' "
        "FROM generate_series(1, 350) AS n"
    )
    assert await send(idempotency) is None
    assert await died(house, "k2")
    assert await idempotency.forget() == 350
    assert await outcomes(house) == ["complete", None]

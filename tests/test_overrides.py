"""Overrides of limits, followed in a real PostgreSQL by gateways that hear of every change, of some, or of none."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import asyncpg
import msgspec
import pytest

from gateway import overrides
from gateway.errors import StoreRefused, StoreUnavailable
from gateway.ledger import migrate
from gateway.overrides import CHANNEL, Overrides
from gateway.stores import Postgres, Row
from tests.waiting import until
from tests.walk import raw

State: TypeAlias = dict[str, dict[str, int]]
SET = (
    "INSERT INTO gateway.limit_override (org_id, limit_name, value) VALUES ($1, $2, $3)"
    " ON CONFLICT (org_id, limit_name) DO UPDATE SET value = EXCLUDED.value"
)
#: What a listening connection said last: that it listens, or a probe.
LISTENERS = """
    SELECT pid FROM pg_stat_activity
     WHERE datname = current_database() AND (query LIKE 'LISTEN %' OR query = 'SELECT 1')
"""
#: A connection without the gateway's rules about who may do what: what a restored backup is like.
UNHEARD = "SET LOCAL session_replication_role = replica"


@pytest.fixture
async def postgres(database_url: str) -> AsyncIterator[Postgres]:
    postgres = Postgres(database_url, timeout_ms=10_000, pool_max=4)
    await postgres.open()
    await migrate(postgres)
    yield postgres
    await postgres.close()


@pytest.fixture
def no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is seen was announced, or read when listening began."""
    monkeypatch.setattr(overrides, "POLL_S", 3_600.0)


class Watched(Postgres):
    """Counts its statements, and lets a test stand between the server's answer and who asked."""

    statements = 0
    at_once = 0
    at_once_max = 0

    async def rows(self, sql: str, *args: Any, timeout_ms: int | None = None) -> list[Row]:
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            found = await super().rows(sql, *args, timeout_ms=timeout_ms)
            self.statements += 1
            await self.answered(found)
            return found
        finally:
            self.at_once -= 1

    async def answered(self, found: list[Row]) -> None:
        """Nobody stands there."""


@asynccontextmanager
async def following(
    url: str,
    *,
    listens: bool = True,
    entries_max: int = 1_000,
    store: type[Watched] = Watched,
    reads: bool = True,
) -> AsyncIterator[tuple[Overrides, Watched]]:
    """One gateway's overrides, wired as `app.py` does."""
    postgres = store(url, timeout_ms=2_000, pool_max=2)
    await postgres.open()
    followed = Overrides(postgres, entries_max=entries_max)
    if listens:
        listening = asyncio.Event()

        def on_connect() -> None:
            followed.refresh_all()
            listening.set()

        postgres.listen({CHANNEL: followed.on_notification}, on_connect)
        if reads:
            await listening.wait()
    task = asyncio.create_task(followed.run())
    try:
        if reads:
            await until(lambda: followed.known)
        yield followed, postgres
    finally:
        task.cancel()
        await asyncio.wait({task})
        await postgres.close()
        assert task.cancelled() or task.exception() is None


def state(followed: Overrides, orgs: list[str]) -> State:
    return {org_id: dict(followed.of(org_id)) for org_id in orgs if followed.of(org_id)}


async def until_has(followed: Overrides, orgs: list[str], expected: State) -> None:
    await until(lambda: state(followed, orgs) == expected)


async def stored(postgres: Postgres) -> State:
    found: State = {}
    for row in await postgres.rows("SELECT org_id, limit_name, value FROM gateway.limit_override"):
        found.setdefault(row["org_id"], {})[row["limit_name"]] = row["value"]
    return found


# What takes effect


@pytest.mark.usefixtures("no_poll")
async def test_every_way_to_change_an_override_takes_effect_in_every_gateway(
    postgres: Postgres, database_url: str
) -> None:
    table = "gateway.limit_override"
    steps: list[tuple[str, State]] = [
        (f"INSERT INTO {table} VALUES ('a', 'rpm', 5), ('a', 'tpm', 9), ('b', 'rpm', 7)",
         {"a": {"rpm": 5, "tpm": 9}, "b": {"rpm": 7}}),
        (f"UPDATE {table} SET value = 6 WHERE org_id = 'a' AND limit_name = 'rpm'",
         {"a": {"rpm": 6, "tpm": 9}, "b": {"rpm": 7}}),
        (f"INSERT INTO {table} VALUES ('b', 'rpm', 8), ('c', 'rpm', 1) ON CONFLICT (org_id, limit_name)"
         " DO UPDATE SET value = EXCLUDED.value", {"a": {"rpm": 6, "tpm": 9}, "b": {"rpm": 8}, "c": {"rpm": 1}}),
        (f"UPDATE {table} SET org_id = 'd' WHERE org_id = 'a'",
         {"d": {"rpm": 6, "tpm": 9}, "b": {"rpm": 8}, "c": {"rpm": 1}}),
        (f"DELETE FROM {table} WHERE limit_name = 'rpm'", {"d": {"tpm": 9}}),
        (f"DELETE FROM {table}", {}),
        (f"INSERT INTO {table} VALUES ('a', 'rpm', 5), ('b', 'rpm', 7)", {"a": {"rpm": 5}, "b": {"rpm": 7}}),
        (f"TRUNCATE {table}", {}),
    ]  # fmt: skip
    async with following(database_url) as (one, _), following(database_url) as (other, _):
        for sql, expected in steps:
            await postgres.rows(sql)
            for followed in (one, other):
                await until_has(followed, list("abcd"), expected)
                assert followed.count == sum(map(len, expected.values()))


async def test_the_many_orgs_without_overrides_share_a_mapping_that_nobody_can_fill(
    postgres: Postgres, database_url: str
) -> None:
    async with following(database_url) as (followed, _):
        assert followed.of("acme") is followed.of("nobody")
        with pytest.raises(TypeError):
            followed.of("nobody")["rpm"] = 1  # type: ignore[index]
        await postgres.rows(SET, "acme", "rpm", 5)
        await until(lambda: followed.of("acme"))
        # As it stands in the access log.
        assert msgspec.json.encode(followed.of("acme")) == b'{"rpm":5}'
        await postgres.rows("DELETE FROM gateway.limit_override")
        await until(lambda: followed.of("acme") is followed.of("nobody"))


@pytest.mark.usefixtures("no_poll")
async def test_what_is_not_committed_does_not_take_effect(postgres: Postgres, database_url: str) -> None:
    async with following(database_url) as (followed, _):
        with pytest.raises(StoreRefused):
            await postgres.transaction([(SET, ("a", "rpm", 5)), (SET, ("a", "rpm", 0))])
        await postgres.rows(SET, "b", "rpm", 7)
        await until(lambda: followed.of("b"))
        assert followed.of("a") == {}


async def test_a_gateway_that_hears_no_announcement_learns_of_changes_by_itself(
    postgres: Postgres, database_url: str
) -> None:
    """As behind a proxy that pools transactions."""
    assert overrides.POLL_S < 1
    async with following(database_url, listens=False) as (followed, _):
        await postgres.rows(SET, "acme", "rpm", 5)
        await until(lambda: followed.of("acme") == {"rpm": 5})
        await postgres.rows("DELETE FROM gateway.limit_override")
        await until(lambda: followed.of("acme") == {})


async def test_nothing_is_read_again_that_was_read_before(postgres: Postgres, database_url: str) -> None:
    """A poll asks for one row, however many overrides there are."""
    await postgres.rows(
        "INSERT INTO gateway.limit_override SELECT 'org' || n, 'rpm', n FROM generate_series(1, 50) AS n"
    )
    answers: list[int] = []

    class Counted(Watched):
        async def answered(self, found: list[Row]) -> None:
            answers.append(len(found))

    async with following(database_url, listens=False, store=Counted) as (followed, _):
        assert (followed.count, answers) == (50, [50])
        await until(lambda: len(answers) >= 2)
        await postgres.rows(SET, "org7", "tpm", 1)
        await until(lambda: len(followed.of("org7")) == 2)
        await until(lambda: answers[-2:] == [2, 1])
        assert answers[1:-2] == [1] * len(answers[1:-2])


async def listeners(postgres: Postgres, count: int) -> bool:
    return len(await postgres.rows(LISTENERS)) == count


# Announcements that are missed, servers that are away


@pytest.mark.usefixtures("no_poll")
async def test_a_change_during_a_gap_in_listening_is_found_when_listening_begins_again(
    postgres: Postgres, database_url: str
) -> None:
    change = f"""
        WITH ended AS (SELECT pg_terminate_backend(pid) FROM ({LISTENERS}) AS l),
        changed AS (
            INSERT INTO gateway.limit_override (org_id, limit_name, value) VALUES ('acme', 'rpm', $1)
            ON CONFLICT (org_id, limit_name) DO UPDATE SET value = EXCLUDED.value RETURNING value
        ) SELECT count(*) AS ended FROM ended, changed
    """
    async with following(database_url) as (one, _), following(database_url) as (other, _):
        for value in (5, 6, 7):
            row = await postgres.row(change, value)
            assert row is not None and row["ended"] == 2
            for followed in (one, other):
                await until_has(followed, ["acme"], {"acme": {"rpm": value}})
            await until(lambda: listeners(postgres, 2))


@pytest.mark.usefixtures("no_poll")
async def test_what_is_known_stays_while_postgres_is_away_and_is_renewed_when_it_is_back(
    postgres: Postgres, database_url: str
) -> None:
    await postgres.rows("INSERT INTO gateway.limit_override VALUES ('stays', 'rpm', 5), ('goes', 'rpm', 7)")
    async with raw.relay(database_url) as relay, following(relay.url) as (followed, store):
        await relay.close()
        await postgres.rows("DELETE FROM gateway.limit_override WHERE org_id = 'goes'")
        await postgres.rows(SET, "stays", "rpm", 6)
        followed.refresh_all()
        await until(lambda: store.trouble)
        assert state(followed, ["stays", "goes"]) == {"stays": {"rpm": 5}, "goes": {"rpm": 7}}
        assert followed.known and followed.trouble is None
        await relay.open()
        await until(lambda: state(followed, ["stays", "goes"]) == {"stays": {"rpm": 6}})


async def test_before_the_first_answer_nothing_is_known_and_that_is_said(postgres: Postgres, database_url: str) -> None:
    await postgres.rows(SET, "acme", "rpm", 5)
    async with raw.relay(database_url, is_open=False) as relay:
        async with following(relay.url, reads=False) as (followed, store):
            await until(lambda: store.trouble not in (None, "not asked yet"))
            assert (followed.of("acme"), followed.known) == ({}, False)
            assert "not read yet" in (followed.trouble or "")
            await relay.open()
            await until(lambda: followed.known)
            assert (dict(followed.of("acme")), followed.trouble) == ({"rpm": 5}, None)


async def test_overrides_are_read_when_the_schema_comes(empty_database_url: str) -> None:
    async with following(empty_database_url, reads=False) as (followed, store):
        await until(lambda: "UndefinedTable" in (store.trouble or ""))
        postgres = Postgres(empty_database_url, timeout_ms=10_000, pool_max=1)
        await postgres.open()
        await migrate(postgres)
        await postgres.rows(SET, "acme", "rpm", 5)
        await postgres.close()
        await until(lambda: followed.of("acme"))


async def test_a_database_that_was_put_back_to_an_earlier_state_is_read_from_the_beginning(
    postgres: Postgres, database_url: str
) -> None:
    await postgres.rows(SET, "kept", "rpm", 5)
    for value in (1, 2, 3):
        await postgres.rows(SET, "later", "rpm", value)
    async with following(database_url, listens=False) as (followed, _):
        await postgres.transaction(
            [
                (UNHEARD, ()),
                ("DELETE FROM gateway.limit_override WHERE org_id = 'later'", ()),
                ("DELETE FROM gateway.limit_override_change WHERE org_id = 'later'", ()),
                ("UPDATE gateway.limit_override SET value = 4", ()),
                ("UPDATE gateway.limit_override_version SET version = 2", ()),
            ]
        )
        await until(lambda: state(followed, ["kept", "later"]) == {"kept": {"rpm": 4}})
        await postgres.rows(SET, "later", "rpm", 9)
        await until(lambda: followed.of("later") == {"rpm": 9})


async def test_a_reading_of_everything_that_fails_is_begun_again(postgres: Postgres, database_url: str) -> None:
    class Failing(Watched):
        failures = 0

        async def answered(self, found: list[Row]) -> None:
            if self.failures:
                self.failures -= 1
                raise StoreUnavailable

    await postgres.rows(SET, "acme", "rpm", 5)
    async with following(database_url, listens=False, store=Failing) as (followed, store):
        assert isinstance(store, Failing)
        await postgres.transaction([(UNHEARD, ()), ("DELETE FROM gateway.limit_override", ())])
        store.failures = 2
        followed.refresh_all()
        await until(lambda: followed.of("acme") == {})
        assert store.failures == 0


# Order


async def test_a_change_that_is_committed_late_is_not_skipped(postgres: Postgres, database_url: str) -> None:
    """A later change waits for it, so nobody reads past it."""
    async with following(database_url) as (followed, _):
        slow: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(database_url)
        try:
            transaction = slow.transaction()
            await transaction.start()
            await slow.execute(SET, "slow", "rpm", 5)
            quick = asyncio.create_task(postgres.rows(SET, "quick", "rpm", 7))

            async def waits() -> bool:
                rows = await postgres.rows("SELECT 1 FROM pg_locks WHERE NOT granted")
                return bool(rows)

            await until(waits)
            await transaction.commit()
            await quick
        finally:
            await slow.close()
        await until(lambda: state(followed, ["slow", "quick"]) == {"slow": {"rpm": 5}, "quick": {"rpm": 7}})


@pytest.mark.usefixtures("no_poll")
async def test_an_answer_that_comes_late_does_not_overwrite_a_newer_one(postgres: Postgres, database_url: str) -> None:
    held, release = asyncio.Event(), asyncio.Event()

    class Late(Watched):
        async def answered(self, found: list[Row]) -> None:
            if any(row["value"] == 1 for row in found):
                held.set()
                await release.wait()

    async with following(database_url, listens=False, store=Late) as (followed, store):
        await postgres.rows(SET, "acme", "rpm", 1)
        followed.on_notification("acme")
        await held.wait()
        await postgres.rows(SET, "acme", "rpm", 2)
        followed.on_notification("acme")
        assert followed.of("acme") == {}
        release.set()
        await until(lambda: followed.of("acme") == {"rpm": 2})
        assert store.at_once_max == 1


@pytest.mark.usefixtures("no_poll")
async def test_many_orgs_of_one_statement_come_in_pages(
    postgres: Postgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "PAGE_ORGS", 7)
    orgs = [f"org{n}" for n in range(50)]
    expected = {org_id: {"rpm": n + 1, "tpm": n + 1} for n, org_id in enumerate(orgs)}
    every = "SELECT 'org' || n, name, n + 1 FROM generate_series(0, 49) AS n, unnest($1::text[]) AS name"
    async with following(database_url) as (one, _):
        await postgres.rows(f"INSERT INTO gateway.limit_override {every}", ["rpm", "tpm"])
        await until(lambda: state(one, orgs) == expected)
        async with following(database_url) as (other, store):
            assert state(other, orgs) == expected
            assert store.statements >= 8
            await postgres.rows("DELETE FROM gateway.limit_override")
            await until(lambda: state(one, orgs) == state(other, orgs) == {})


@pytest.mark.usefixtures("no_poll")
async def test_changes_between_two_pages_are_not_missed(
    postgres: Postgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "PAGE_ORGS", 2)
    await postgres.rows(
        "INSERT INTO gateway.limit_override SELECT o, 'rpm', 1 FROM unnest(ARRAY['a','b','c','d','e']) o"
    )
    meanwhile = [
        (SET, ("a", "rpm", 2)),
        ("DELETE FROM gateway.limit_override WHERE org_id IN ('b', 'e')", ()),
        (SET, ("0", "rpm", 3)),
    ]

    class Interrupted(Watched):
        async def answered(self, found: list[Row]) -> None:
            if self.statements == 1:
                await postgres.transaction(meanwhile)

    async with following(database_url, listens=False, store=Interrupted) as (followed, _):
        expected = {"0": {"rpm": 3}, "a": {"rpm": 2}, "c": {"rpm": 1}, "d": {"rpm": 1}}
        assert state(followed, list("0abcde")) == expected


async def test_after_any_mixture_of_changes_every_gateway_has_what_the_table_has(
    postgres: Postgres, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "PAGE_ORGS", 3)
    orgs, names = [f"o{n}" for n in range(12)], ("rpm", "tpm", "parallel")
    dice = random.Random(11)

    def statement() -> tuple[str, tuple[Any, ...]]:
        org, name, value = dice.choice(orgs), dice.choice(names), dice.randint(1, 9)
        return dice.choice(
            [
                (SET, (org, name, value)),
                (SET, (org, name, value)),
                ("DELETE FROM gateway.limit_override WHERE org_id = $1", (org,)),
                ("UPDATE gateway.limit_override SET value = $2 WHERE limit_name = $1", (name, value)),
                ("DELETE FROM gateway.limit_override WHERE value = $1", (value,)),
            ]
        )

    async def write() -> None:
        for _ in range(60):
            statements = [statement() for _ in range(dice.randint(1, 3))]
            if dice.random() < 0.1:
                statements.append((SET, ("o1", "rpm", 0)))
            with contextlib.suppress(StoreRefused):
                await postgres.transaction(statements)

    async with (
        following(database_url) as (one, _),
        following(database_url, listens=False) as (other, _),
    ):
        await asyncio.gather(write(), write(), write())
        expected = await stored(postgres)
        await until(lambda: state(one, orgs) == state(other, orgs) == expected)
        assert one.count == other.count == sum(map(len, expected.values()))


async def test_statements_that_touch_the_same_orgs_never_wait_for_each_other_in_a_circle(postgres: Postgres) -> None:
    orgs = [f"o{n}" for n in range(20)]
    for org_id in orgs:
        await postgres.rows(SET, org_id, "rpm", 1)
    forth = "UPDATE gateway.limit_override SET value = value + 1 WHERE org_id = ANY ($1)"

    async def change(of: list[str]) -> None:
        for _ in range(20):
            await postgres.rows(forth, of)
            for org_id in of[:3]:
                await postgres.rows(SET, org_id, "rpm", 1)

    await asyncio.gather(change(orgs), change(orgs[::-1]), change(orgs[5:]), change(orgs[::2]))
    assert postgres.trouble is None


# Bounds


async def test_overrides_beyond_the_bound_do_not_apply_and_that_is_said_until_there_is_room(
    postgres: Postgres, database_url: str
) -> None:
    both, orgs = {"rpm": 5, "tpm": 5}, list("abcd")
    for org_id in "abc":
        await postgres.rows("INSERT INTO gateway.limit_override VALUES ($1, 'rpm', 5), ($1, 'tpm', 5)", org_id)
    await postgres.rows(SET, "d", "rpm", 5)
    async with following(database_url, entries_max=5) as (followed, _):
        assert state(followed, orgs) == {"a": both, "b": both, "d": {"rpm": 5}}
        assert followed.count == 5
        assert "limits.overrides_max (5)" in (followed.trouble or "")
        # What takes no more room than before applies, and what was left out is not forgotten.
        await postgres.rows(SET, "a", "rpm", 6)
        await until(lambda: followed.of("a")["rpm"] == 6)
        assert followed.trouble is not None
        # What an org that is known changes to may not fit either: rather its policy than a value that is wrong.
        await postgres.rows(SET, "b", "parallel", 5)
        await until_has(followed, orgs, {"a": {"rpm": 6, "tpm": 5}, "c": both, "d": {"rpm": 5}})
        assert followed.trouble is not None
        await postgres.rows("DELETE FROM gateway.limit_override WHERE org_id = 'c' OR limit_name = 'tpm'")
        await until(lambda: followed.trouble is None)
        assert state(followed, orgs) == await stored(postgres)


async def test_the_database_takes_no_override_that_nobody_could_keep(postgres: Postgres) -> None:
    good = ("acme", "rpm", 1)
    for bad in (("a b", "rpm", 1), ("", "rpm", 1), ("x" * 129, "rpm", 1), ("acme", "a b", 1), ("acme", "x" * 33, 1),
                ("acme", "rpm", 0), ("acme", "rpm", -1), ("acme", "rpm", 10**12 + 1)):  # fmt: skip
        with pytest.raises(StoreRefused):
            await postgres.rows(SET, *bad)
    await postgres.rows(SET, *good)
    many = "INSERT INTO gateway.limit_override SELECT 'acme', 'limit' || n, 1 FROM generate_series($1::int, $2) n"
    await postgres.rows(many, 1, 63)
    for sql in (many, many + " ON CONFLICT (org_id, limit_name) DO UPDATE SET value = 2"):
        with pytest.raises(StoreRefused, match="more than 64"):
            await postgres.rows(sql, 65, 65)
    assert len((await stored(postgres))["acme"]) == 64


@pytest.mark.usefixtures("no_poll")
async def test_a_role_that_may_only_write_the_table_is_heard(postgres: Postgres, database_url: str) -> None:
    # Roles belong to the whole server.
    role = f"support_{uuid.uuid4().hex}"
    async with following(database_url) as (followed, _):
        await postgres.transaction(
            [
                (f"CREATE ROLE {role}", ()),
                (f"GRANT USAGE ON SCHEMA gateway TO {role}", ()),
                (f"GRANT SELECT, INSERT, UPDATE ON gateway.limit_override TO {role}", ()),
            ]
        )
        try:
            await postgres.transaction([(f"SET LOCAL ROLE {role}", ()), (SET, ("acme", "rpm", 5))])
            await until(lambda: followed.of("acme") == {"rpm": 5})
        finally:
            await postgres.rows(f"DROP OWNED BY {role}")
            await postgres.rows(f"DROP ROLE {role}")

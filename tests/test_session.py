"""Sessions: whose conversation it is, what is remembered of it, and for how long."""

import asyncio
import hashlib
import hmac
import json
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from gateway import keys, limits
from gateway.errors import BadRequest
from gateway.session import Named, Rules, Sessions
from gateway.stores import Redis, Script
from gateway.types import Facts, Principal, Session
from tests.waiting import until

ANN = Principal("acme", "pro", "ann", "key_1", "api_key")
EVE = Principal("globex", "pro", "eve", "key_2", "api_key")
HOUR_MS = 3_600_000
RULES = Rules(b"x-session-id", True, 24 * HOUR_MS, 720 * HOUR_MS, 10_000, None)
RECORD, INDEX = keys.session("acme", "talk"), keys.session_index("acme")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    scripts = [Script("session", limits.script_text("session"))]
    redis = Redis(redis_url, timeout_ms=1_000, connect_timeout_ms=1_000, scripts=scripts)
    redis.start()
    await redis.connected()
    yield redis
    await redis.close()


@pytest.fixture
def sessions(redis: Redis) -> Sessions:
    return Sessions(redis, RULES)


def facts(session_id: str | None = None) -> Facts:
    fields = () if session_id is None else ((b"x-session-id", session_id.encode("latin-1")),)
    return Facts("req1", "POST", "/chat", b"/chat?a=1", fields, "1.2.3.4", "1.2.3.4")


async def look_up(sessions: Sessions, principal: Principal = ANN, session_id: str = "talk") -> Session:
    named = Named(session_id, minted=False)
    return await sessions.attach(principal, named, sessions.begin(principal, named))


async def turn(
    sessions: Sessions, redis: Redis, session_id: str = "talk", tokens: int = 10, model: str = "m"
) -> Session:
    """A whole turn of ann's conversation: looked up, ended, written."""
    session = await look_up(sessions, ANN, session_id)
    sessions.remember(ANN, session, tokens, model)
    await redis.call("PING")  # behind it on the same connection
    return session


async def keys_of(redis: Redis) -> set[str]:
    return {key.decode() for key in await redis.call("KEYS", "*")}


def test_an_id_is_minted_when_the_client_names_none(sessions: Sessions) -> None:
    named = sessions.name(facts(), "0190aa")
    assert named == Named("ses_0190aa", minted=True)


def test_no_id_is_minted_when_that_is_off(redis: Redis) -> None:
    assert Sessions(redis, replace(RULES, mint=False)).name(facts(), "0190aa") is None


@pytest.mark.parametrize("given", ["", " ", "a b", "a" * 129, "é", "a\tb", "{x}", "../x", "a,b"])
def test_a_bad_id_is_refused_and_never_replaced(sessions: Sessions, given: str) -> None:
    with pytest.raises(BadRequest, match="x-session-id"):
        sessions.name(facts(given), "0190aa")


@pytest.mark.parametrize("given", ["a", "A-z_0.9:x", "a" * 128])
def test_a_good_id_is_taken_as_it_is(sessions: Sessions, given: str) -> None:
    assert sessions.name(facts(given), "0190aa") == Named(given, minted=False)


async def test_a_conversation_is_recognised_with_what_its_turns_left(sessions: Sessions, redis: Redis) -> None:
    first = await turn(sessions, redis, tokens=10, model="small")
    second = await turn(sessions, redis, tokens=5, model="large")
    third = await look_up(sessions)
    assert (first.turn, first.new, first.total_tokens, first.last_model) == (1, True, 0, None)
    assert (second.turn, second.new, second.total_tokens, second.last_model) == (2, False, 10, "small")
    assert (third.turn, third.new, third.total_tokens, third.last_model) == (3, False, 15, "large")
    assert third.created_ms == second.created_ms
    assert third.available


async def test_a_minted_session_is_new_without_asking_and_recognised_afterwards(
    sessions: Sessions, redis: Redis
) -> None:
    named = sessions.name(facts(), "0190aa")
    assert named is not None and sessions.begin(ANN, named) is None
    session = await sessions.attach(ANN, named, None)
    assert (session.session_id, session.turn, session.new, session.available) == ("ses_0190aa", 1, True, True)
    sessions.remember(ANN, session, 3, None)
    again = await look_up(sessions, ANN, "ses_0190aa")
    assert (again.turn, again.total_tokens, again.last_model) == (2, 3, None)


async def test_turns_at_once_never_lose_an_increment(sessions: Sessions, redis: Redis) -> None:
    started = await asyncio.gather(*(look_up(sessions) for _ in range(50)))
    for session in started:
        sessions.remember(ANN, session, 7, "m")
    found = await look_up(sessions)
    assert (found.turn, found.total_tokens) == (51, 350)


async def test_another_orgs_session_does_not_exist(sessions: Sessions, redis: Redis) -> None:
    await turn(sessions, redis)
    stranger = await look_up(sessions, EVE)
    assert (stranger.new, stranger.turn, stranger.total_tokens) == (True, 1, 0)
    sessions.remember(EVE, stranger, 1, "m")
    assert (await look_up(sessions)).turn == 2
    assert (await look_up(sessions, EVE)).turn == 2


@pytest.mark.parametrize(("org", "session_id"), [("a", "b:s:c"), ("a:s:b", "c"), ("a}:s:{b", "c")])
def test_no_org_and_id_make_the_key_of_another_pair(org: str, session_id: str) -> None:
    assert keys.session(org, session_id).startswith(keys.tag(org) + ":s:")
    assert len(keys.session(org, session_id)) == len(keys.session(org, "x"))


async def test_looking_up_writes_nothing(sessions: Sessions, redis: Redis) -> None:
    """A refused request looks up and never remembers: guessing ids costs no memory."""
    for number in range(20):
        await look_up(sessions, ANN, f"guess{number}")
    await redis.call("PING")
    assert await keys_of(redis) == set()


async def test_every_key_has_a_time_to_live(sessions: Sessions, redis: Redis) -> None:
    for number in range(3):
        await turn(sessions, redis, f"talk{number}")
    for key in await keys_of(redis):
        assert 0 < await redis.call("PTTL", key) <= RULES.ttl_ms, key


async def test_an_idle_session_ends_and_use_keeps_it_alive(sessions: Sessions, redis: Redis) -> None:
    await turn(sessions, redis)
    await redis.call("PEXPIRE", RECORD, HOUR_MS)
    await redis.call("HSET", RECORD, "seen", await _now(redis) - 23 * HOUR_MS)
    await look_up(sessions)
    assert await redis.call("PTTL", RECORD) > 23 * HOUR_MS  # a turn that takes long does not lose its session
    await redis.call("PEXPIRE", RECORD, 1)
    await until(lambda: _gone(redis))
    found = await look_up(sessions)
    assert (found.new, found.turn) == (True, 1)


async def _gone(redis: Redis) -> bool:
    return not await redis.call("EXISTS", RECORD)


async def test_a_session_ends_at_its_absolute_age_however_busy_it_is(sessions: Sessions, redis: Redis) -> None:
    await turn(sessions, redis)
    seconds, _ = await redis.call("TIME")
    now_ms = int(seconds) * 1000
    await redis.call("HSET", RECORD, "created", now_ms - RULES.absolute_ttl_ms + HOUR_MS, "turn", 900)
    last = await turn(sessions, redis)
    assert last.turn == 901
    assert await redis.call("PTTL", RECORD) <= HOUR_MS  # and not another day
    await redis.call("HSET", RECORD, "seen", now_ms - 23 * HOUR_MS)
    await look_up(sessions)
    assert await redis.call("PTTL", RECORD) <= HOUR_MS
    await redis.call("HSET", RECORD, "created", now_ms - RULES.absolute_ttl_ms - 1)
    assert (await turn(sessions, redis)).new
    assert (await look_up(sessions)).turn == 2  # a new conversation under the old name


async def test_an_org_keeps_so_many_sessions_and_the_longest_idle_one_makes_room(redis: Redis) -> None:
    sessions = Sessions(redis, replace(RULES, per_org_max=3))
    for number in range(3):
        await turn(sessions, redis, f"talk{number}")
        await redis.call("ZADD", INDEX, "XX", await _now(redis) - 1000 + number, keys.session("acme", f"talk{number}"))
    await turn(sessions, redis, "talk0")  # used again, so no longer the oldest
    await turn(sessions, redis, "talk3")
    assert [(await look_up(sessions, ANN, f"talk{number}")).new for number in range(4)] == [False, True, False, False]
    assert await redis.call("ZCARD", INDEX) == 3
    assert len(await keys_of(redis)) == 4


async def _now(redis: Redis) -> int:
    seconds, micros = await redis.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


async def test_a_session_that_is_only_looked_up_still_counts(redis: Redis) -> None:
    """One that no turn of has ended for a day must not live on outside the bound."""
    sessions = Sessions(redis, replace(RULES, per_org_max=2))
    await turn(sessions, redis)
    ago = await _now(redis) - RULES.ttl_ms - 1
    await redis.call("ZADD", INDEX, "XX", ago, RECORD)
    await redis.call("HSET", RECORD, "seen", ago)
    await look_up(sessions)
    for number in range(3):
        await turn(sessions, redis, f"talk{number}")
    await redis.call("PING")
    assert len(await keys_of(redis)) == 3  # two records and the index


async def test_a_record_is_small_whatever_the_answer_says(sessions: Sessions, redis: Redis) -> None:
    for _ in range(50):
        await turn(sessions, redis, tokens=2**40, model="😀" * 100_000)
    assert await redis.call("MEMORY", "USAGE", RECORD) < 2_048
    assert len((await look_up(sessions)).last_model or "") <= 128


async def test_without_redis_the_request_goes_on_and_says_so(sessions: Sessions, redis: Redis) -> None:
    await redis.close()
    session = await look_up(sessions)
    assert (session.available, session.turn, session.new) == (False, 1, True)
    assert (b"x-session-status", b"unavailable") in sessions.headers(session, ANN, facts())
    sessions.remember(ANN, session, 1, "m")  # nobody is told, nothing fails


async def test_a_connection_that_breaks_meanwhile_is_unavailable(sessions: Sessions, redis: Redis) -> None:
    named = Named("talk", minted=False)
    found = sessions.begin(ANN, named)
    await redis.close()
    assert not (await sessions.attach(ANN, named, found)).available


async def test_a_record_of_a_foreign_type_is_unavailable(sessions: Sessions, redis: Redis) -> None:
    await redis.call("SET", RECORD, "not ours")
    assert not (await look_up(sessions)).available


async def test_on_a_replica_sessions_are_read_and_writes_are_let_go(sessions: Sessions, redis: Redis) -> None:
    await turn(sessions, redis)
    await redis.call("CONFIG", "SET", "min-replicas-to-write", "1")  # refuses writes, as a replica does
    try:
        found = await look_up(sessions)
        assert (found.available, found.turn) == (True, 2)
        sessions.remember(ANN, found, 1, "m")
        assert await redis.call("PING") == b"PONG"  # neither refusal took another's reply
    finally:
        await redis.call("CONFIG", "SET", "min-replicas-to-write", "0")
    assert (await look_up(sessions)).turn == 2


async def test_a_server_without_the_script_is_given_it(sessions: Sessions, redis: Redis) -> None:
    await redis.call("SCRIPT", "FLUSH")
    await turn(sessions, redis)

    async def remembered() -> bool:
        return (await look_up(sessions)).turn == 2

    await until(remembered)


def test_the_context_says_who_and_where(redis: Redis) -> None:
    session = Session("talk", 3, False, 1_700_000_000_000, 42, "m")
    fields = dict(Sessions(redis, RULES).headers(session, ANN, facts()))
    assert fields[b"x-session-id"] == b"talk"
    assert (fields[b"x-session-turn"], fields[b"x-session-new"]) == (b"3", b"false")
    assert b"x-session-signature" not in fields and b"x-session-status" not in fields
    raw = fields[b"x-session-context"]
    context = json.loads(urlsafe_b64decode(raw + b"=" * (-len(raw) % 4)))
    assert context == {
        "v": 1, "session_id": "talk", "org_id": "acme", "user_id": "ann", "plan": "pro", "turn": 3, "new": False,
        "created_ms": 1_700_000_000_000, "total_tokens": 42, "last_model": "m",
    }  # fmt: skip
    assert len(raw) < 4096


def test_the_signature_covers_the_request_and_the_context(redis: Redis) -> None:
    session = Session("talk", 3, False, 1_700_000_000_000)
    fields = dict(Sessions(redis, replace(RULES, signing_key="secret")).headers(session, ANN, facts()))
    version, seconds, signature = fields[b"x-session-signature"].split(b";")
    stamp = seconds.removeprefix(b"t=")
    covered = b"|".join((stamp, b"POST", b"/chat?a=1", b"req1", b"acme", b"talk", fields[b"x-session-context"]))
    expected = hmac.new(b"secret", covered, hashlib.sha256).hexdigest().encode()
    assert version == b"v1" and signature == b"sig=" + expected


def test_the_clients_own_session_field_is_not_forwarded_as_sent(sessions: Sessions) -> None:
    assert b"x-session-id" in sessions.attached_names

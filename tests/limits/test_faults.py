"""What can go wrong under the scripts: keys of a foreign type, clocks, replies that are lost, memory that is full."""

import pytest
import redis

from gateway import keys
from gateway.admission import counter_keys
from gateway.types import Calendar, Demand
from tests.limits.conftest import CREDIT, ORG, Limiter, calendar, demand, gcra
from tests.limits.every import EVERY, WINDOW_MS, actuals, another, fill

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
ALL = tuple(EVERY.values())
COUNTERS = {name: counter_keys(ORG, [wanted])[0] for name, wanted in EVERY.items()}
#: The admission that is to fail is of r1.
MONEY = {
    "account": keys.account(ORG),
    "holds": keys.holds(ORG),
    "deadlines": keys.deadlines(ORG),
    "outbox": keys.outbox(ORG),
    "tombstone": keys.tombstone(ORG, "r1"),
}
A_DAY_MS = 86_400_000


def put_something_foreign(limiter: Limiter, key: str) -> None:
    limiter.server.delete(key)
    limiter.server.lpush(key, "not ours")


@BOTH_STORES
@pytest.mark.parametrize("key", [*COUNTERS.values(), *MONEY.values()], ids=[*COUNTERS, *MONEY])
@pytest.mark.parametrize("running", [False, True], ids=["new org", "busy org"])
def test_an_admission_over_a_key_of_a_foreign_type_fails_before_anything_is_written(
    limiter: Limiter, key: str, running: bool
) -> None:
    limiter.give_credits(10)
    if running:
        limiter.admit("other", *ALL, hold_ucredits=CREDIT)
    put_something_foreign(limiter, key)
    before = limiter.dump()
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        limiter.admit("r1", *ALL, hold_ucredits=CREDIT)
    assert limiter.dump() == before


@BOTH_STORES
@pytest.mark.parametrize("key", MONEY.values(), ids=MONEY)
def test_a_settle_over_a_key_of_a_foreign_type_fails_before_anything_is_written(limiter: Limiter, key: str) -> None:
    limiter.give_credits(10)
    limiter.admit("r1", *ALL, hold_ucredits=CREDIT)
    put_something_foreign(limiter, key)
    before = limiter.dump()
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        limiter.settle("r1", *actuals(ALL), charge_ucredits=CREDIT)
    assert limiter.dump() == before


@pytest.mark.parametrize("name", EVERY)
def test_a_counter_that_turned_foreign_meanwhile_costs_nobody_money(limiter: Limiter, name: str) -> None:
    """The charge is booked, once; what else was to be given back ends with its window or its lease."""
    limiter.give_credits(10)
    limiter.admit("r1", *ALL, hold_ucredits=CREDIT)
    put_something_foreign(limiter, COUNTERS[name])
    try:
        assert limiter.release_and_charge("r1", ALL) == "OK"
    except redis.ResponseError as exc:
        assert "WRONGTYPE" in str(exc)
    assert limiter.release_and_charge("r1", ALL) == "DUP"
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"h"], account[b"u"]) == (b"0", str(CREDIT).encode())
    assert limiter.server.xlen(keys.outbox(ORG)) == 1


@BOTH_STORES
@pytest.mark.parametrize("price", [0, CREDIT])
def test_a_server_without_memory_takes_nothing(limiter: Limiter, price: int) -> None:
    limiter.give_credits(10)
    limiter.admit("other", *ALL, hold_ucredits=price)
    before = limiter.dump()
    limiter.server.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            limiter.admit("r1", *ALL, hold_ucredits=price)
        assert limiter.admit("other", *ALL, hold_ucredits=price).status == "DUP"
    finally:
        limiter.server.config_set("maxmemory", 0)
    assert limiter.dump() == before


@BOTH_STORES
def test_every_key_but_an_account_that_owes_has_a_time_to_live(limiter: Limiter) -> None:
    limiter.admit("r1", *ALL)
    limiter.settle("r1", *actuals(ALL, 0.5))
    limiter.admit("r2", *ALL)
    assert [key for key in limiter.dump() if limiter.server.pttl(key) == -1] == []


# Clocks.


@pytest.mark.parametrize("name", [name for name in EVERY if name != "concurrent"])
@pytest.mark.parametrize("back_ms", [1, 1_000, 59_999])
@pytest.mark.parametrize("price", [0, CREDIT])
def test_a_clock_that_steps_back_a_little_is_waited_for(limiter: Limiter, name: str, back_ms: int, price: int) -> None:
    """Nothing that was refused fits for it, nothing that fits waits for longer than the step."""
    wanted = another(EVERY[name], 99)
    limiter.give_credits(10)
    limiter.admit("before", wanted, hold_ucredits=price)
    fill(limiter, EVERY[name])
    told_ms = limiter.admit("r1", another(EVERY[name], 98), hold_ucredits=price).retry_ms[0]
    before_ms = limiter.now_ms
    limiter.wait(-back_ms)
    verdict = limiter.admit("r2", another(EVERY[name], 98), hold_ucredits=price)
    assert (verdict.status, verdict.at_ms, verdict.retry_ms) == ("DENY", before_ms, (told_ms,))
    assert limiter.peek(another(EVERY[name], 98)).at_ms == before_ms
    limiter.set_clock(before_ms + told_ms)
    assert limiter.admit("r3", another(EVERY[name], 98), hold_ucredits=price).status == "OK"


@pytest.mark.parametrize("price", [0, CREDIT])
def test_every_admission_remembers_the_time(limiter: Limiter, price: int) -> None:
    limiter.give_credits(10)
    for number in range(2):
        limiter.wait(1_000)
        limiter.admit(f"r{number}", hold_ucredits=price)
    assert limiter.server.hget(keys.account(ORG), "l") == str(limiter.now_ms).encode()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "concurrent"])
@pytest.mark.parametrize("back_ms", [60_000, 3_600_000, 40 * A_DAY_MS])
def test_a_clock_that_steps_back_a_lot_never_locks_anybody_out(limiter: Limiter, name: str, back_ms: int) -> None:
    """What was counted in a time that has not come yet is forgotten: once, as after a step ahead, the limit may pass
    twice. Then it holds."""
    wanted = EVERY[name]
    if name == "calendar":  # a period that had begun is one that has not begun any more
        limiter.set_clock(limiter.now_ms // A_DAY_MS * A_DAY_MS)
    fill(limiter, wanted)
    limiter.wait(-back_ms)
    admitted = sum(limiter.admit(f"r{number}", another(wanted, 100 + number)).status == "OK" for number in range(9))
    assert admitted == 3
    told_ms = limiter.admit("late", another(wanted, 200)).retry_ms[0]
    assert 0 < told_ms <= (WINDOW_MS + 1_000 if name != "calendar" else 31 * A_DAY_MS)
    limiter.wait(told_ms)
    assert limiter.admit("on time", another(wanted, 201)).status == "OK"


@pytest.mark.parametrize("wanted", [demand(30, 3_600_000), demand(300, 3_600_000, 10, unit="tokens")])
def test_use_that_was_spread_over_a_window_is_forgotten_too(limiter: Limiter, wanted: Demand) -> None:
    """Its latest part lies in a time that has not come yet, and would not go before that has."""
    for number in range(30):
        limiter.admit(f"r{number}", wanted)
        limiter.wait(60_000)
    limiter.wait(-600_000)
    assert limiter.admit("after", wanted).used == (0,)


def test_a_release_after_a_step_back_leaves_no_debt_that_comes_due_later(limiter: Limiter) -> None:
    """A bucket that is a minute long goes on being filled for a minute; nothing is given back of an earlier one that
    it never got."""
    hour_ms = 3_600_000
    limiter.set_clock(limiter.now_ms // 60_000 * 60_000)
    limiter.admit("before", demand(1_000, hour_ms, 10, unit="tokens"))
    limiter.wait(60_000 + 59_000)
    wanted = demand(1_000, hour_ms, 400, unit="tokens")
    limiter.admit("newest", wanted)
    limiter.wait(-61_000)
    limiter.admit("r1", wanted)
    limiter.release("r1", wanted)
    used = [limiter.used(wanted)[0]]
    for _ in range(70):
        limiter.wait(60_000)
        used.append(limiter.used(wanted)[0])
    assert used == sorted(used, reverse=True) and used[-1] == 0


def test_a_step_back_into_the_same_period_of_a_calendar_forgets_nothing(limiter: Limiter) -> None:
    wanted = EVERY["calendar"]
    limiter.set_clock(limiter.now_ms // A_DAY_MS * A_DAY_MS + 7_200_000)
    fill(limiter, wanted)
    limiter.wait(-3_600_000)
    assert limiter.admit("r1", wanted).status == "DENY"


def test_without_an_account_to_remember_the_time_a_small_step_back_is_still_waited_for(limiter: Limiter) -> None:
    """As after a failover that lost it: the counters themselves know when they were written."""
    quota = calendar(3, Calendar("hour"), name="calendar")
    limiter.set_clock(limiter.now_ms // 3_600_000 * 3_600_000)
    spent = [demand(3, 1_000, name="log"), demand(3, 1_000, 3, unit="tokens", name="buckets")]
    spent += [gcra(3, 1_000, 3, 3, name="gcra"), quota]
    for number in range(3):
        limiter.admit(f"r{number}", spent[0])
    for wanted in spent[1:]:
        fill(limiter, wanted)
    limiter.server.delete(keys.account(ORG))
    limiter.wait(-5_000)
    verdict = limiter.peek(*spent)
    assert verdict.used == (3, 3, 3, 3)
    assert all(retry_ms > 0 for retry_ms in verdict.retry_ms)
    limiter.wait(max(verdict.retry_ms))
    assert limiter.peek(*spent).retry_ms == (0, 0, 0, 0)


@pytest.mark.parametrize("back_ms", [0, 20_000, 3_600_000])
def test_a_settle_after_a_step_back_never_takes_off_what_others_used(limiter: Limiter, back_ms: int) -> None:
    wanted = demand(300, WINDOW_MS, 100, unit="tokens", name="buckets")
    limiter.admit("r1", wanted)
    limiter.wait(-back_ms)
    limiter.admit("r2", wanted)
    limiter.release("r1", wanted)
    assert limiter.used(wanted) == (100,)


# Numbers.

MOST = 2**53 - 1


@BOTH_STORES
@pytest.mark.parametrize(
    "wanted",
    [
        demand(MOST, WINDOW_MS, MOST - 1, unit="tokens"),
        calendar(MOST, Calendar("month"), MOST - 1),
        gcra(1, 1, MOST, MOST - 1),
        gcra(1, 1_000, MOST // 1_000, MOST // 1_000 - 1),
    ],
    ids=["buckets", "calendar", "gcra", "gcra per second"],
)
def test_amounts_are_exact_to_the_last_digit_up_to_two_to_the_53rd(limiter: Limiter, wanted: Demand) -> None:
    one = Demand(wanted.limit, "", 1)
    assert limiter.admit("r1", wanted).used == (0,)
    assert limiter.admit("r2", one).used == (wanted.cost,)
    verdict = limiter.admit("r3", one)
    assert (verdict.status, verdict.used) == ("DENY", (wanted.cost + 1,))
    limiter.settle("r1", (wanted, wanted.cost - 1))
    assert limiter.admit("r4", one).used == (wanted.cost,)


def test_large_balances_keep_every_digit(limiter: Limiter) -> None:
    nearly_2_53 = 9_007_199_254_740_000
    limiter.server.hset(keys.account(ORG), mapping={"p": nearly_2_53, "v": 1, "u": 0, "h": 0})
    limiter.admit("r1", hold_ucredits=1)
    limiter.settle("r1", charge_ucredits=1)
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"p"], account[b"u"]) == (str(nearly_2_53).encode(), b"1")
    assert limiter.server.get(keys.mirror(ORG)) == b"9007199254"

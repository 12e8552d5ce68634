"""All or nothing, and any number of times with one effect."""

import itertools

import pytest
import redis

from gateway import keys
from gateway.types import Demand
from tests.limits.conftest import LEASE_MS, ORG, Limiter, demand

CREDIT = 1_000_000

FITS = (
    demand(5, 60_000, name="log"),
    demand(500, 60_000, name="buckets"),
    demand(1000, 60_000, 10, unit="tokens", name="tpm"),
    demand(3, 0, unit="concurrent", name="parallel"),
)


def give_credits(limiter: Limiter, credits: int) -> None:
    limiter.server.hset(keys.account(ORG), mapping={"p": credits * CREDIT, "v": 1, "u": 0, "h": 0})


@pytest.mark.parametrize("full", range(len(FITS)))
def test_a_denial_by_any_limit_changes_no_key(limiter: Limiter, full: int) -> None:
    give_credits(limiter, 10)
    assert limiter.admit("r1", *FITS, hold_ucredits=CREDIT).status == "OK"
    tight = [
        demand(1, d.window_ms, d.cost, unit=d.unit, name=d.name) if number == full else d
        for number, d in enumerate(FITS)
    ]
    limiter.admit("fill", tight[full])
    before = limiter.dump()
    for attempt in range(3):
        verdict = limiter.admit(f"denied{attempt}", *tight, hold_ucredits=CREDIT)
        assert verdict.status == "DENY"
        assert [retry > 0 for retry in verdict.retry_ms] == [number == full for number in range(len(FITS))]
    assert limiter.dump() == before


def test_a_refusal_for_money_changes_no_key(limiter: Limiter) -> None:
    give_credits(limiter, 1)
    limiter.admit("r1", *FITS, hold_ucredits=CREDIT)
    before = limiter.dump()
    assert limiter.admit("r2", *FITS, hold_ucredits=CREDIT).status == "INFLIGHT"
    assert limiter.admit("r3", *FITS, hold_ucredits=2 * CREDIT).status == "NOCREDIT"
    assert limiter.dump() == before


@pytest.mark.parametrize("chosen", [c for n in (1, 2, 4) for c in itertools.combinations(FITS, n)])
def test_admitting_and_releasing_leaves_only_tombstone_and_clock(limiter: Limiter, chosen: tuple[Demand, ...]) -> None:
    give_credits(limiter, 10)
    limiter.admit("r1", *chosen, hold_ucredits=CREDIT)
    limiter.settle("r1", limiter.now_ms, *((d, 0) for d in chosen))
    assert limiter.admit("r2", *chosen, hold_ucredits=CREDIT).used == (0,) * len(chosen)
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"h"], account[b"u"]) == (b"1000000", b"0")


def test_the_same_admission_twice_takes_once(limiter: Limiter) -> None:
    give_credits(limiter, 10)
    limiter.admit("r1", *FITS, hold_ucredits=CREDIT)
    before = limiter.dump()
    assert limiter.admit("r1", *FITS, hold_ucredits=CREDIT).status == "DUP"
    assert limiter.dump() == before


def test_an_admission_that_arrives_after_its_cancel_takes_nothing(limiter: Limiter) -> None:
    give_credits(limiter, 10)
    limiter.settle("r1", 0, *((d, 0) for d in FITS))
    before = limiter.dump()
    assert limiter.admit("r1", *FITS, hold_ucredits=CREDIT).status == "GONE"
    assert limiter.dump() == before


def test_settling_twice_charges_once(limiter: Limiter) -> None:
    give_credits(limiter, 10)
    limiter.admit("r1", *FITS, hold_ucredits=CREDIT)
    assert limiter.settle("r1", limiter.now_ms, *((d, d.cost) for d in FITS), charge_ucredits=CREDIT) == "OK"
    before = limiter.dump()
    assert limiter.settle("r1", limiter.now_ms, *((d, 0) for d in FITS), charge_ucredits=CREDIT) == "DUP"
    assert limiter.dump() == before
    assert limiter.server.xlen(keys.outbox(ORG)) == 1


def test_an_unknown_balance_is_a_miss_and_zero_is_not(limiter: Limiter) -> None:
    assert limiter.admit("r1", hold_ucredits=CREDIT).status == "MISS"
    give_credits(limiter, 0)
    assert limiter.admit("r1", hold_ucredits=CREDIT).status == "NOCREDIT"


def test_a_slot_whose_gateway_died_is_free_after_its_lease(limiter: Limiter) -> None:
    slot = demand(1, 0, unit="concurrent", name="parallel")
    assert limiter.admit("r1", slot).status == "OK"
    limiter.set_clock(limiter.now_ms + LEASE_MS - 1)
    assert limiter.admit("r2", slot).status == "DENY"
    limiter.set_clock(limiter.now_ms + 1)
    assert limiter.admit("r2", slot).status == "OK"


def test_every_counter_has_a_time_to_live(limiter: Limiter) -> None:
    limiter.admit("r1", *FITS)
    limiter.settle("r1", limiter.now_ms, *((d, d.cost) for d in FITS))
    immortal = [key for key in limiter.dump() if limiter.server.pttl(key) == -1]
    assert immortal == []


def test_a_key_of_a_foreign_type_fails_before_anything_is_written(limiter: Limiter) -> None:
    give_credits(limiter, 10)
    before_keys = limiter.dump()
    for key in ("{ai_credits:org_acme}:l:log:sliding_log:60000",):
        limiter.server.set(key, "not ours")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            limiter.admit("r1", *FITS, hold_ucredits=CREDIT)
        limiter.server.delete(key)
    assert limiter.dump() == before_keys


def test_a_clock_that_steps_back_does_not_reopen_the_window(limiter: Limiter) -> None:
    wanted = demand(2, 60_000)
    limiter.admit("r1", wanted)
    limiter.admit("r2", wanted)
    limiter.set_clock(limiter.now_ms - 30_000)
    assert limiter.admit("r3", wanted).status == "DENY"


def test_large_balances_keep_every_digit(limiter: Limiter) -> None:
    nearly_2_53 = 9_007_199_254_740_000
    limiter.server.hset(keys.account(ORG), mapping={"p": nearly_2_53, "v": 1, "u": 0, "h": 0})
    limiter.admit("r1", hold_ucredits=1)
    limiter.settle("r1", limiter.now_ms, charge_ucredits=1)
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"p"], account[b"u"]) == (str(nearly_2_53).encode(), b"1")
    assert limiter.server.get(keys.mirror(ORG)) == b"9007199254"[:10]

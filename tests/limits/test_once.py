"""Every script any number of times, in any order, with one effect."""

import itertools
from collections.abc import Callable

import pytest

from gateway import keys
from tests.limits.conftest import CREDIT, LEASE_MS, ORG, Limiter
from tests.limits.every import EVERY, actuals

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
ALL = tuple(EVERY.values())


def admit(limiter: Limiter) -> str:
    return limiter.admit("r1", *ALL, hold_ucredits=CREDIT).status


def settle(limiter: Limiter) -> str:
    return limiter.settle("r1", *actuals(ALL, 0.4), charge_ucredits=CREDIT)


def release(limiter: Limiter) -> str:
    return limiter.release("r1", *ALL)


def renew(limiter: Limiter) -> str:
    return limiter.renew("r1", *ALL, hold_ucredits=CREDIT)


def renew_without_credits(limiter: Limiter) -> str:
    return limiter.renew("r1", *ALL)


Step = Callable[[Limiter], str]
#: What was done, what comes once more or too late, and what it is told.
AGAIN: list[tuple[str, tuple[Step, ...], Step, str]] = [
    ("admitted twice", (admit,), admit, "DUP"),
    ("settled twice", (admit, settle), settle, "DUP"),
    ("released after its settle", (admit, settle), release, "DUP"),
    ("settled after its release", (admit, release), settle, "DUP"),
    ("admitted after its settle", (admit, settle), admit, "GONE"),
    ("admitted after its release", (admit, release), admit, "GONE"),
    ("admitted after a release that came first", (release,), admit, "GONE"),
    ("renewed after its settle", (admit, settle), renew, "GONE"),
    ("renewed after its release", (admit, release), renew, "GONE"),
    ("renewed without having been admitted", (), renew_without_credits, "OK"),
]


@BOTH_STORES
@pytest.mark.parametrize("later_ms", [0, 1, 7_000])
@pytest.mark.parametrize(("done", "again", "told"), [case[1:] for case in AGAIN], ids=[case[0] for case in AGAIN])
def test_what_comes_again_changes_no_key(
    limiter: Limiter, done: tuple[Step, ...], again: Step, told: str, later_ms: int
) -> None:
    limiter.give_credits(10)
    # Somebody else's request runs beside it: nothing of that may change either.
    limiter.admit("other", *ALL, hold_ucredits=CREDIT)
    for step in done:
        step(limiter)
        limiter.wait(later_ms)
    before = limiter.dump()
    for _ in range(3):
        assert again(limiter) == told
    assert limiter.dump() == before


def test_renewing_again_in_the_same_millisecond_changes_no_key(limiter: Limiter) -> None:
    limiter.give_credits(10)
    admit(limiter)
    limiter.wait(5_000)
    renew(limiter)
    before = limiter.dump()
    assert renew(limiter) == "OK"
    assert limiter.dump() == before


def test_a_hold_that_was_lost_is_written_once_however_often_it_is_renewed(limiter: Limiter) -> None:
    limiter.give_credits(10)
    assert renew(limiter) == "OK"
    before = limiter.dump()
    assert limiter.server.hgetall(keys.holds(ORG)) == {b"r1": b"%d:0" % CREDIT}
    assert limiter.server.hget(keys.account(ORG), "h") == b"%d" % CREDIT
    assert renew(limiter) == "OK"
    assert limiter.dump() == before


def test_an_admission_that_is_asked_again_is_told_when_it_was_admitted(limiter: Limiter) -> None:
    first = limiter.admit("r1", *ALL)
    limiter.wait(5_000)
    assert limiter.admit("r1", *ALL).at_ms == first.at_ms


@pytest.mark.parametrize("order", list(itertools.permutations(["settle", "sweep", "settle"])))
def test_a_lease_that_ran_out_and_a_settle_in_any_order_charge_once_and_give_back_once(
    limiter: Limiter, order: tuple[str, ...]
) -> None:
    tokens = EVERY["buckets"]
    limiter.give_credits(10)
    limiter.admit("r1", tokens, hold_ucredits=CREDIT)
    limiter.wait(LEASE_MS)
    for what in order:
        if what == "sweep":
            limiter.sweep("r1")
        else:
            limiter.settle("r1", (tokens, 40), charge_ucredits=CREDIT)
    assert limiter.used(tokens) == (40,)
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"h"], account[b"u"]) == (b"0", str(CREDIT).encode())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("later_ms", [0, 1, 999, 1_000, 20_000])
def test_a_refund_never_exceeds_what_was_taken(limiter: Limiter, name: str, part: float, later_ms: int) -> None:
    """What others used is as it was, however little this one did."""
    wanted = EVERY[name]
    limiter.admit("other", wanted)
    limiter.admit("r1", wanted)
    limiter.wait(later_ms)
    used = limiter.used(wanted)[0]
    for _ in range(2):
        limiter.settle("r1", (wanted, int(wanted.cost * part)))
    after = limiter.used(wanted)[0]
    taken = 1 if wanted.limit.kind == "concurrent" else wanted.cost
    assert used - taken <= after <= used + wanted.cost * 2
    # Where nothing leaks, what the other took is there in full.
    assert name == "gcra" or after >= (1 if name == "concurrent" else wanted.cost)

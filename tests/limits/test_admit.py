"""All or nothing."""

import itertools

import pytest

from gateway import keys
from gateway.admission import counter_keys
from gateway.types import Demand
from tests.limits.conftest import CREDIT, LEASE_MS, ORG, Limiter
from tests.limits.every import EVERY, WINDOW_MS, actuals, as_shadow, fill, subsets

BOTH_STORES = pytest.mark.parametrize("stores", ["embedded", "system"], indirect=True)
ALL = tuple(EVERY.values())
CREDITS = "credits"
WHOLE = (*EVERY, CREDITS)


def refuse_by(limiter: Limiter, name: str, chosen: tuple[str, ...]) -> tuple[str, int]:
    """An org in the middle of its day, of which one thing is used up. Returns how it is refused, and its price."""
    limiter.start_over()
    limiter.give_credits(5)
    limiter.admit("running", *ALL, hold_ucredits=CREDIT)
    if name == CREDITS:
        return ("NOCREDIT", 6 * CREDIT) if len(chosen) % 2 else ("INFLIGHT", 5 * CREDIT)
    fill(limiter, EVERY[name])
    return "DENY", CREDIT if CREDITS in chosen else 0


def assert_refused_without_a_trace(limiter: Limiter, name: str, chosen: tuple[str, ...]) -> None:
    status, price = refuse_by(limiter, name, chosen)
    demands = [EVERY[one] for one in chosen if one != CREDITS]
    # One session is new, or its limit would not be asked; the others are those that ran already.
    fresh = [keys_of_new_session(one) if one.member else one for one in demands]
    before = limiter.dump()
    verdict = limiter.admit("refused", *fresh, hold_ucredits=price)
    assert verdict.status == status
    assert [retry_ms > 0 for retry_ms in verdict.retry_ms] == [one.limit.name == name for one in demands]
    assert limiter.dump() == before


def keys_of_new_session(wanted: Demand) -> Demand:
    return Demand(wanted.limit, wanted.subject, wanted.cost, keys.digest("new"))


@pytest.mark.parametrize("name", WHOLE)
def test_a_refusal_by_any_one_of_any_set_changes_no_key(limiter: Limiter, name: str) -> None:
    for chosen in subsets(WHOLE):
        if name in chosen:
            assert_refused_without_a_trace(limiter, name, chosen)


@BOTH_STORES
@pytest.mark.parametrize("name", WHOLE)
def test_a_refusal_by_any_one_of_them_all_changes_no_key(limiter: Limiter, name: str) -> None:
    assert_refused_without_a_trace(limiter, name, WHOLE)


@BOTH_STORES
def test_a_set_that_fits_is_taken_whole_and_given_back_whole(limiter: Limiter) -> None:
    """Given back, it leaves what it found: but for the session, on whose place another request may run by now."""
    for chosen in subsets(EVERY):
        limiter.start_over()
        limiter.give_credits(5)
        demands = [EVERY[name] for name in chosen]
        taken = tuple(1 if one.member else one.cost for one in demands)
        assert limiter.admit("r1", *demands, hold_ucredits=CREDIT).status == "OK"
        assert limiter.used(*demands) == taken
        assert limiter.release("r1", *demands) == "OK"
        assert limiter.used(*demands) == tuple(1 if one.member else 0 for one in demands)
        account = limiter.server.hgetall(keys.account(ORG))
        assert (account[b"h"], account[b"u"]) == (b"0", b"0")
        assert limiter.server.exists(keys.holds(ORG), keys.deadlines(ORG)) == 0


def test_of_a_session_that_is_known_nothing_is_taken_and_it_is_never_refused(limiter: Limiter) -> None:
    wanted = EVERY["sessions"]
    limiter.admit("r1", wanted)
    fill(limiter, wanted)
    limiter.wait(5)
    before = limiter.server.dump(f"{{ai_credits:org_{ORG}}}:l:sessions:sliding_sessions:60000")
    assert limiter.admit("r2", wanted).status == "OK"
    assert limiter.server.dump(f"{{ai_credits:org_{ORG}}}:l:sessions:sliding_sessions:60000") == before
    # One that has a record was counted long ago.
    remembered = keys_of_new_session(wanted)
    assert limiter.admit("r3", remembered).status == "DENY"
    limiter.server.hset(keys.session_record(ORG, remembered.member), "turn", 1)
    assert limiter.admit("r4", remembered).status == "OK"


def test_a_session_counts_anew_one_window_after_it_was_first_seen(limiter: Limiter) -> None:
    wanted = EVERY["sessions"]

    def counted() -> tuple[int, int]:
        """Before it asked and after."""
        before = limiter.used(wanted)[0]
        assert limiter.admit(f"r{limiter.now_ms}", wanted).status == "OK"
        return before, limiter.used(wanted)[0]

    assert counted() == (0, 1)
    limiter.wait(WINDOW_MS - 1)
    assert counted() == (1, 1)
    limiter.wait(1)
    assert counted() == (0, 1)
    limiter.wait(-3_600_000)  # that was in a time that has not come yet
    assert counted() == (0, 1)


def test_sessions_that_left_the_window_leave_the_server(limiter: Limiter) -> None:
    wanted = EVERY["sessions"]
    fill(limiter, wanted)
    limiter.wait(WINDOW_MS)
    limiter.admit("r1", wanted)
    assert limiter.server.zcard(counter_keys(ORG, [wanted])[0]) == 1


@pytest.mark.parametrize("price", [0, CREDIT])
@pytest.mark.parametrize("shadow", EVERY)
def test_a_shadow_that_does_not_fit_refuses_nobody_and_takes_nothing(limiter: Limiter, shadow: str, price: int) -> None:
    limiter.give_credits(5)
    others = [one for name, one in EVERY.items() if name != shadow]
    wanted = as_shadow(EVERY[shadow])
    wanted = keys_of_new_session(wanted) if wanted.member else wanted
    fill(limiter, EVERY[shadow])
    used = limiter.used(wanted)
    verdict = limiter.admit("r1", *others, wanted, hold_ucredits=price)
    assert verdict.status == "OK"
    assert [retry_ms > 0 for retry_ms in verdict.retry_ms] == [False] * len(others) + [True]
    assert limiter.used(wanted) == used
    # Admission settles what was taken, and nothing is taken off the shadow that never counted it.
    assert limiter.release("r1", *others) == "OK"
    assert limiter.used(wanted) == used


@pytest.mark.parametrize("shadow", EVERY)
def test_a_shadow_that_fits_is_taken_and_settled_like_any_other(limiter: Limiter, shadow: str) -> None:
    real = EVERY[shadow]
    wanted = as_shadow(real)
    assert limiter.admit("r1", wanted).status == "OK"
    assert limiter.used(wanted) == limiter.used(real) == (1 if real.member else real.cost,)
    assert limiter.settle("r1", (wanted, 40 if shadow == "buckets" else 0)) == "OK"
    assert limiter.used(wanted) == ({"buckets": 40, "sessions": 1}.get(shadow, 0),)


@pytest.mark.parametrize(("enforced", "shadow"), list(itertools.permutations(EVERY, 2)))
def test_a_refusal_takes_no_shadow_either(limiter: Limiter, enforced: str, shadow: str) -> None:
    fill(limiter, EVERY[enforced])
    wanted = EVERY[enforced]
    before = limiter.dump()
    wanted = keys_of_new_session(wanted) if wanted.member else wanted
    assert limiter.admit("r1", wanted, as_shadow(EVERY[shadow])).status == "DENY"
    assert limiter.dump() == before


def test_an_unknown_balance_is_a_miss_and_zero_is_not(limiter: Limiter) -> None:
    before = limiter.dump()
    assert limiter.admit("r1", *ALL, hold_ucredits=CREDIT).status == "MISS"
    assert limiter.dump() == before
    limiter.give_credits(0)
    assert limiter.admit("r1", hold_ucredits=CREDIT).status == "NOCREDIT"


def test_the_last_credit_can_be_held_and_no_more(limiter: Limiter) -> None:
    limiter.give_credits(1)
    assert limiter.admit("r1", hold_ucredits=CREDIT + 1).status == "NOCREDIT"
    assert limiter.admit("r2", hold_ucredits=CREDIT).status == "OK"
    assert limiter.admit("r3", hold_ucredits=1).status == "INFLIGHT"


def test_a_full_outbox_takes_no_more_and_changes_no_key(limiter: Limiter) -> None:
    limiter.give_credits(5)
    for number in range(1000):
        limiter.server.xadd(keys.outbox(ORG), {"r": f"x{number}", "d": 0})
    before = limiter.dump()
    assert limiter.admit("r1", *ALL, hold_ucredits=CREDIT).status == "FULL"
    assert limiter.dump() == before


def test_a_slot_whose_gateway_died_is_free_after_its_lease(limiter: Limiter) -> None:
    slot = EVERY["concurrent"]
    fill(limiter, slot)
    limiter.wait(LEASE_MS - 1)
    assert limiter.admit("r2", slot).status == "DENY"
    limiter.wait(1)
    assert limiter.admit("r2", slot).status == "OK"


def test_a_slot_that_is_renewed_outlives_its_lease_and_those_beside_it(limiter: Limiter) -> None:
    slot = EVERY["concurrent"]
    limiter.admit("alive", slot)
    limiter.admit("dead", slot)
    for _ in range(5):
        limiter.wait(LEASE_MS - 1)
        limiter.renew("alive", slot)
    assert limiter.used(slot) == (1,)
    # The lease that ran out is swept by whoever takes the next place, and cannot be renewed behind its back.
    limiter.admit("next", slot)
    limiter.renew("dead", slot)
    assert limiter.used(slot) == (2,)


def test_requests_of_one_millisecond_count_one_by_one(limiter: Limiter) -> None:
    log = EVERY["log"]
    for number in range(3):
        assert limiter.admit(f"r{number}", log).used == (number,)
    limiter.release("r1", log)
    assert limiter.used(log) == (2,)


def test_what_an_org_used_never_shows_in_anothers_keys(limiter: Limiter) -> None:
    limiter.give_credits(5)
    limiter.admit("r1", *ALL, hold_ucredits=CREDIT)
    limiter.settle("r1", *actuals(ALL), charge_ucredits=CREDIT)
    names = [key.decode() for key in limiter.dump()]
    assert all(name.startswith(keys.tag(ORG)) or name == keys.mirror(ORG) for name in names)

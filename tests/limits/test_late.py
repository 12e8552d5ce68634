"""Replies that are lost, requests that take long, and limits that change meanwhile: what is given back, and where."""

import struct

import pytest

from gateway import keys
from gateway.admission import counter_keys
from gateway.types import Calendar, Demand, Limit
from tests.limits.conftest import CREDIT, LEASE_MS, ORG, Limiter, demand, session
from tests.limits.every import EVERY, WINDOW_MS

ALL = tuple(EVERY.values())
A_DAY_MS = 86_400_000


@pytest.mark.parametrize("later_ms", [0, 1, 999, 1_000, 30_000, 60_999])
def test_an_admission_whose_reply_was_lost_gives_its_estimate_back_to_the_bucket_it_was_taken_from(
    limiter: Limiter, later_ms: int
) -> None:
    """Nobody but the server knows when it was: the tombstone says so."""
    wanted = demand(1_000, WINDOW_MS, 400, unit="tokens", name="tpm")
    limiter.admit("earlier", demand(1_000, WINDOW_MS, 100, unit="tokens", name="tpm"))
    limiter.wait(1_500)
    limiter.admit("lost", wanted)
    limiter.wait(later_ms)
    limiter.admit("later", demand(1_000, WINDOW_MS, 10, unit="tokens", name="tpm"))
    limiter.release("lost", wanted)
    earlier = 100 if later_ms < 58_500 else 0
    assert limiter.used(wanted) == (10 + earlier,)


def test_an_estimate_whose_bucket_has_left_is_not_taken_off_another(limiter: Limiter) -> None:
    wanted = demand(1_000, WINDOW_MS, 400, unit="tokens", name="tpm")
    limiter.admit("r1", wanted)
    limiter.wait(WINDOW_MS + 1_000)
    limiter.admit("r2", wanted)
    limiter.release("r1", wanted)
    assert limiter.used(wanted) == (400,)


@pytest.mark.parametrize("actual", [0, 15, 400, 900])
def test_the_rest_of_an_estimate_leaves_with_its_own_bucket_and_what_was_more_with_the_settles(
    limiter: Limiter, actual: int
) -> None:
    wanted = demand(1_000, WINDOW_MS, 400, unit="tokens", name="tpm")
    limiter.set_clock(limiter.now_ms // WINDOW_MS * WINDOW_MS)
    limiter.admit("r1", wanted)
    limiter.wait(30_000)
    limiter.settle("r1", (wanted, actual))
    assert limiter.used(wanted) == (actual,)
    limiter.wait(30_998)
    assert limiter.used(wanted) == (actual,)
    limiter.wait(1)
    assert limiter.used(wanted) == (max(0, actual - 400),)
    limiter.wait(30_000)
    assert limiter.used(wanted) == (0,)


def test_of_the_exact_log_that_entry_is_given_back_which_was_taken(limiter: Limiter) -> None:
    """Also where the bytes of two others, read across their border, look like it."""
    times_ms = [int(struct.unpack(">d", bytes.fromhex(text))[0]) for text in ("427a2fff427a3000", "427a300000000000")]
    times_ms.append(int(struct.unpack(">d", bytes.fromhex("427a3000427a3000"))[0]))
    wanted = demand(5, 3_600_000, name="log")
    limiter.start_over(times_ms[0])
    for at_ms in times_ms:
        limiter.set_clock(at_ms)
        limiter.admit(f"r{at_ms}", wanted)
    limiter.release(f"r{times_ms[2]}", wanted)
    assert limiter.server.get(counter_keys(ORG, [wanted])[0]) == struct.pack(">dd", *times_ms[:2])


@pytest.mark.parametrize("part", [0.0, 0.5])
def test_of_counters_that_are_gone_nothing_is_given_back_and_the_slot_beside_them_is(
    limiter: Limiter, part: float
) -> None:
    limiter.admit("r1", *ALL)
    limiter.server.delete(*counter_keys(ORG, [one for name, one in EVERY.items() if name != "concurrent"]))
    assert limiter.settle("r1", *((one, int(one.cost * part)) for one in ALL)) == "OK"
    assert limiter.used(*ALL) == (0,) * len(ALL)


def test_an_exact_log_of_which_all_is_given_back_is_no_key_any_more(limiter: Limiter) -> None:
    wanted = demand(5, 3_600_000, name="log")
    limiter.admit("r1", wanted)
    limiter.release("r1", wanted)
    assert limiter.server.exists(counter_keys(ORG, [wanted])[0]) == 0


def test_a_request_that_is_renewed_gives_back_its_estimate_however_long_it_took(limiter: Limiter) -> None:
    """The tombstone that knows when it was admitted lasts as long as it runs."""
    wanted = demand(1_000, A_DAY_MS, 400, unit="tokens", name="tpd")
    slot = EVERY["concurrent"]
    limiter.admit("r1", wanted, slot)
    tombstone = keys.tombstone(ORG, "r1")
    limiter.server.expire(tombstone, 5)  # as after 895 s
    assert limiter.renew("r1", wanted, slot) == "OK"
    assert limiter.server.ttl(tombstone) > 890
    limiter.wait(3_600_000)
    limiter.release("r1", wanted, slot)
    assert limiter.used(wanted, slot) == (0, 0)


def test_a_settle_whose_tombstone_is_gone_still_charges_and_leaves_limits_alone(limiter: Limiter) -> None:
    """Nobody knows any more when it was admitted, so nothing can be given back to the right place."""
    limiter.give_credits(10)
    limiter.admit("r1", *ALL, hold_ucredits=CREDIT)
    used = limiter.used(*ALL)
    limiter.server.delete(keys.tombstone(ORG, "r1"))
    assert limiter.settle("r1", *((one, 0) for one in ALL), charge_ucredits=CREDIT) == "OK"
    assert limiter.used(*ALL) == used
    account = limiter.server.hgetall(keys.account(ORG))
    assert (account[b"h"], account[b"u"]) == (b"0", str(CREDIT).encode())


def test_renewing_never_brings_the_tombstone_of_an_ended_request_back(limiter: Limiter) -> None:
    wanted = EVERY["concurrent"]
    limiter.admit("r1", wanted)
    limiter.release("r1", wanted)
    limiter.server.expire(keys.tombstone(ORG, "r1"), 5)
    limiter.renew("r1", wanted)
    assert limiter.server.ttl(keys.tombstone(ORG, "r1")) <= 5


def test_a_hold_is_swept_when_its_lease_is_over_and_not_before_and_later_if_it_is_renewed(limiter: Limiter) -> None:
    limiter.give_credits(10)
    limiter.admit("r1", hold_ucredits=CREDIT)
    limiter.wait(LEASE_MS - 1)
    assert limiter.sweep("r1") == "ALIVE"
    assert limiter.renew("r1", hold_ucredits=CREDIT) == "OK"
    limiter.wait(LEASE_MS - 1)
    assert limiter.sweep("r1") == "ALIVE"
    limiter.wait(1)
    assert limiter.sweep("r1") == "OK"


def test_a_swept_request_that_wakes_up_gives_back_its_estimate_to_the_right_bucket(limiter: Limiter) -> None:
    wanted = demand(1_000, WINDOW_MS, 400, unit="tokens", name="tpm")
    limiter.give_credits(10)
    limiter.admit("r1", wanted, hold_ucredits=CREDIT)
    limiter.wait(LEASE_MS)
    assert limiter.sweep("r1") == "OK"
    limiter.admit("r2", wanted)
    assert limiter.settle("r1", (wanted, 100), charge_ucredits=CREDIT) == "OK"
    assert limiter.used(wanted) == (500,)


def test_a_limit_whose_window_changed_counts_anew_and_meets_nothing_it_cannot_read(limiter: Limiter) -> None:
    changed = [
        Limit("one", "sliding", "requests", "org", 3, 60_000),
        Limit("one", "sliding", "requests", "org", 300, 60_000),
        Limit("one", "sliding", "tokens", "org", 3, 61_000),
        Limit("one", "gcra", "tokens", "org", 3, 60_000, 3),
        Limit("one", "calendar", "tokens", "org", 3, A_DAY_MS, calendar=Calendar("day")),
        Limit("one", "calendar", "tokens", "org", 3, A_DAY_MS, calendar=Calendar("day", "Asia/Tokyo")),
        Limit("one", "concurrent", "concurrent", "org", 3, LEASE_MS),
        session(3, 60_000, "s", name="one").limit,
    ]
    for number, limit in enumerate(changed):
        member = keys.digest("s") if limit.unit == "sessions" else ""
        assert limiter.admit(f"r{number}", Demand(limit, "", 1, member)).used == (0,)

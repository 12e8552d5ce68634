"""What scripts do to an org's keys in Redis: (state, arguments) -> (state, reply). Nothing is a gateway's."""

from tests.protocol.redis_state import (
    ADMITTED,
    ORPHAN,
    ORPHANED,
    SETTLE,
    SETTLED,
    Account,
    Admitted,
    Applied,
    Entry,
    Held,
    Lowered,
    Redis,
    Renewed,
    Row,
    Told,
    Tomb,
    Waiting,
    put,
)
from tests.protocol.rules import PROTOCOL, Rules


def ours(redis: Redis, rules: Rules = PROTOCOL) -> bool:
    """The account is there, and was built on this server."""
    account = redis.account
    return account is not None and (rules.no_incarnation or account.server == redis.incarnation)


def _birth(redis: Redis, rules: Rules) -> int:
    account = redis.account
    return account.birth if account is not None and ours(redis, rules) else 0


def admit(
    redis: Redis, request: int, want: int, least: int, owed: int, capped: int, rules: Rules = PROTOCOL
) -> tuple[Redis, Admitted]:
    tomb, account = redis.tombs[request], redis.account
    epoch, birth = (account.epoch, account.birth) if account else (0, 0)
    if tomb is not None:
        hold = redis.holds[request]
        status = "DUP" if tomb.verdict == ADMITTED else "GONE"
        return redis, Admitted(status, hold.amount if hold else 0, epoch, 0, birth)
    if account is None:
        return redis, Admitted("MISS", 0, 0, 0, 0)
    if not ours(redis, rules):
        return redis, Admitted("LOST", 0, epoch, 0, birth)
    granted = min(want, account.available)
    if granted < least:
        status = "NOCREDIT" if account.posted - account.unposted < least else "INFLIGHT"
        return redis, Admitted(status, 0, epoch, account.unposted, birth)
    room = account.cap - account.unposted - account.held
    if capped and granted > room and not rules.cap_not_checked:
        if capped == 1:
            return redis, Admitted("CAP", 0, epoch, account.unposted + account.held + granted, birth)
        if room < least:
            return redis, Admitted("INFLIGHT", 0, epoch, 0, birth)
        granted = room
    if rules.hold_counts_as_spent:
        account = account._replace(unposted=account.unposted + granted)
    else:
        account = account._replace(held=account.held + granted)
    return redis._replace(
        account=account,
        holds=put(redis.holds, request, Held(granted, min(owed, granted))),
        tombs=redis.tombs if rules.no_tombstone else put(redis.tombs, request, Tomb(ADMITTED)),
    ), Admitted("OK", granted, epoch, 0, birth)


def extend(
    redis: Redis, request: int, more: int, used: int, capped: int, rules: Rules = PROTOCOL
) -> tuple[Redis, Admitted]:
    account, hold = redis.account, redis.holds[request]
    if account is None:
        return redis, Admitted("MISS", 0, 0, 0, 0)
    epoch, birth = account.epoch, account.birth
    if not ours(redis, rules):
        return redis, Admitted("LOST", 0, epoch, 0, birth)
    if hold is None:
        return redis, Admitted("GONE", 0, epoch, 0, birth)
    granted = min(more, account.available)
    room = account.cap - account.unposted - account.held
    if granted > 0 and capped and granted > room and not rules.extends_past_cap:
        if capped == 1:
            return redis, Admitted("CAP", 0, epoch, account.unposted + account.held + granted, birth)
        granted = room
    if granted <= 0:
        return redis, Admitted("REFUSED", 0, epoch, account.unposted, birth)
    amount = hold.amount + granted
    return redis._replace(
        account=account._replace(held=account.held + granted),
        holds=put(redis.holds, request, Held(amount, max(hold.used, min(amount, used)))),
    ), Admitted("OK", granted, epoch, 0, birth)


def _drop(redis: Redis, request: int) -> tuple[Redis, int]:
    """The hold is gone; and what the org still holds."""
    hold, account = redis.holds[request], redis.account
    held = account.held if account else 0
    if hold is None:
        return redis, held
    return redis._replace(holds=put(redis.holds, request, None)), max(0, held - hold.amount)


def settle(redis: Redis, request: int, charge: int, rules: Rules = PROTOCOL) -> tuple[Redis, Told]:
    tomb, account, birth = redis.tombs[request], redis.account, _birth(redis, rules)
    if tomb is not None and tomb.verdict == SETTLED:
        return redis, Told("DUP", birth, None)
    swept = tomb.charge if tomb is not None and tomb.verdict == ORPHANED else None
    if charge > 0 and account is None:
        return redis, Told("MISS", 0, None)
    redis, held = _drop(redis, request)
    entry, delta = None, 0
    if charge > 0 or swept is not None:
        delta = max(0, charge - (swept or 0))
        entry = Entry(request, SETTLE, charge, delta, redis.life, account.version if account else -1)
        redis = redis._replace(outbox=(*redis.outbox, entry))
    if account is not None:
        redis = redis._replace(account=account._replace(unposted=account.unposted + delta, held=held))
    if not rules.no_tombstone:
        redis = redis._replace(tombs=put(redis.tombs, request, Tomb(SETTLED, charge)))
    return redis, Told("OK", birth, entry)


def renew(redis: Redis, request: int, amount: int, used: int, rules: Rules = PROTOCOL) -> tuple[Redis, Renewed]:
    tomb, account, hold = redis.tombs[request], redis.account, redis.holds[request]
    epoch, birth = account.epoch if account else 0, _birth(redis, rules)
    owed = account.unposted + account.held if account else 0
    if hold is None and tomb is not None and tomb.verdict != ADMITTED:
        return redis, Renewed("GONE", epoch, owed, birth)
    if hold is None and account is None:
        return redis, Renewed("MISS", 0, 0, 0)
    more = amount
    if hold is not None:
        more = 0 if rules.renew_grows_nothing else max(0, amount - hold.amount)
        amount, used = hold.amount + more, max(hold.used, min(hold.amount + more, used))
    redis = redis._replace(holds=put(redis.holds, request, Held(amount, min(amount, used))))
    if account is not None:
        redis = redis._replace(account=account._replace(held=account.held + more))
    if tomb is None and hold is None and not rules.no_tombstone:
        redis = redis._replace(tombs=put(redis.tombs, request, Tomb(ADMITTED)))
    return redis, Renewed("OK", epoch, owed + more, birth)


def orphan(redis: Redis, request: int, rules: Rules = PROTOCOL) -> tuple[Redis, str]:
    """The lease is over, as far as the server's clock can tell."""
    hold, tomb, account = redis.holds[request], redis.tombs[request], redis.account
    if hold is None or (tomb is not None and tomb.verdict != ADMITTED):
        return redis, "DUP"
    redis, held = _drop(redis, request)
    redis = redis._replace(tombs=put(redis.tombs, request, Tomb(ORPHANED, hold.used)))
    if hold.used:
        version = account.version if account else -1
        entry = Entry(request, ORPHAN, hold.used, hold.used, redis.life, version)
        redis = redis._replace(outbox=(*redis.outbox, entry))
    if account is not None:
        redis = redis._replace(account=account._replace(unposted=account.unposted + hold.used, held=held))
    return redis, "OK"


def install(
    redis: Redis,
    posted: int,
    version: int,
    set_aside: int,
    cap: int,
    epoch: int,
    birth: int,
    rules: Rules = PROTOCOL,
) -> tuple[Redis, str]:
    row, account = Row(posted, version, set_aside, cap, epoch, birth), redis.account
    if account is not None and ours(redis, rules):
        newer = _newer(account, row, rules)
        if rules.delete_on_invalidate and newer is not account:
            newer = newer._replace(unposted=0, held=0)
        return redis._replace(account=newer), "OK"
    # What is owed is counted from the keys themselves; nothing may be spent until PostgreSQL gives a cap to this hash.
    unposted = sum(entry.delta for entry in redis.outbox)
    held = sum(hold.amount for hold in redis.holds if hold)
    old = account or Account(0, -1, 0, 0, 0, 0, 0, 0, 0)
    fresh = old._replace(cap=0, unposted=unposted, held=held, birth=redis.life, server=redis.incarnation)
    fresh = _newer(fresh, row, rules)
    if rules.missing_keeps_cap:
        fresh = fresh._replace(cap=cap)
    return redis._replace(account=fresh), "BUILT"


def _newer(account: Account, row: Row, rules: Rules) -> Account:
    """A state of PostgreSQL is written over an older one of the same hash."""
    if row.version <= account.version and not rules.older_installed:
        return account
    cap = row.cap if rules.without_births or row.birth == account.birth else 0
    posted = row.posted
    if rules.additive_reseed and account.version >= 0:
        posted += account.posted
    return account._replace(posted=posted, version=row.version, set_aside=row.set_aside, cap=cap, epoch=row.epoch)


def applied(redis: Redis, row: Row, entries: tuple[Entry, ...], rules: Rules = PROTOCOL) -> tuple[Redis, Applied]:
    """PostgreSQL has these entries: they go, and what they counted; of a hash of this server the state is taken.
    Nothing of that when PostgreSQL is no newer than it was when one of them was written."""
    gone = entries if rules.applied_subtracts_twice else [entry for entry in redis.outbox if entry in entries]
    posted = sum(entry.delta for entry in gone)
    account, known = redis.account, max((entry.version for entry in redis.outbox if entry in entries), default=-1)
    if account is not None and row.version <= known <= account.version and not rules.older_subtracts:
        return redis, Applied("OLDER" if known > row.version else "SAME", 0, account.version, account.epoch)
    redis = redis._replace(outbox=tuple(entry for entry in redis.outbox if entry not in entries))
    if account is not None:
        account = account._replace(unposted=account.unposted - posted)
        if ours(redis, rules):
            account = _newer(account, row, rules)
        redis = redis._replace(account=account)
    return redis, Applied("OK", posted)


def lower(redis: Redis, rules: Rules = PROTOCOL) -> tuple[Redis, Lowered]:
    """Nothing more may be held than is."""
    account = redis.account
    if account is None or not ours(redis, rules):
        return redis, Lowered(-1, 0, 0, 0)
    owed = account.unposted + account.held
    account = account._replace(cap=owed if rules.lower_may_raise else min(account.cap, owed))
    return redis._replace(account=account), Lowered(account.version, account.epoch, account.cap, account.birth)


def confirm(redis: Redis, rules: Rules = PROTOCOL) -> tuple[Redis, Waiting]:
    return redis, Waiting(_birth(redis, rules), redis.outbox)

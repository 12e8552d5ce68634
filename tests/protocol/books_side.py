"""What each SQL function does to an org's account in PostgreSQL: (state, arguments) -> (state, reply)."""

from typing import NamedTuple

from tests.protocol.redis_state import ORPHAN, SETTLE, Held, Row, put
from tests.protocol.rules import PROTOCOL, Rules


class Books(NamedTuple):
    """An account with its ledger and its holds, both by request. `version` grows with every change."""

    balance: int
    version: int
    cap: int
    lost: int
    held: int
    epoch: int
    #: Bit per gateway.
    waiting: int
    birth: int
    #: (settle or None, orphan or None): what each kind took.
    ledger: tuple[tuple[int | None, int | None], ...]
    holds: tuple[Held | None, ...]
    #: All that ever came in, less what expired.
    given: int

    @property
    def row(self) -> Row:
        return Row(self.balance, self.version, self.lost + self.held, self.cap, self.epoch, self.birth)


class Taken(NamedTuple):
    status: str
    granted: int


def opened(credits: int, requests: int) -> Books:
    return Books(credits, 1, 0, 0, 0, 1, 0, 0, ((None, None),) * requests, (None,) * requests, credits)


def read(books: Books, rules: Rules = PROTOCOL) -> tuple[Books, Row]:
    return books, books.row


def post(books: Books, *entries: tuple[int, int, int], rules: Rules = PROTOCOL) -> tuple[Books, Row]:
    """Entries (request, kind, charge), any number of times with one effect; holds of these requests here are over."""
    ledger, holds = books.ledger, books.holds
    balance, held = books.balance, books.held
    for request, kind, charge in sorted(entries, key=lambda entry: entry[1], reverse=True):
        settled, orphaned = ledger[request]
        if kind == SETTLE:
            delta = charge - (0 if rules.orphan_not_deducted else orphaned or 0)
            if settled is None:
                balance, ledger = balance - delta, put(ledger, request, (delta, orphaned))
            elif rules.no_unique_key:
                balance, ledger = balance - delta, put(ledger, request, (settled + delta, orphaned))
        elif orphaned is None and (settled is None or rules.orphan_outranks_settle):
            balance, ledger = balance - charge, put(ledger, request, (settled, charge))
        hold = holds[request]
        if hold is not None:
            held, holds = held - hold.amount, put(holds, request, None)
    if (ledger, holds) != (books.ledger, books.holds):
        version = books.version + 1
        books = books._replace(balance=balance, held=held, ledger=ledger, holds=holds, version=version)
    return books, books.row


def sweep_hold(books: Books, request: int, rules: Rules = PROTOCOL) -> tuple[Books, int]:
    """The lease of the hold is over; what it was charged, -1: there was none."""
    hold = books.holds[request]
    if hold is None:
        return books, -1
    return post(books, (request, ORPHAN, hold.used), rules=rules)[0], hold.used


def take_hold(
    books: Books, request: int, want: int, least: int, owed: int, capped: int, rules: Rules = PROTOCOL
) -> tuple[Books, Taken]:
    hold = books.holds[request]
    if hold is not None:
        return books, Taken("DUP", hold.amount)
    if books.ledger[request] != (None, None):
        return books, Taken("GONE", 0)
    amount = min(want, _free(books, capped, rules))
    if amount < least:
        return books, Taken("NOCREDIT" if books.balance < least else "INFLIGHT", 0)
    return books._replace(
        held=books.held + amount,
        holds=put(books.holds, request, Held(amount, min(owed, amount))),
        version=books.version + 1,
    ), Taken("OK", amount)


def extend_hold(books: Books, request: int, more: int, capped: int, rules: Rules = PROTOCOL) -> tuple[Books, Taken]:
    hold = books.holds[request]
    if hold is None:
        return books, Taken("GONE", 0)
    granted = max(0, min(more, _free(books, capped, rules)))
    if not granted:
        return books, Taken("REFUSED", 0)
    holds = put(books.holds, request, hold._replace(amount=hold.amount + granted))
    return books._replace(held=books.held + granted, holds=holds, version=books.version + 1), Taken("OK", granted)


def _free(books: Books, capped: int, rules: Rules) -> int:
    redis_may_owe = books.cap + books.lost if capped and not rules.postgres_ignores_cap else 0
    return books.balance - books.held - redis_may_owe


def _adopted(books: Books, birth: int, seen: int, rules: Rules) -> Books:
    """The cap is of the hash `birth` from here on. What another one was given, it may still owe."""
    if rules.without_births or birth == books.birth:
        return books
    if books.cap == 0 and books.lost == 0 and books.waiting == 0:
        epoch = books.epoch + (1 if books.birth else 0)
        return books._replace(birth=birth, epoch=epoch, version=books.version + 1)
    return lose_state(books._replace(birth=birth), books.epoch, seen, rules)[0]


def lose_state(books: Books, epoch: int, seen: int, rules: Rules = PROTOCOL) -> tuple[Books, Row]:
    """Whatever Redis may have owed stands aside until every gateway has said what it still owes."""
    if epoch == books.epoch:
        lost = 0 if rules.lost_dropped_at_once else books.lost + books.cap
        books = books._replace(epoch=epoch + 1, lost=lost, cap=0, waiting=seen, version=books.version + 1)
    return books, books.row


def raise_cap(
    books: Books, epoch: int, birth: int, need: int, floor: int, seen: int, rules: Rules = PROTOCOL
) -> tuple[Books, Row]:
    if epoch == books.epoch and birth:
        books = _adopted(books, birth, seen, rules)
        free = min(books.balance - books.lost - books.held, max(2 * need, floor))
        # Also when it had enough: then Redis has lowered its own, and this version says that it need not have.
        if free > books.cap or need <= books.cap:
            books = books._replace(cap=max(books.cap, free), version=books.version + 1)
    return books, books.row


def go_on_after(books: Books, version: int, epoch: int, rules: Rules = PROTOCOL) -> tuple[Books, Row]:
    """Whatever Redis has of a history that is lost is older from now on."""
    if books.version <= version or books.epoch < epoch:
        books = books._replace(version=max(books.version, version) + 1, epoch=max(books.epoch, epoch))
    return books, books.row


def acknowledge(
    books: Books, gateway: int, epoch: int, birth: int, owed: int, seen: int, rules: Rules = PROTOCOL
) -> tuple[Books, Row]:
    """`birth` 0: this gateway had nothing to register."""
    if epoch == books.epoch and books.waiting & 1 << gateway:
        if birth and birth != books.birth and not rules.without_births:
            # It registered in a hash that nobody knows yet: a loss of its own, for which all register again.
            books = _adopted(books, birth, seen, rules)
        else:
            waiting = books.waiting & ~(1 << gateway)
            books = books._replace(
                cap=max(books.cap, owed) if birth and not rules.owed_not_kept else books.cap,
                waiting=waiting,
                lost=books.lost if waiting else 0,
                version=books.version + 1,
            )
    return books, books.row


def lower_cap(
    books: Books, epoch: int, birth: int, version: int, cap: int, rules: Rules = PROTOCOL
) -> tuple[Books, Row | None]:
    same = rules.without_births or birth == books.birth
    if epoch != books.epoch or not same or cap >= books.cap:
        return books, None
    if version != books.version and not rules.lowers_what_changed:
        return books, None
    books = books._replace(cap=cap, version=books.version + 1)
    return books, books.row


def end_grace(books: Books, rules: Rules = PROTOCOL) -> tuple[Books, None]:
    """`lost_until` has passed."""
    if not books.lost and not books.waiting:
        return books, None
    return books._replace(lost=0, waiting=0, version=books.version + 1), None


def top_up(books: Books, credits: int, rules: Rules = PROTOCOL) -> tuple[Books, None]:
    """A person's UPDATE of the application's table."""
    return books._replace(balance=books.balance + credits, given=books.given + credits, version=books.version + 1), None

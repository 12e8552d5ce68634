"""The scripts, done to one org's keys in a real Redis, and what came of it in the model's own terms."""

from typing import Any

import redis as redis_py

from gateway import keys, limits
from gateway.types import UCREDITS_PER_CREDIT
from tests.protocol.names import UNIT, Names, units
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
)

SCRIPTS = ("admit", "extend", "settle", "renew", "orphan", "install", "applied", "lower", "confirm")
LEASE_MS = 600_000
MIRROR_TTL_S = 3_600
KINDS = {SETTLE: "settle", ORPHAN: "orphan"}
VERDICTS = {"admitted": ADMITTED, "settled": SETTLED, "orphaned": ORPHANED}


class RealRedis:
    """One org's keys. Nothing of it is a gateway's, so the incarnation of the server is what it is said to be."""

    def __init__(self, client: redis_py.Redis, org: str, requests: int, names: Names) -> None:
        self._client = client
        self._names = names
        self._rids = [f"{org}-{at}" for at in range(requests)]
        self._scripts = {name: client.register_script(limits.script_text(name)) for name in SCRIPTS}
        self._account, self._holds, self._deadlines = keys.account(org), keys.holds(org), keys.deadlines(org)
        self._outbox, self._mirror = keys.outbox(org), keys.mirror(org)
        self._tombs = [keys.tombstone(org, rid) for rid in self._rids]
        #: By key: time to live in ms, 0 for ever, and value.
        self._saved: dict[str, tuple[int, bytes]] = {}
        self.incarnation = 1

    def _run(self, name: str, all_keys: list[str], *args: str | int) -> Any:
        return self._scripts[name](keys=all_keys, args=[*args, f"server{self.incarnation}"])

    def _state(self, row: Row) -> list[str | int]:
        names = self._names
        amounts = [row.posted * UNIT, names.versions[row.version], row.set_aside * UNIT, row.cap * UNIT]
        return [*amounts, row.epoch, 0, names.births[row.birth]]

    # Scripts

    def admit(self, request: int, want: int, least: int, owed: int, capped: int) -> Admitted:
        asked = [want * UNIT, least * UNIT, owed * UNIT, LEASE_MS, 1_000, 0, capped]
        reply = self._run("admit", self._holding(request), self._rids[request], *asked)
        status, _, _, _, granted, epoch, need, birth = reply
        return self._admitted(status, granted, epoch, need, birth)

    def extend(self, request: int, more: int, used: int, capped: int) -> Admitted:
        asked: list[str | int] = [self._rids[request], more * UNIT, used * UNIT, capped]
        return self._admitted(*self._run("extend", self._leased(request), *asked))

    def _admitted(self, status: bytes, granted: bytes, epoch: bytes, need: bytes, birth: bytes) -> Admitted:
        told = units(int(granted)), int(epoch), units(int(need)), self._names.birth(birth.decode())
        return Admitted(status.decode(), *told)

    def settle(self, request: int, charge: int) -> tuple[str, str, str]:
        """Status, entry and birth, by their real names: the model does not know them yet."""
        all_keys = [*self._holding(request), self._mirror]
        status, _, entry, birth = self._run("settle", all_keys, self._rids[request], charge * UNIT, "{}", MIRROR_TTL_S)
        return status.decode(), entry.decode(), birth.decode()

    def told(self, reply: tuple[str, str, str]) -> Told:
        status, entry, birth = reply
        return Told(status, self._names.birth(birth), self._names.entry(entry) if entry else None)

    def renew(self, request: int, amount: int, used: int) -> Renewed:
        asked: list[str | int] = [self._rids[request], LEASE_MS, used * UNIT, amount * UNIT]
        status, epoch, owed, birth = self._run("renew", self._leased(request), *asked)
        return Renewed(status.decode(), int(epoch), units(int(owed)), self._names.birth(birth.decode()))

    def orphan(self, request: int) -> str:
        rid = self._rids[request]
        self._client.zadd(self._deadlines, {rid: 0}, xx=True)
        all_keys = [*self._holding(request), self._mirror]
        status: bytes = self._scripts["orphan"](keys=all_keys, args=[rid, "checkpoint", MIRROR_TTL_S])
        return status.decode()

    def install(self, *row: int) -> str:
        all_keys = [self._account, self._holds, self._outbox, self._mirror]
        status, _ = self._run("install", all_keys, *self._state(Row(*row)), MIRROR_TTL_S, 0)
        return str(status.decode())

    def applied(self, row: Row, entries: tuple[Entry, ...]) -> Applied:
        ids = [self._names.entries[entry] for entry in entries]
        all_keys = [self._account, self._outbox, self._mirror]
        status, posted, version, epoch = self._run("applied", all_keys, *self._state(row), MIRROR_TTL_S, *ids)
        known = 0 if status == b"OK" else self._version(version)
        return Applied(status.decode(), units(int(posted)), known, int(epoch))

    def lower(self) -> Lowered:
        version, epoch, cap, birth = self._run("lower", [self._account])
        return Lowered(self._version(version), int(epoch), units(int(cap)), self._names.birth(birth.decode()))

    def _version(self, version: bytes) -> int:
        return -1 if version == b"-1" else self._names.version(int(version))

    def confirm(self) -> tuple[int, Entry | None]:
        """Birth, and the oldest entry of the outbox."""
        birth, oldest = self._run("confirm", [self._account, self._outbox])
        return self._names.birth(birth.decode()), self._names.entry(oldest.decode()) if oldest else None

    def _holding(self, request: int) -> list[str]:
        return [self._account, self._holds, self._deadlines, self._outbox, self._tombs[request]]

    def _leased(self, request: int) -> list[str]:
        return [self._account, self._holds, self._deadlines, self._tombs[request]]

    # What happens to a server

    def flushall(self) -> None:
        self._client.flushall()
        self._let_time_pass()

    def evict(self) -> None:
        """The account alone, whatever it owes: its time is over, or somebody deletes it."""
        self._client.delete(self._account)
        self._let_time_pass()

    def save(self) -> None:
        all_keys = [self._account, self._holds, self._deadlines, self._outbox, self._mirror, *self._tombs]
        found = {key: (max(0, self._client.pttl(key)), self._client.dump(key)) for key in all_keys}
        self._saved = {key: (ttl_ms, dump) for key, (ttl_ms, dump) in found.items() if dump is not None}

    def restart(self) -> None:
        self._client.flushall()
        for key, (ttl_ms, dump) in self._saved.items():
            self._client.restore(key, ttl_ms, dump)
        self.incarnation += 1
        self._let_time_pass()

    def _let_time_pass(self) -> None:
        """No birth and no id of an entry from now on is one of before."""
        now = self._now_ms()
        while self._now_ms() <= now:
            pass

    def _now_ms(self) -> int:
        seconds, micros = self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    # What is there

    def read(self, model: Redis) -> Redis:
        """What the model made up with its last operation gets its name here; of `life` nothing real tells."""
        pipe = self._client.pipeline(transaction=False)
        for command in (
            ("HGETALL", self._account),
            ("TTL", self._account),
            ("HGETALL", self._holds),
            ("ZRANGE", self._deadlines, 0, -1),
            ("XRANGE", self._outbox, "-", "+"),
            ("GET", self._mirror),
            ("MGET", *self._tombs),
        ):
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
        account, ttl_s, holds, deadlines, outbox, mirror, tombs = pipe.execute()
        assert set(deadlines) == set(holds), f"leases {deadlines} of holds {holds}"
        if model.account is not None and b"b" in account:
            self._names.note_birth(model.account.birth, account[b"b"].decode())
        for entry, (name, _) in zip(model.outbox, outbox, strict=False):
            self._names.note_entry(entry, name.decode())
        if b"p" in account:
            self._check(account, ttl_s, mirror)
        return Redis(
            self.incarnation,
            model.life,
            self._read_account(account) if b"p" in account else None,
            tuple(_held(holds.get(rid.encode())) for rid in self._rids),
            tuple(self._read_entry(name.decode(), fields) for name, fields in outbox),
            tuple(_tomb(tomb) for tomb in tombs),
        )

    def _check(self, account: dict[bytes, bytes], ttl_s: int, mirror: bytes | None) -> None:
        """What follows from the account without being a part of the model."""
        posted, unposted, held = (int(account[name]) for name in (b"p", b"u", b"h"))
        assert (ttl_s == -1) == (unposted != 0 or held != 0), f"{account} lives for {ttl_s} s"
        shown = max(0, posted - unposted) // UCREDITS_PER_CREDIT
        assert mirror == str(shown).encode(), f"the application reads {mirror!r}, not {shown}"

    def _read_account(self, account: dict[bytes, bytes]) -> Account:
        posted, set_aside, cap, unposted, held = (units(int(account[name])) for name in (b"p", b"s", b"c", b"u", b"h"))
        version, birth = self._names.version(int(account[b"v"])), self._names.birth(account[b"b"].decode())
        server = int(account[b"r"].removeprefix(b"server"))
        return Account(posted, version, set_aside, cap, int(account[b"ep"]), unposted, held, birth, server)

    def _read_entry(self, name: str, fields: dict[bytes, bytes]) -> Entry:
        entry = self._names.entry(name)
        kind = next(number for number, kind in KINDS.items() if kind == fields[b"k"].decode())
        amounts = units(int(fields[b"a"])), units(int(fields[b"d"]))
        life, version = entry.life if entry else -1, self._version(fields[b"v"])
        return Entry(self._rids.index(fields[b"r"].decode()), kind, *amounts, life, version)


def _held(text: bytes | None) -> Held | None:
    if text is None:
        return None
    amount, _, used = text.decode().partition(":")
    return Held(units(int(amount)), units(int(used)))


def _tomb(text: bytes | None) -> Tomb | None:
    if text is None:
        return None
    verdict, _, rest = text.decode().partition(":")
    return Tomb(VERDICTS[verdict], 0 if verdict == "admitted" else units(int(rest.partition(":")[0])))

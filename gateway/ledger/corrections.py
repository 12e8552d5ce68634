"""Corrections: requests cost what the upstream's own log says, whatever they were charged.

The word of that log is the last one. It may be given any number of times: what a request costs already is not posted
again (gateway.correct). A request is found by what it is called here, which is also its X-Request-Id, or by the
X-Request-Id that a trusted proxy chose for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from gateway.ledger.queries import query
from gateway.ledger.upstream_log import Said
from gateway.stores import Postgres

#: Requests looked for in one reading of the ledger, and corrected in one transaction.
FIND_TOGETHER = 50_000
POST_TOGETHER = 500
#: A long ledger takes its time.
FIND_TIMEOUT_MS = 600_000
POST_TIMEOUT_MS = 30_000

#:  right      it was charged that          unknown    the ledger does not know it, and was not told to take it
#:  corrected  it is charged that now       ambiguous  several requests are called so, or lines that differ mean one
#:  posted     it was unknown, and is       without    its org has no row to post to
#:             charged that now
Verdict = Literal["right", "corrected", "posted", "unknown", "ambiguous", "without"]
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Correction:
    """What came of one request. org_id, request_id: as the ledger knows it, as far as it does. was_ucredits: None for
    one that it did not know."""

    #: The line that named it: `usage.jsonl:12`.
    place: str
    verdict: Verdict
    org_id: str | None
    request_id: str
    was_ucredits: int | None
    ucredits: int


async def reconcile(postgres: Postgres, said: Sequence[Said], *, unknown_too: bool, dry: bool) -> list[Correction]:
    """Every request of `said` costs what its line says; what came of each, in order of org and request.

    unknown_too: also those that the ledger does not know, where their line names an org. dry: nothing is posted, and
    what would be is returned. Raises StoreUnavailable: what was posted by then stays, and is right the next time."""
    done: list[Correction] = []
    asked: dict[Name, list[Said]] = {}
    for at in range(0, len(said), FIND_TOGETHER):
        part = said[at : at + FIND_TOGETHER]
        known = await _find(postgres, part)
        for line in part:
            names = {name for name in known.get(line.request_id, ()) if line.org_id in (None, name[0])}
            if len(names) > 1:
                done.append(Correction(line.place, "ambiguous", line.org_id, line.request_id, None, line.ucredits))
            elif names:
                asked.setdefault(names.pop(), []).append(line)
            elif line.org_id is None:
                done.append(Correction(line.place, "unknown", None, line.request_id, None, line.ucredits))
            else:
                asked.setdefault((line.org_id, line.request_id), []).append(line)
    todo: list[tuple[Name, Said]] = []
    for name, lines in sorted(asked.items()):
        if len({line.ucredits for line in lines}) == 1:
            todo.append((name, lines[0]))
        else:
            done += [Correction(line.place, "ambiguous", *name, None, line.ucredits) for line in lines]
    for at in range(0, len(todo), POST_TOGETHER):
        done += await _correct(postgres, todo[at : at + POST_TOGETHER], unknown_too=unknown_too, dry=dry)
    return sorted(done, key=lambda one: (one.org_id or "", one.request_id, one.place))


async def _find(postgres: Postgres, said: Sequence[Said]) -> dict[str, set[Name]]:
    """The requests that were charged and are called so, by what they are called."""
    orgs = {line.org_id for line in said}
    rows = await postgres.rows(
        query("find_charged"),
        [line.request_id for line in said],
        None if None in orgs else list(orgs),
        timeout_ms=FIND_TIMEOUT_MS,
    )
    known: dict[str, set[Name]] = {}
    for row in rows:
        for called in (row["request_id"], row["called"]):
            known.setdefault(called, set()).add((row["org_id"], row["request_id"]))
    return known


async def _correct(
    postgres: Postgres, asked: Sequence[tuple[Name, Said]], *, unknown_too: bool, dry: bool
) -> list[Correction]:
    rows = await postgres.rows(
        query("correct"),
        [org_id for (org_id, _), _ in asked],
        [request_id for (_, request_id), _ in asked],
        [line.ucredits for _, line in asked],
        [msgspec.json.encode({"basis": "reconciled", "from": line.place}).decode() for _, line in asked],
        unknown_too,
        dry,
        timeout_ms=POST_TIMEOUT_MS,
    )
    return [
        Correction(line.place, _verdict(row["charged"], line.ucredits, row["present"], unknown_too), *name,
                   row["charged"], line.ucredits)
        for (name, line), row in zip(asked, rows, strict=True)
    ]  # fmt: skip


def _verdict(was_ucredits: int | None, ucredits: int, present: bool, unknown_too: bool) -> Verdict:
    if was_ucredits == ucredits:
        return "right"
    if not present:
        return "without"
    if was_ucredits is not None:
        return "corrected"
    if not unknown_too:
        return "unknown"
    return "posted" if ucredits else "right"

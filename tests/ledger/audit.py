"""What is true of the books at any moment, asked in one statement: one snapshot."""

from gateway.stores import Postgres

_WRONG = """
SELECT * FROM (
    SELECT a.org_id, a.cap, a.lost, a.held, a.credits_seen, coalesce(c.credits, 0)::bigint AS credits,
           coalesce(c.credits, 0)::bigint * 1000000 + a.micro AS balance,
           (SELECT coalesce(sum(l.amount), 0) FROM gateway.ledger l WHERE l.org_id = a.org_id) AS entries,
           (SELECT coalesce(sum(h.amount), 0) FROM gateway.hold h WHERE h.org_id = a.org_id) AS holds
    FROM gateway.account a LEFT JOIN gateway.credit c ON c.org_id = a.org_id
) AS b WHERE balance <> entries OR held <> holds OR cap < 0 OR lost < 0 OR credits <> credits_seen
UNION ALL
SELECT c.org_id, 0, 0, 0, 0, c.credits, 0, 0, 0 FROM gateway.credit c
WHERE c.org_id IS NOT NULL AND c.credits <> 0 AND NOT EXISTS (SELECT FROM gateway.account a WHERE a.org_id = c.org_id)
"""


async def books_are_right(postgres: Postgres) -> None:
    """Every balance is the sum of its ledger, for orgs with a row and for those whose row is gone; what is held is the
    sum of the holds."""
    assert await postgres.rows(_WRONG) == []


async def entries(postgres: Postgres, org_id: str) -> list[tuple[str, int]]:
    """The org's ledger in order: kind and amount."""
    rows = await postgres.rows("SELECT kind, amount FROM gateway.ledger WHERE org_id = $1 ORDER BY seq", org_id)
    return [(row["kind"], row["amount"]) for row in rows]

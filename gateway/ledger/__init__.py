"""The ledger: posted balances, the outbox on its way there, holds whose gateway died, plans and grants.

PostgreSQL holds the truth (`migrations/`), Redis the working set (`limits/*.lua`). Admission itself is not here.
"""

from gateway.ledger.accounts import CREDITS_CHANNEL, Accounts, grant, read_balance
from gateway.ledger.migrate import migrate, pending
from gateway.ledger.outbox import Outbox, post
from gateway.ledger.queries import query
from gateway.ledger.sweeper import Sweeper

__all__ = [
    "CREDITS_CHANNEL",
    "Accounts",
    "Outbox",
    "Sweeper",
    "grant",
    "migrate",
    "pending",
    "post",
    "query",
    "read_balance",
]

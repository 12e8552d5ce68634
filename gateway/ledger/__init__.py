"""The ledger: posted balances, the outbox on its way there, what is lost with Redis, plans and grants.

PostgreSQL holds the truth (`migrations/`), Redis the working set (`limits/*.lua`). Admission itself is not here.
"""

from gateway.ledger.accounts import Accounts, Terms
from gateway.ledger.books import grant, post, read_balance
from gateway.ledger.freshness import CREDITS_CHANNEL, Freshness
from gateway.ledger.holds import PostgresHolds
from gateway.ledger.losses import EPOCHS_CHANNEL, Knowledge, Losses
from gateway.ledger.migrate import Binding, migrate, pending
from gateway.ledger.outbox import Outbox
from gateway.ledger.queries import query
from gateway.ledger.sweeper import Sweeper, SweeperPowers
from gateway.ledger.trimming import Trimming

__all__ = [
    "CREDITS_CHANNEL",
    "EPOCHS_CHANNEL",
    "Accounts",
    "Binding",
    "Freshness",
    "Knowledge",
    "Losses",
    "Outbox",
    "PostgresHolds",
    "Sweeper",
    "SweeperPowers",
    "Terms",
    "Trimming",
    "grant",
    "migrate",
    "pending",
    "post",
    "query",
    "read_balance",
]

"""Admission: every demand and the credit hold are taken in one trip, or none is; what is taken is given back once.

    NEW ──admit──▶ HELD ──settle──▶ SETTLED        charge, the rest of the hold and of the estimates given back
                    │ └──release──▶ RELEASED       the upstream never saw the request: all given back
                    └──lease over──▶ ORPHANED      this process died; the ledger's sweeper charges the checkpoint

A settle that Redis cannot take now is kept here, in memory and bounded, and tried until it is taken; when Redis has
lost the account it goes to PostgreSQL directly. Reading balances and posting are the ledger's, passed in as functions.
"""

from gateway.admission.desk import Admission
from gateway.admission.hold import Hold, Rules, account_keys, actual_of, counter_keys
from gateway.admission.powers import Journal, Powers
from gateway.admission.settling import Settling

__all__ = ["Admission", "Hold", "Journal", "Powers", "Rules", "Settling", "account_keys", "actual_of", "counter_keys"]

"""Real gateways, real stores, an upstream that knows what it delivered, and faults every few seconds.

`python -m tests.chaos --seconds 60 --seed 7` (or `make chaos ARGS=...`) runs it and prints what was found. The verdict
is drawn after everything was healed, from three witnesses that know nothing of each other: the ledger, Redis, and the
upstream's own log.
"""

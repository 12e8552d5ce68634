"""The credit protocol as a model: searched exhaustively in small scope, and held step by step against scripts and SQL.

`redis_side.py` says what every script does to the state in Redis, `books_side.py` what every SQL function does to an
account in PostgreSQL; both are pure. `world.py` has the whole state; `steps.py`, `background.py` and `faults.py` who
may do what next; `symmetry.py` which states are alike; `invariants.py` what must hold; `search.py` looks at every
state that can be reached. `rules.py` names what a search covers and what a mutant changes, `scopes.py` has those that
are searched. `real_redis.py` and `real_books.py` do an operation to real stores and read the state back, by the
`names.py` that the model has for it; `ops.py` does the same one to the model, `anything.py` thinks of operations.

Amounts are whole credits, so that numbers stay small. Not in the model: limits, grants and their periods, charges
beyond what is held, the journal, a stopping gateway's farewell; and PostgreSQL loses nothing.

    python -m tests.protocol [--full]      what was searched, how many states, and which invariant tells of which mutant
"""

"""The ledger's SQL by name: `queries.sql` split at its `-- name:` lines."""

from functools import cache
from importlib.resources import files


@cache
def _statements() -> dict[str, str]:
    statements: dict[str, str] = {}
    text = (files("gateway.ledger") / "queries.sql").read_text()
    for block in text.split("-- name: ")[1:]:
        name, _, sql = block.partition("\n")
        statements[name.strip()] = sql.strip()
    return statements


def query(name: str) -> str:
    """The statement called `name`. Raises KeyError for a name that `queries.sql` does not have."""
    return _statements()[name]

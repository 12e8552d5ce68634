"""docs/limits.md shows what was measured."""

from pathlib import Path

from tests.limits import table

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"


def test_the_page_shows_what_is_measured(full: bool) -> None:
    """All of it with `--full`, else a row of each shape."""
    measured = table.table().splitlines() if full else [table.row("requests", 10), table.row("tokens", 1_000)]
    lines = PAGE.read_text().splitlines()
    assert [line for line in [*measured, *table.others()] if line not in lines] == []

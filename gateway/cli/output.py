"""How the commands speak: tables for people, JSON for programs on standard output; errors on standard error.

Text from outside (names, ids, the ledger's notes) is shown as text: it can neither colour nor move the terminal.
"""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.config import format_duration
from gateway.types import UCREDITS_PER_CREDIT

#: Into a pipe or a file there is no screen to fit, and a wrapped id is useless.
_PIPE_COLUMNS = 240


def console() -> Console:
    """Standard output of this moment."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def emit_json(value: object) -> None:
    """`value` is on standard output as indented JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def say(text: str) -> None:
    """A line for a person, on standard output."""
    typer.echo(safe(text))


def remark(text: str) -> None:
    """A line for a person that is no result, on standard error: it does not disturb a pipe."""
    typer.echo(safe(text), err=True)


def complain(text: str) -> None:
    """What went wrong, on standard error."""
    remark(f"error: {text}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, title: str | None = None) -> Table:
    """A plain table. Columns whose name ends in `#` (not shown) hold numbers."""
    built = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        number = column.endswith("#")
        built.add_column(column.removesuffix("#"), justify="right" if number else "left", overflow="fold")
    for row in rows:
        built.add_row(*(cell if isinstance(cell, Text) else Text(safe(cell)) for cell in row))
    return built


def safe(text: str) -> str:
    """`text` without control characters; line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)


def format_credits(ucredits: int | None) -> str:
    """1500000 -> `1.5`, exactly; `-` for none."""
    if ucredits is None:
        return "-"
    whole, fraction = divmod(abs(ucredits), UCREDITS_PER_CREDIT)
    sign = "-" if ucredits < 0 else ""
    return f"{sign}{whole}" + (f".{fraction:06}".rstrip("0") if fraction else "")


def format_time(moment: datetime | None) -> str:
    """UTC to the second; `-` for none."""
    return "-" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def format_ms(ms: int) -> str:
    """To the tenth of a second; whole minutes and more as durations are written: `12.3s`, `2m`, `3h`."""
    if ms < 60_000:
        return f"{ms / 1000:.1f}s"
    return format_duration(ms // 60_000 * 60_000)

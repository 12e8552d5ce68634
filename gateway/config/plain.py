"""Looking into documents as written, where any value may be of any type or missing: for checks.py and limit_checks.py.

A value that is not what it should be reads as empty or None here; that it is wrong is the models' to tell.
"""

from gateway.config import rules
from gateway.config.problems import Path, Problem, located, nearest
from gateway.config.source import Document, Plain
from gateway.config.values import parse_duration


def problem(doc: Document, path: Path, text: str) -> Problem:
    """`text` about `path`, on the line of that key or of the nearest one around it."""
    return Problem(doc.file, doc.lines[nearest(path, doc.lines)], located(path, text))


def mistaken(doc: Document, path: Path, mistake: rules.Mistake) -> Problem:
    """The rule that the section at `path` breaks, as a problem."""
    return problem(doc, (*path, mistake.field) if mistake.field else path, mistake.text)


def mapping_of(value: Plain) -> dict[str, Plain]:
    return value if isinstance(value, dict) else {}


def items_of(value: Plain) -> list[Plain]:
    return value if isinstance(value, list) else []


def section(doc: Document, key: str) -> Plain:
    """What stands below the key at the top."""
    return mapping_of(doc.value).get(key)


def listed(doc: Document, key: str) -> list[Plain]:
    """The items of the list below the key at the top."""
    return items_of(section(doc, key))


def words_of(value: Plain, path: Path) -> list[tuple[Path, str]]:
    """Every text of a value that is one or a list of them, with its place."""
    if isinstance(value, str):
        return [(path, value)]
    return [((*path, index), item) for index, item in enumerate(items_of(value)) if isinstance(item, str)]


def is_broken(doc: Document, below: Path) -> bool:
    """Some value at or below this path could not be read, so what is missing there may be written after all."""
    return any(path[: len(below)] == below for path in doc.broken)


def whole_of(keys: dict[str, Plain], key: str, default: int | None) -> int | None:
    """The whole number at `key`, also one in text; None for anything else."""
    value = keys.get(key, default)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:18])
    return value if isinstance(value, int) else None


def duration_ms_of(keys: dict[str, Plain], key: str, default_ms: int | None) -> int | None:
    """The duration at `key`; None when it cannot be read."""
    value = keys.get(key)
    if key not in keys:
        return default_ms
    try:
        return parse_duration(value) if isinstance(value, str) else None
    except ValueError:
        return None


def methods_of(value: Plain) -> frozenset[str] | None:
    """The methods that `method` names, empty for all of them; None when they cannot be read."""
    if value is None:
        return frozenset()
    written = value if isinstance(value, list) else [value]
    names = frozenset(item.upper() for item in written if isinstance(item, str))
    return names if names and len(written) >= len(names) else None

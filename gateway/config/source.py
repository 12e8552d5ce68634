"""YAML text -> plain values, with the line of every key, and `${NAME:-default}` filled in from the environment.

Values are substituted after parsing, so nothing in the environment can add keys or change the structure. Only the
plain part of YAML is read: mappings, lists and scalars; no tags, anchors or aliases. It does not
know what the keys mean.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TypeAlias

import yaml

from gateway.config.problems import Path, Problem, located, quoted

Plain: TypeAlias = "None | bool | int | float | str | list[Plain] | dict[str, Plain]"

FILE_BYTES_MAX = 1 << 20
_DEPTH_MAX = 20
#: What plain values resolve to; anything else was asked for with an explicit tag.
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
)
_TRUE, _FALSE = frozenset(("true", "yes", "on")), frozenset(("false", "no", "off"))
#: `$${` is an escaped `${`; a variable; or a `${` that is neither, which is a mistake.
_VARIABLE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\}|\$\{", re.ASCII)
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,24})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML file as read. `lines` knows every path; a key's line where there is a key, else the value's."""

    file: str
    value: Plain
    lines: Mapping[Path, int]
    problems: tuple[Problem, ...]
    #: Paths whose value could not be read: what follows from that is not worth a second problem.
    broken: frozenset[Path]

    @property
    def readable(self) -> bool:
        """The file holds a mapping, whatever else is wrong with it."""
        return isinstance(self.value, dict)


def read(file: FilePath, environ: Mapping[str, str]) -> Document:
    """The document in `file`, or one that holds the problem in its place. Never raises for what a file may contain."""
    shown = str(file)
    try:
        if not file.is_file():
            return _unreadable(shown, 1, "is not a regular file" if file.exists() else "no such file")
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as exc:
        return _unreadable(shown, 1, f"cannot be read: {getattr(exc, 'strerror', None) or exc}")
    if len(data) > FILE_BYTES_MAX:
        return _unreadable(shown, 1, "is larger than 1MiB; this is not a configuration file of the gateway")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data[: exc.start].count(b"\n") + 1
        return _unreadable(shown, line, f"is not UTF-8 text: byte 0x{data[exc.start]:02x} at offset {exc.start}")
    return parse(text, shown, environ)


def parse(text: str, file: str, environ: Mapping[str, str]) -> Document:
    """The document that `text` holds; `file` is the name its problems carry."""
    try:
        # compose() builds nodes only: no Python object is ever constructed from the file.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as exc:
        line = text[: exc.position].count("\n") + 1
        return _unreadable(file, line, "not YAML: a control character stands in the text")
    except yaml.MarkedYAMLError as exc:
        return _unreadable(file, _syntax_line(exc, text), f"not YAML: {_syntax_words(exc)}")
    except RecursionError:
        return _unreadable(file, 1, f"is nested deeper than {_DEPTH_MAX} levels")
    except (ValueError, OverflowError):
        # PyYAML lets these through from escapes such as "\\UFFFFFFFF", without a mark.
        return _unreadable(file, 1, "not YAML: an escape in quoted text names no character")
    if root is None:
        return _unreadable(file, 1, "is empty")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        return _unreadable(file, root.start_mark.line + 1, f"expected a mapping (key: value), the file holds {kind}")
    builder = _Builder(file, environ)
    value = builder.build(root, ())
    return Document(file, value, builder.lines, tuple(builder.problems), frozenset(builder.broken))


def _unreadable(file: str, line: int, text: str) -> Document:
    return Document(file, None, {(): line}, (Problem(file, line, text),), frozenset({()}))


def _syntax_line(exc: yaml.MarkedYAMLError, text: str) -> int:
    """Where the mistake shows; for what is still open at the end of the file, where it was opened."""
    mark = exc.problem_mark
    if mark is None or mark.index >= len(text.rstrip()):
        mark = exc.context_mark or mark
    return 1 if mark is None else min(mark.line, text.rstrip().count("\n")) + 1


def _syntax_words(exc: yaml.MarkedYAMLError) -> str:
    problem = exc.problem or "cannot be parsed"
    if r"'\t'" in problem:
        return "a tab stands where YAML wants spaces"
    return f"{problem} ({exc.context})" if exc.context else problem


@dataclass(slots=True)
class _Builder:
    """Walks the nodes of one file once; `problems`, `lines` and `broken` grow on the way."""

    file: str
    environ: Mapping[str, str]
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[Path] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)

    def build(self, node: yaml.Node, path: Path) -> Plain:
        if id(node) in self.seen:
            # The node's own mark is where the anchor stands.
            self.lines.setdefault(path, self.lines[path[:-1]])
            self.wrong(path, "aliases (*name) are not supported: write the value out")
            return None
        self.seen.add(id(node))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > _DEPTH_MAX:
            self.wrong(path[:1], f"is nested deeper than {_DEPTH_MAX} levels")
            return None
        if node.tag not in _TAGS:
            self.wrong(path, f"the tag {quoted(node.tag)} is not supported")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        return None

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Plain]:
        built: dict[str, Plain] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(self.file, line, located(path, "a key must be plain text")))
                continue
            key = str(key_node.value)
            if key in built:
                first = self.lines[(*path, key)]
                self.problems.append(
                    Problem(
                        self.file, line, located(path, f"key {quoted(key)} is written twice, first on line {first}")
                    )
                )
                continue
            self.lines[(*path, key)] = line
            built[key] = self.build(value_node, (*path, key))
        return built

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Plain:
        text = str(node.value)
        if "${" in text:
            return self.interpolated(text, path)
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool" if text.lower() in _TRUE | _FALSE:
                return text.lower() in _TRUE
            # YAML 1.1 also reads 0777, 0x1f and 1:30 as numbers; nobody means that here, so they stay text.
            case "int" if _INT.fullmatch(text):
                return int(text.replace("_", ""))
            case "float" if ":" not in text and "." in text.strip("."):
                return float(text.replace("_", ""))
            case _:
                return text

    def interpolated(self, text: str, path: Path) -> Plain:
        mistakes: list[str] = []

        def fill(match: re.Match[str]) -> str:
            if match.group() == "$${":
                return "${"
            name, default = match.groups()
            if name is None:
                mistakes.append("cannot read '${': write ${NAME} or ${NAME:-default} ($${ for a literal ${)")
                return ""
            if default is not None:
                return self.environ.get(name) or default
            if name not in self.environ:
                mistakes.append(
                    f"environment variable {name} is not set (write ${{{name}:-default}} to give a default)"
                )
            return self.environ.get(name, "")

        filled = _VARIABLE.sub(fill, text)
        for mistake in mistakes:
            self.wrong(path, mistake)
        return None if mistakes else filled

    def wrong(self, path: Path, text: str) -> None:
        self.broken.add(path)
        self.problems.append(Problem(self.file, self.lines[path], located(path, text)))

"""The configuration, whole or not at all: every mistake in every file is collected before anything is refused.

This is the only module of the gateway that looks at the environment.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gateway.config import checks, limit_checks, price_checks
from gateway.config.models import Settings
from gateway.config.plain import is_broken, problem
from gateway.config.policies import Policy
from gateway.config.problems import Path, Problem, located, nearest, plain_words, quoted
from gateway.config.source import Document, parse, read
from gateway.errors import ConfigError

POLICIES_DIRECTORY = "policies"
_POLICY_FILES_MAX = 256
M = TypeVar("M", bound=BaseModel)
_POLICY_SUFFIXES = (".yaml", ".yml")


def load(
    path: str | FilePath, environ: Mapping[str, str] | None = None, *, policies: str | FilePath | None = None
) -> Settings:
    """The settings in the file at `path` and the policies beside it.

    policies: a directory to read policies from in place of the one that the file names. environ: what `${NAME}` means,
    the process's own environment when left out. Raises ConfigError listing every mistake of every file as
    `file:line: what`; nothing else is raised for anything a file may contain.
    """
    environ = os.environ if environ is None else environ
    file = FilePath(path)
    document = read(file, environ)
    problems: list[Problem] = []
    found = _read_policies(document, file.parent, environ, problems, policies)
    return _settle(document, found, file.parent, problems)


def load_text(
    gateway_yaml: str, policies: Mapping[str, str] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """The settings in these texts, without touching a disk or the environment; for tests and tools.

    policies: file name -> YAML. File names in the settings stay as written and are not looked up. Raises ConfigError.
    """
    variables = environ or {}
    document = parse(gateway_yaml, "gateway.yaml", variables)
    texts = policies or {}
    documents = [parse(text, f"{POLICIES_DIRECTORY}/{name}", variables) for name, text in texts.items()]
    return _settle(document, documents, None, [])


def _settle(
    document: Document, policy_documents: Sequence[Document] | None, base: FilePath | None, problems: list[Problem]
) -> Settings:
    """Everything is checked; the settings, or every problem. `policy_documents` is None when they were not found."""
    policies = policy_documents or ()
    for doc in (document, *policies):
        problems.extend(doc.problems)
    compiled = [policy for doc in policies if (policy := _model(Policy, doc, None, problems)) is not None]
    settings = _model(Settings, document, base, problems)
    problems.extend(checks.policies_together(policies))
    problems.extend(limit_checks.limits(document, policies))
    problems.extend(price_checks.prices(document, policies))
    names = None if policy_documents is None else list(_policy_names(policy_documents))
    problems.extend(checks.gateway(document, names))
    if problems or settings is None:
        raise ConfigError([str(problem) for problem in _in_order(problems, document)])
    return settings.model_copy(update={"policies": {policy.policy: policy for policy in compiled}})


def _model(model: type[M], doc: Document, base: FilePath | None, problems: list[Problem]) -> M | None:
    """The document as `model`; None, and its problems in plain words, when it does not fit."""
    if not isinstance(doc.value, dict):
        return None
    # In YAML `policies` names a directory; in the settings it holds what was found there.
    value = {key: below for key, below in doc.value.items() if model is not Settings or key != "policies"}
    try:
        return model.model_validate(value, context=base)
    except ValidationError as exc:
        problems.extend(_explained(exc, doc, model))
        return None


def _explained(exc: ValidationError, doc: Document, model: type[BaseModel]) -> Iterator[Problem]:
    for error in exc.errors(include_url=False):
        path: Path = nearest(error["loc"], doc.lines)
        if path in doc.broken or _follows_from_another(error):
            continue
        if error["type"] == "cross_field" and is_broken(doc, path):
            # Between keys of which one could not be read; the checks of the document know that.
            continue
        text = plain_words(error, path, model)
        line = doc.lines[path]
        if error["type"] == "extra_forbidden":
            path = path[:-1]
        elif error["type"] == "cross_field" and error["ctx"]["field"]:
            path = (*path, error["ctx"]["field"])
            line = doc.lines[nearest(path, doc.lines)]
        yield Problem(doc.file, line, located(path, text))


def _follows_from_another(error: ErrorDetails) -> bool:
    """pydantic counts only the good items of a list, and asks for defaults that need a key which failed."""
    return error["type"] == "default_factory_not_called" or (error["type"] == "too_short" and bool(error["input"]))


def _policy_names(docs: Sequence[Document]) -> Iterator[str]:
    """The names plans may use; an unreadable file is given its own name, so that its plan is not blamed as well."""
    for doc in docs:
        name = doc.value.get("policy") if isinstance(doc.value, dict) else None
        yield name if isinstance(name, str) else FilePath(doc.file).stem


def _read_policies(
    document: Document,
    base: FilePath,
    environ: Mapping[str, str],
    problems: list[Problem],
    instead: str | FilePath | None,
) -> list[Document] | None:
    """Every policy file beside `document`, or in `instead`, in order of name; None when their directory cannot be
    listed."""
    written = document.value.get("policies", POLICIES_DIRECTORY) if isinstance(document.value, dict) else None
    place: Path = ("policies",)
    if isinstance(document.value, dict) and not isinstance(written, str):
        if place not in document.broken:
            problems.append(problem(document, place, "expected the name of a directory"))
        return None
    directory = base / (written if isinstance(written, str) else POLICIES_DIRECTORY)
    if instead is not None:
        directory = FilePath(instead)
    try:
        files = sorted(
            file
            for file in directory.iterdir()
            if file.suffix in _POLICY_SUFFIXES and not file.name.startswith(".") and not file.is_dir()
        )
    except (OSError, ValueError) as exc:
        if document.readable:
            reason = getattr(exc, "strerror", None) or str(exc)
            problems.append(problem(document, place, f"cannot list {quoted(str(directory))}: {reason}"))
        return None
    if len(files) > _POLICY_FILES_MAX:
        text = f"{quoted(str(directory))} holds {len(files)} policy files, at most {_POLICY_FILES_MAX} are read"
        problems.append(problem(document, place, text))
    return [read(file, environ) for file in files[:_POLICY_FILES_MAX]]


def _in_order(problems: list[Problem], first: Document) -> list[Problem]:
    """Each problem once: those of gateway.yaml first, then file by file, by line."""
    return sorted(set(problems), key=lambda problem: (problem.file != first.file, problem))

"""JSON Schemas of gateway.yaml and of a policy file, so that editors complete and check while one types."""

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gateway.config import models, policies, sections
from gateway.config.limit_values import read_anchor
from gateway.config.values import FROM_ENV_PATTERN, DurationReader, SizeReader, format_duration, format_size

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(document: Literal["gateway", "policy"] = "gateway") -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of gateway.yaml, or of one file under policies/."""
    root: type[BaseModel] = models.Settings if document == "gateway" else policies.Policy
    schema = root.model_json_schema(by_alias=True, mode="validation")
    classes = {
        cls.__name__: cls
        for module in (sections, models, policies)
        for cls in vars(module).values()
        if _is_section(cls)
    }
    for name, definition in {root.__name__: schema, **schema.get("$defs", {})}.items():
        for field, info in classes[name].model_fields.items():
            _write_as_in_yaml(definition["properties"][info.alias or field], info)
    if document == "gateway":
        schema["properties"]["policies"] = {
            "type": "string",
            "default": "policies",
            "description": "Directory of the policy files, relative to this file.",
        }
        for unused in ("Policy", "Limit", "Price", "Tokens"):
            schema["$defs"].pop(unused, None)
    for definition in (schema, *schema.get("$defs", {}).values()):
        for name, below in definition["properties"].items():
            definition["properties"][name] = _or_from_env(below)
    title = "gateway.yaml" if document == "gateway" else "A policy of the gateway"
    return {"$schema": _DIALECT, **schema, "title": title}


def _is_section(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _or_from_env(below: dict[str, Any]) -> dict[str, Any]:
    """One word of a few may also be a `${NAME}` that becomes one."""
    words = {key: below[key] for key in ("enum", "type") if key in below}
    if "enum" not in words:
        return below
    rest = {key: value for key, value in below.items() if key not in words}
    return {"anyOf": [words, {"type": "string", "pattern": FROM_ENV_PATTERN}], **rest}


def _write_as_in_yaml(definition: dict[str, Any], info: FieldInfo) -> None:
    """Defaults appear as one writes them: `2s`, not 2000."""
    if not isinstance(info.default, int) or "default" not in definition:
        return
    for mark in info.metadata:
        reader = getattr(mark, "func", None)
        if isinstance(reader, DurationReader):
            definition["default"] = format_duration(info.default)
        elif isinstance(reader, SizeReader):
            definition["default"] = format_size(info.default)
        elif reader is read_anchor:
            # The natural beginning is written differently for each period.
            del definition["default"]

"""The JSON schema of the configuration, for editors: names, types, descriptions, and the status of each key."""

from __future__ import annotations

from typing import Any

from ds_engine.config.built import State, row_of
from ds_engine.config.built.table import common_row
from ds_engine.config.load.legacy import RENAMES, SCHEMA
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import Key, every_key

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Returns the schema. Every value may also be "auto", and a section may be null or false, which means off."""
    schema = DsConfig.model_json_schema()
    definitions = schema.get("$defs", {})
    done: set[tuple[int, str]] = set()  # sections that are used in several places have one definition
    for key in every_key():
        holder = _object_at(schema, definitions, key.path.rpartition(".")[0])
        if holder is None or (id(holder), key.name) in done:
            continue
        done.add((id(holder), key.name))
        holder["properties"][key.name] = _loosened(holder["properties"][key.name], key)
    for rule in RENAMES:
        parent, _, name = rule.old.rpartition(".")
        holder = _object_at(schema, definitions, parent)
        if holder is not None:
            old = {"deprecated": True, "description": f"Old name of {rule.new}."}
            holder["properties"].setdefault(name, old)
    schema["properties"][SCHEMA] = {"type": "string", "description": "Address of this schema, for editors."}
    zero = schema["properties"]["zero_optimization"]
    zero["anyOf"] = [*zero["anyOf"], {"const": True}]
    return {"$schema": DIALECT, **schema, "title": "ds_config.json"}


def _loosened(value: dict[str, Any], key: Key) -> dict[str, Any]:
    """Also permits "auto", or off for a section, and adds the status of the key to the description."""
    inner = {name: item for name, item in value.items() if name not in ("description", "default", "title")}
    options = inner.pop("anyOf") if set(inner) == {"anyOf"} else [inner]
    more: list[dict[str, Any]] = [{"const": "auto"}]
    if key.section is not None:
        more = [{"const": False}, {"type": "null"}]
    row = row_of(key.path) if key.section is None else common_row(key.path)
    text = key.info.description or ""
    if row is not None and row.state is State.NO_EFFECT:
        text += f" No effect: {row.why}."
    elif row is not None and row.state is State.LATER:
        text += f" Not supported yet; {row.owner} will add it."
    elif row is not None and row.state is State.GONE:
        text += f" Not supported; {row.remedy}."
    loosened: dict[str, Any] = {
        "description": text,
        "anyOf": [*options, *(m for m in more if m not in options)],
    }
    if "default" in value:
        loosened["default"] = value["default"]
    if row is not None:
        loosened["x-owner"] = row.owner
    return loosened


def _object_at(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Returns the object of a section, by its dotted path."""
    here = schema
    for name in path.split(".") if path else []:
        if name == "*":
            inner = here.get("additionalProperties")
        else:
            inner = here.get("properties", {}).get(name)
        resolved = _resolve(inner, definitions)
        if resolved is None:
            return None
        here = resolved
    return here if "properties" in here else None


def _resolve(value: Any, definitions: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the object of a property, through references and alternatives."""
    if not isinstance(value, dict):
        return None
    if "$ref" in value:
        definition: dict[str, Any] = definitions[value["$ref"].rpartition("/")[2]]
        return definition
    for option in value.get("anyOf", []):
        resolved = _resolve(option, definitions)
        if resolved is not None:
            return resolved
    return value if "properties" in value or isinstance(value.get("additionalProperties"), dict) else None

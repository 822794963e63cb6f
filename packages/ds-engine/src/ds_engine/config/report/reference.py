"""The reference page of the configuration, made from the models and the table of what is built."""

from __future__ import annotations

import json
import types
import typing
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_engine.config.built import Row, State, row_of
from ds_engine.config.built.table import common_row, switches, unbuilt_values
from ds_engine.config.load.legacy import EXTRAS, RENAMES
from ds_engine.config.sections.schema import ANY, Key, default_of, join, keys_of, sections

HEAD = """# Configuration reference

Every key of `ds_config.json`, made by `ds config schema --markdown > docs/guide/configuration-reference.md`.
What the settings are for stands in [configuration](configuration.md). Any value may be `"auto"`, for an
integration to fill in.

The last column says what setting a key leads to in this version:

* **works** - it does what it says.
* **no effect** - accepted; the reason stands beside it, and the table at the start names such keys in one line.
* **not yet** - refused as soon as it asks for something, with the package that will have it. What asks for
  nothing (the default, `false`, `"enabled": false`, `null`) is accepted.
* **removed** - refused likewise, with what to use instead.
"""


def reference() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for path, model in sections().items():
        parts.append(_section(path, model))
    parts.append(_old_names())
    return "\n".join(parts)


def _section(path: str, model: type[BaseModel]) -> str:
    title = f"`{path}`" if path else "Top level"
    about = " ".join((model.__doc__ or "").split())
    if not path:
        about = "Batch sizes, precision, gradients, what is printed, and the sections below."
    lines = [
        f"## {title}",
        "",
        about,
        "",
        "| key | value | default | meaning | here |",
        "|---|---|---|---|---|",
    ]
    for key in keys_of(model, path).values():
        where = join(key.path, ANY) if key.named else key.path
        name = f"[`{key.name}`](#{_anchor(where)})" if key.section is not None else f"`{key.name}`"
        meaning = _cell(key.info.description or "")
        lines.append(f"| {name} | {_kind(key)} | {_default(key)} | {meaning} | {_state(key)} |")
    return "\n".join([*lines, ""])


def _anchor(path: str) -> str:
    return path.replace(".", "").replace("*", "").lower()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _state(key: Key) -> str:
    row = row_of(key.path) if key.section is None else common_row(key.path)
    if row is None:
        return "see its section"
    if row.state is State.WORKS:
        return _works(key, row)
    if row.state is State.NO_EFFECT:
        return f"no effect: {_cell(row.why)}"
    if row.state is State.GONE:
        return f"removed; {_cell(row.remedy)}"
    # Keys of a section that is switched elsewhere ask for nothing by themselves.
    asks = any(path == key.path or path.startswith(f"{key.path}.") for path in switches(row))
    return f"not yet: {row.owner}" if asks else f"with its section ({row.owner})"


def _works(key: Key, row: Row) -> str:
    text = f"works; no effect where {_cell(row.otherwise)}" if row.otherwise else "works"
    refusing = unbuilt_values(key.path)
    if refusing is not None:
        text += f"; not yet: {_cell(refusing.why)} ({refusing.owner})"
    return text


def _default(key: Key) -> str:
    if key.info.is_required():
        return "has to be given"
    value = default_of(key)
    if isinstance(value, BaseModel):
        return "as below"
    if value is None:
        return "none"
    text = json.dumps(value)
    return f"`{text}`" if len(text) <= 40 else "see below"


def _kind(key: Key) -> str:
    if key.section is not None:
        return "sections by name" if key.named else "section"
    return _cell(_type_text(key.info.annotation, key.info))


_WORDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    dict: "object",
    list: "list",
}


def _type_text(annotation: Any, info: FieldInfo | None = None) -> str:
    """What may be written, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(option)}`" for option in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_text(option) for option in arguments if option is not type(None))
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return "object"
    text = _WORDS.get(annotation, "any")
    bounds = [_bound(constraint) for constraint in (info.metadata if info is not None else [])]
    return ", ".join([text, *(bound for bound in bounds if bound)])


def _bound(constraint: Any) -> str:
    for name, sign in (("ge", "at least"), ("gt", "more than"), ("le", "at most"), ("lt", "less than")):
        if (value := getattr(constraint, name, None)) is not None:
            return f"{sign} {value}"
    return ""


def _old_names() -> str:
    lines = [
        "## Old names",
        "",
        "Mapped to today's names, most of them with a warning.",
        "",
    ]
    lines += ["| name | means |", "|---|---|"]
    lines += [f"| `{rule.old}` | `{rule.new}` |" for rule in RENAMES]
    lines += [
        "",
        "Ignored with a warning, because they never had an effect:",
        "",
        "| key | why |",
        "|---|---|",
    ]
    lines += [f"| `{path}` | {_cell(why)} |" for path, why in EXTRAS.items()]
    return "\n".join([*lines, ""])

"""Translates pydantic's errors to messages with the keys and values of the file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from ds_engine.config.sections.schema import value_at

_TYPES = frozenset({"int", "float", "bool", "str", "list", "dict"})
_SHOWN_CHARACTERS = 80


def problems(
    error: ValidationError, raw: Mapping[str, Any], *, autos: Collection[str], told: str
) -> Iterator[tuple[str, str]]:
    """Yields path and sentence for each wrong or missing value.

    Args:
        raw: the configuration as written, with current names.
        autos: paths with the value "auto".
        told: earlier messages. A key that is suggested in one of them ("did you mean") is not also reported as
            missing.
    """
    by_path: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_path_of(item["loc"]), []).append(item)
    for path, items in by_path.items():
        if items[0]["type"] != "missing":
            yield path, _explain(path, items, raw)
        elif path in autos:
            yield path, f'{path} is "auto", and no integration has replaced it: set a value'
        elif f'did you mean "{path}"?' not in told:
            yield path, f'"{path}" is missing'


def paths(error: ValidationError) -> list[str]:
    """Returns the dotted paths of the wrong values."""
    return list(dict.fromkeys(_path_of(item["loc"]) for item in error.errors(include_url=False)))


def without(values: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """Returns `values` without the wrong values, and without the sections in which a value is missing."""
    for item in error.errors(include_url=False):
        location = item["loc"][:-1] if item["type"] == "missing" else item["loc"]
        values = _removed(values, location)
    return values


def _removed(values: dict[str, Any], location: tuple[int | str, ...]) -> dict[str, Any]:
    """Returns a copy without the value at the location, or without the enclosing value if the location points into a
    list or past a value.
    """
    if not location or location[0] not in values:
        return values
    name = str(location[0])
    inner = values[name]
    if len(location) > 1 and isinstance(inner, dict) and location[1] in inner:
        return {**values, name: _removed(inner, location[1:])}
    return {key: value for key, value in values.items() if key != name}


def _path_of(location: tuple[int | str, ...]) -> str:
    """Returns the dotted path. pydantic appends names of types for values in a union; these are left out."""
    parts = [str(part) for part in location]
    while len(parts) > 1 and (parts[-1] in _TYPES or "[" in parts[-1]):
        parts.pop()
    return ".".join(parts)


def _explain(path: str, items: list[Any], raw: Mapping[str, Any]) -> str:
    """Returns one message for pydantic's errors about one key, of which there is one for each type that it accepts."""
    written = value_at(raw, path)  # as in the file, because validators may have changed the case
    value = shown(items[0].get("input") if written is None else written)
    for item in items:
        if item["type"] == "value_error":
            return f"{path} is {value}: {item['ctx']['error']}"
    wanted = [_wanted(item) for item in items]
    if None in wanted:
        return f"{path} is {value}: {items[wanted.index(None)]['msg']}"
    return f"{path} is {value}: it must be {' or '.join(dict.fromkeys(str(want) for want in wanted))}"


def _wanted(item: Any) -> str | None:
    context = item.get("ctx", {})
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "less_than_equal": ("at most", "le"),
        "greater_than": ("more than", "gt"),
        "less_than": ("less than", "lt"),
    }
    if item["type"] in bounds:
        words, name = bounds[item["type"]]
        return f"{words} {context[name]:g}"
    if item["type"] == "literal_error":
        options = context["expected"]
        return f"one of {options}" if " or " in options else str(options)
    return {
        "bool_type": "true or false",
        "int_type": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a string in quotes",
        "dict_type": "an object {...}",
        "list_type": "a list [...]",
        "model_type": "an object {...}",
        "model_attributes_type": "an object {...}",
    }.get(item["type"])


def shown(value: Any) -> str:
    """Returns a value as JSON, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print thousands of digits
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."

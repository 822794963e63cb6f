"""From a file, a text or a dict to a `DsConfig`, with every mistake named."""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_engine.config import foreign
from ds_engine.config.errors import ConfigError
from ds_engine.config.model import DsConfig
from ds_engine.config.suggest import closest


def load(config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig) -> DsConfig:
    """Read and check a configuration.

    Args:
        config: path of a JSON file, or the same as a dict, or a ready `DsConfig` (returned as it is).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: not JSON, a key given twice, unknown keys, wrong types or values; all of them at once.
    """
    if isinstance(config, DsConfig):
        return config
    if isinstance(config, Mapping):
        return _build(dict(config), "config")
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError([f"config is a {type(config).__name__}: pass the path of a JSON file, or a dict"])
    path = Path(config)
    return _build(_read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        found = f"; {path.parent} has {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"no configuration file {path}{found}") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            [f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}"], str(path)
        ) from None
    except _DuplicateKeyError as error:
        raise ConfigError(
            [f'key "{error}" is given twice in one section: keep one of them'], str(path)
        ) from None
    if not isinstance(value, dict):
        raise ConfigError([f"holds a {type(value).__name__}, not an object {{...}}"], str(path))
    return value


class _DuplicateKeyError(Exception):
    """JSON allows a key twice and readers keep the last one, so that the first looks set and is not."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _build(raw: dict[str, Any], where: str) -> DsConfig:
    problems: list[str] = []
    known = _known_part(raw, DsConfig, "", problems)
    try:
        config = DsConfig.model_validate(known)
    except ValidationError as error:
        found = [_explain(item) for item in error.errors(include_url=False)]
        # A misspelt key that is required would be told twice, as unknown and as missing.
        told = " ".join(problems)
        problems += [
            text for text in found if f"did you mean {text.removesuffix(' is missing')}?" not in told
        ]
        raise ConfigError(problems, where) from None
    if problems:
        raise ConfigError(problems, where)
    return config


def sections(model: type[BaseModel] = DsConfig, prefix: str = "") -> dict[str, type[BaseModel]]:
    """Dotted path -> model of every section; "" is the top level."""
    found: dict[str, type[BaseModel]] = {prefix: model}
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            found.update(sections(inner, _join(prefix, name)))
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one (`Section` or `Section | None`)."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _known_part(
    raw: dict[str, Any], model: type[BaseModel], path: str, problems: list[str]
) -> dict[str, Any]:
    """`raw` without unknown keys, each of which becomes a problem, so that values are checked in the same
    go.
    """
    kept: dict[str, Any] = {}
    for key, value in raw.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            if not (
                isinstance(key, str) and foreign.is_foreign(path, key) and foreign.asks_for_nothing(value)
            ):
                problems.append(_unknown(path, str(key)))
            continue
        inner = _section_of(field.annotation)
        if inner is not None and isinstance(value, dict):
            value = _known_part(value, inner, _join(path, key), problems)
        kept[key] = value
    return kept


def _unknown(path: str, key: str) -> str:
    """The nearest key of this section, else of another one; a key that exists elsewhere is told where it
    belongs.
    """
    full = _join(path, key)
    every = sections()
    here = list(every[path].model_fields)
    elsewhere = {
        name: section for section, model in every.items() if section != path for name in model.model_fields
    }
    if foreign.is_foreign(path, key):
        return (
            f'"{full}" is a setting of DeepSpeed\'s that this version does not have. It would have no '
            "effect, so it is refused: "
            "remove it, or switch it off"
        )
    if key in elsewhere:
        return f'unknown key "{full}": "{key}" belongs {_place(elsewhere[key])}'
    near, far = closest(key, here), closest(key, elsewhere)
    if near is not None and (far is None or near[1] <= far[1]):
        return f'unknown key "{full}": did you mean "{_join(path, near[0])}"?'
    if far is not None:
        return f'unknown key "{full}": did you mean "{far[0]}", which belongs {_place(elsewhere[far[0]])}?'
    return (
        f'unknown key "{full}": {"this section" if path else "the top level"} has {", ".join(sorted(here))}'
    )


def _place(section: str) -> str:
    return f'under "{section}"' if section else "at the top level"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _explain(item: Any) -> str:
    """Pydantic's finding in the words of the file: path, value, what is wanted."""
    path = ".".join(str(part) for part in item["loc"])
    shown = _shown(item.get("input"))
    kind = item["type"]
    context = item.get("ctx", {})
    if kind == "missing":
        return f'"{path}" is missing'
    if kind == "value_error":
        return f"{path} is {shown}: {context['error']}"
    wanted = {
        "bool_type": "true or false",
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a text in quotes",
        "dict_type": "an object {...}",
        "model_type": "an object {...}",
        "model_attributes_type": "an object {...}",
        "literal_error": f"one of {context.get('expected', '')}",
        "greater_than_equal": f"at least {context.get('ge')}",
    }.get(kind)
    return f"{path} is {shown}: it has to be {wanted}" if wanted else f"{path} is {shown}: {item['msg']}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

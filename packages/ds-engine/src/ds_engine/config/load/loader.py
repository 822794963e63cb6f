"""From a file, a text or a dict to a `DsConfig`, with every mistake named."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_engine.config.built import refusals
from ds_engine.config.load import legacy
from ds_engine.config.load.combinations import COMBINATIONS
from ds_engine.config.load.source import Source, open_source
from ds_engine.config.load.unknown import unknown
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import ANY, Key, join, keys_of, value_at
from ds_engine.config.support import batch
from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.origin import Origin

AUTO = "auto"


def load(config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig) -> DsConfig:
    """Read and check a configuration.

    Args:
        config: path of a file with JSON (comments and trailing commas are welcome); the same as a dict, as a text,
            or as a text in URL-safe base64; or a ready `DsConfig` (returned as it is).

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read, a key is given twice, unknown keys, wrong types or values, settings that
            exclude each other, or that this version does not have; all of them at once.
    """
    if isinstance(config, DsConfig):
        return config
    made, said = build(open_source(config))
    if os.environ.get("RANK", "0") == "0":  # once for a job, not once for each rank
        for text in said:
            warnings.warn(f"{made.origin.where}: {text}", stacklevel=2)
    return made


def build(source: Source) -> tuple[DsConfig, list[str]]:
    """The configuration, and what should be said about it.

    Raises:
        ConfigError: as `load`.
    """
    modern = legacy.modernise({str(key): value for key, value in source.raw.items()})
    found = _Findings(problems=list(modern.problems))
    known = _known_part(modern.raw, DsConfig, "", found)
    origin = Origin(
        where=source.where,
        raw=source.raw,
        lines=source.lines,
        renamed=modern.renamed,
        autos=tuple(found.autos),
        ignored=modern.ignored,
    )
    config: DsConfig | None = None
    try:
        config = DsConfig.model_validate(known).with_origin(origin)
    except ValidationError as error:
        _add_validation(error, found, modern.raw)
    if config is not None:
        found.problems += [(rule.key, rule.sentence) for rule in COMBINATIONS if rule.broken(config)]
        found.problems += refusals(config)
        found.problems += batch.contradictions(
            config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
        )
    if found.problems or config is None:
        ordered = sorted(found.problems, key=lambda problem: origin.line(problem[0]) or 0)
        raise ConfigError([_located(origin, *problem) for problem in ordered], source.where)
    return config, [*modern.warnings, *_remarks(config)]


@dataclass
class _Findings:
    """What came up on the way."""

    problems: list[tuple[str, str]] = field(default_factory=list)
    """Path and sentence."""
    autos: list[str] = field(default_factory=list)


def _known_part(raw: dict[str, Any], model: type[BaseModel], path: str, found: _Findings) -> dict[str, Any]:
    """`raw` without unknown keys, each of which becomes a problem, so that values are checked in the same go;
    without "auto", which is remembered; and without sections that are null or false, which means off.
    """
    kept: dict[str, Any] = {}
    for name, value in raw.items():
        key = keys_of(model, path).get(name) if isinstance(name, str) else None
        if key is None:
            found.problems.append((join(path, str(name)), unknown(path, str(name))))
        elif value == AUTO and isinstance(value, str) and not key.takes_auto:
            found.autos.append(key.path)
        elif key.section is not None and (value is None or value is False):
            continue
        else:
            kept[name] = _inside(key, value, found)
    return kept


def _inside(key: Key, value: Any, found: _Findings) -> Any:
    if key.path in ("optimizer.params", "scheduler.params") and isinstance(value, dict):
        found.autos += [join(key.path, str(name)) for name, inner in value.items() if inner == AUTO]
        kept = {name: inner for name, inner in value.items() if inner != AUTO}
        if value.get("warmup_max_lr") == AUTO and key.path == "scheduler.params":
            kept["warmup_max_lr"] = None  # the rate of each group, which is what integrations fill in
        return kept
    if key.section is None or not isinstance(value, dict):
        return value
    if not key.named:
        return _known_part(value, key.section, key.path, found)
    return {name: _named(key, str(name), inner, found) for name, inner in value.items()}


def _named(key: Key, name: str, value: Any, found: _Findings) -> Any:
    """A section under a name that the user chose; problems show that name."""
    if key.section is None or not isinstance(value, dict):
        return value
    anonymous, before = join(key.path, ANY), len(found.problems)
    kept = _known_part(value, key.section, anonymous, found)
    found.problems[before:] = [
        (path.replace(anonymous, join(key.path, name)), text.replace(anonymous, join(key.path, name)))
        for path, text in found.problems[before:]
    ]
    return kept


def _add_validation(error: ValidationError, found: _Findings, raw: Mapping[str, Any]) -> None:
    # A misspelt key that is required would be told twice, as unknown and as missing.
    told = " ".join(text for _, text in found.problems)
    by_path: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_path_of(item["loc"]), []).append(item)
    for path, items in by_path.items():
        if items[0]["type"] != "missing":
            found.problems.append((path, _explain(path, items, raw)))
        elif path in found.autos:
            found.problems.append((path, f'{path} is "auto", and nothing has filled it in: give a value'))
        elif f'did you mean "{path}"?' not in told:
            found.problems.append((path, f'"{path}" is missing'))


def _path_of(loc: tuple[int | str, ...]) -> str:
    """Dotted; pydantic appends the names of types to what is in a union, which are left out."""
    parts = [str(part) for part in loc]
    while len(parts) > 1 and (parts[-1] in _TYPES or "[" in parts[-1]):
        parts.pop()
    return ".".join(parts)


_TYPES = frozenset({"int", "float", "bool", "str", "list", "dict"})


def _explain(path: str, items: list[Any], raw: Mapping[str, Any]) -> str:
    """Pydantic's findings for one key, one for each kind of value that it may have, in the words of the file."""
    written = value_at(raw, path)  # as in the file, where case may have been changed since
    shown = _shown(items[0].get("input") if written is None else written)
    for item in items:
        if item["type"] == "value_error":
            return f"{path} is {shown}: {item['ctx']['error']}"
    wanted = [_wanted(item) for item in items]
    if None in wanted:
        return f"{path} is {shown}: {items[wanted.index(None)]['msg']}"
    return f"{path} is {shown}: it has to be {' or '.join(dict.fromkeys(str(want) for want in wanted))}"


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
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a text in quotes",
        "dict_type": "an object {...}",
        "list_type": "a list [...]",
        "model_type": "an object {...}",
        "model_attributes_type": "an object {...}",
    }.get(item["type"])


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _located(origin: Origin, path: str, sentence: str) -> str:
    line = origin.line(path)
    return f"line {line}: {sentence}" if line is not None else sentence


def _remarks(config: DsConfig) -> list[str]:
    size = config.vocabulary_size
    if size is not None and size % 8:
        return [
            f"vocabulary_size is {size}: tensor cores work on multiples of 8, so {-(-size // 8) * 8} rows may be faster"
        ]
    return []

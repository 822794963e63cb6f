"""Reads a file, a string or a dict into a `DsConfig`, and reports all mistakes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from ds_engine.config.built import refusals
from ds_engine.config.elastic import section as elastic
from ds_engine.config.load import arguments, legacy, violations
from ds_engine.config.load.combinations import COMBINATIONS
from ds_engine.config.load.source import Source, open_source
from ds_engine.config.load.unknown import is_misspelt, unknown
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import ANY, Key, join, keys_of
from ds_engine.config.support import batch
from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.origin import Origin

AUTO = "auto"

UNKNOWN_KEYS_EXPLAINED = 20
"""Maximum number of unknown keys with a sentence each. The search for the nearest key takes milliseconds, and a file
with a hundred thousand unknown keys is not a configuration.
"""

Problem = tuple[str, str]
"""Dotted path of a key as written, and a sentence about it."""


def load(
    config: str | os.PathLike[str] | Mapping[str, Any] | DsConfig, *, foreign_keys: bool = False
) -> DsConfig:
    """Reads and checks a configuration.

    Args:
        config: path of a JSON file (comments and trailing commas are allowed); a dict; a JSON string; JSON in
            URL-safe base64; or a `DsConfig`, which is returned unchanged.
        foreign_keys: ignore unknown keys at the top level, as DeepSpeed does, with one warning that names them. A key
            that resembles a known one is still an error.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file cannot be parsed, a key is given twice or unknown, a type or value is wrong, settings
            exclude each other, or this version does not support a setting. The message lists all mistakes.
    """
    if isinstance(config, DsConfig):
        return config
    return accept(examine(open_source(config), foreign_keys=foreign_keys))


def accept(examined: Examined, more: Iterable[str] = ()) -> DsConfig:
    """Returns the configuration, and issues its remarks as warnings.

    Args:
        more: further mistakes, in addition to those of `examined`.

    Raises:
        ConfigError: lists all mistakes.
    """
    problems = [*examined.problems, *more]
    if examined.config is None or problems:
        raise ConfigError(problems, examined.origin.where)
    if os.environ.get("RANK", "0") == "0":  # once per job, not once per rank
        for text in examined.remarks:
            warnings.warn(f"{examined.origin.where}: {text}", stacklevel=3)
    return examined.config


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A configuration with its mistakes and remarks."""

    config: DsConfig | None
    """The configuration with defaults in place of wrong values; None if that is impossible."""
    origin: Origin
    problems: tuple[str, ...]
    """One sentence for each mistake, with its line, in the order of the lines."""
    remarks: tuple[str, ...]
    """Sentences to issue as warnings."""


def examine(source: Source, *, foreign_keys: bool = False) -> Examined:
    """Checks a configuration without raising; arguments as for `load`."""
    modern = legacy.modernise({str(key): value for key, value in source.raw.items()})
    findings = _Findings(problems=list(modern.problems), foreign_keys=foreign_keys)
    known = _known_part(modern.raw, DsConfig, "", findings)
    origin = Origin(
        where=source.where,
        raw=source.raw,
        lines=source.lines,
        renamed=modern.renamed,
        autos=tuple(findings.autos),
        ignored={**modern.ignored, **dict.fromkeys(findings.foreign, "DeepSpeed reads no such key")},
    )
    config, wrong = _validate(known, modern.raw, findings)
    if config is not None:
        config = config.with_origin(origin)
        findings.problems += [p for p in _conflicts(config) if not _follows_from(p, wrong)]
    findings.problems += arguments.mistakes(modern.raw)
    if findings.unexplained:
        findings.problems.append(("", f"and {findings.unexplained:,} more unknown keys"))
    return Examined(
        config=config,
        origin=origin,
        problems=tuple(_located(origin, *problem) for problem in _in_order(findings.problems, origin)),
        remarks=(*modern.warnings, *_foreign(findings.foreign), *(_remarks(config) if config else ())),
    )


@dataclass
class _Findings:
    """The mistakes and remarks collected so far."""

    problems: list[Problem] = field(default_factory=list)
    autos: list[str] = field(default_factory=list)
    foreign_keys: bool = False
    foreign: dict[str, str] = field(default_factory=dict)
    """Key of the top level that belongs to another program -> sentence about it."""
    unexplained: int = 0
    """Number of unknown keys without a sentence."""
    unknown_keys: int = 0

    def add_unknown(self, path: str, name: str) -> None:
        self.unknown_keys += 1
        many = self.unknown_keys > UNKNOWN_KEYS_EXPLAINED
        if self.foreign_keys and not path and (many or not is_misspelt(name)):
            self.foreign[name] = "" if many else unknown(path, name)
        elif many:
            self.unexplained += 1
        else:
            self.problems.append((join(path, name), unknown(path, name)))


def _known_part(
    raw: dict[str, Any], model: type[BaseModel], path: str, findings: _Findings
) -> dict[str, Any]:
    """Returns `raw` without unknown keys, which are recorded as problems, so that the remaining values can be checked
    in the same run; without "auto", which is recorded; and without sections that are null or false, which means off.
    """
    kept: dict[str, Any] = {}
    for name, value in raw.items():
        key = keys_of(model, path).get(name) if isinstance(name, str) else None
        if key is None:
            findings.add_unknown(path, str(name))
        elif value == AUTO and isinstance(value, str) and not key.takes_auto:
            findings.autos.append(key.path)
        elif key.section is not None and (value is None or value is False):
            continue
        else:
            kept[name] = _inside(key, value, findings)
    return kept


def _inside(key: Key, value: Any, findings: _Findings) -> Any:
    if key.path in arguments.SECTIONS and isinstance(value, dict):
        findings.autos += [join(key.path, str(name)) for name, inner in value.items() if inner == AUTO]
        kept = {name: inner for name, inner in value.items() if inner != AUTO}
        if value.get("warmup_max_lr") == AUTO and key.path == "scheduler.params":
            kept["warmup_max_lr"] = None  # the learning rate of each group, which integrations set
        return kept
    if key.section is None or not isinstance(value, dict):
        return value
    if not key.named:
        return _known_part(value, key.section, key.path, findings)
    return {name: _named(key, str(name), inner, findings) for name, inner in value.items()}


def _named(key: Key, name: str, value: Any, findings: _Findings) -> Any:
    """Handles a section under a name that the user chose; problems contain that name."""
    if key.section is None or not isinstance(value, dict):
        return value
    anonymous, before = join(key.path, ANY), len(findings.problems)
    kept = _known_part(value, key.section, anonymous, findings)
    findings.problems[before:] = [
        (path.replace(anonymous, join(key.path, name)), text.replace(anonymous, join(key.path, name)))
        for path, text in findings.problems[before:]
    ]
    return kept


def _validate(
    known: dict[str, Any], raw: Mapping[str, Any], findings: _Findings
) -> tuple[DsConfig | None, tuple[str, ...]]:
    """Returns the configuration without the wrong values, and the paths of these."""
    try:
        return DsConfig.model_validate(known), ()
    except ValidationError as error:
        # A required key that is misspelt would be reported twice, as unknown and as missing.
        told = " ".join(text for _, text in findings.problems)
        findings.problems += violations.problems(error, raw, autos=findings.autos, told=told)
        wrong = tuple(violations.paths(error))
        rest = violations.without(known, error)
    try:
        return DsConfig.model_validate(rest), wrong
    except ValidationError:
        return None, wrong


def _conflicts(config: DsConfig) -> Iterable[Problem]:
    """Yields values that are valid alone, but exclude each other, or need a feature that does not exist."""
    yield from [(rule.key, rule.sentence) for rule in COMBINATIONS if rule.broken(config)]
    yield from refusals(config)
    if config.elasticity.enabled:
        yield from elastic.mistakes(config)
    else:
        yield from batch.contradictions(
            config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
        )


def _follows_from(problem: Problem, wrong: Iterable[str]) -> bool:
    """Whether a problem may exist only because a wrong value was replaced by its default."""
    path, sentence = problem
    return any(path == other or other.rpartition(".")[2] in sentence for other in wrong)


def _in_order(problems: list[Problem], origin: Origin) -> list[Problem]:
    end = max(origin.lines.values(), default=0) + 1
    return sorted(problems, key=lambda p: (origin.line(p[0]) or 0) if p[0] else end)


def _located(origin: Origin, path: str, sentence: str) -> str:
    line = origin.line(path)
    return f"line {line}: {sentence}" if line is not None else sentence


def _foreign(keys: Mapping[str, str]) -> list[str]:
    """Returns one warning for all keys that are not DeepSpeed's, with hints for those that are in the wrong section."""
    if not keys:
        return []
    named = [f'"{name}"' for name in keys]
    if len(named) > UNKNOWN_KEYS_EXPLAINED:
        named[UNKNOWN_KEYS_EXPLAINED:] = [f"and {len(named) - UNKNOWN_KEYS_EXPLAINED:,} more"]
    hints = [
        text.removeprefix("unknown key ")
        for text in keys.values()
        if '": keys are nested' in text or '" belongs under ' in text
    ]
    more = f" ({'; '.join(hints)})" if hints else ""
    return [f"ignored, because DeepSpeed has no such key at the top level: {', '.join(named)}{more}"]


def _remarks(config: DsConfig) -> list[str]:
    size = config.vocabulary_size
    if size is not None and size % 8:
        return [
            f"vocabulary_size is {size}: tensor cores work on multiples of 8 rows, so {-(-size // 8) * 8} rows "
            "may be faster"
        ]
    return []

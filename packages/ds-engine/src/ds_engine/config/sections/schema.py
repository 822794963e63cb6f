"""The keys of the configuration as data: what a walk over the models finds."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_engine.config.sections.model import DsConfig
from ds_engine.config.support.section import Section

ANY = "*"
"""Stands in a path for a name that the user chooses."""


@dataclass(frozen=True)
class Key:
    """One key of one section."""

    path: str
    """Dotted, from the top."""
    info: FieldInfo
    section: type[BaseModel] | None
    """The section that it holds, if it holds one."""
    named: bool
    """It holds sections under names that the user chooses."""

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def takes_auto(self) -> bool:
        """Whether "auto" is one of its own values, not one that something has to fill in."""
        return _has_auto(self.info.annotation)


def join(path: str, key: str) -> str:
    """Path of a key in the section `path`; "" is the top level."""
    return f"{path}.{key}" if path else key


@cache
def keys_of(model: type[BaseModel], path: str = "") -> Mapping[str, Key]:
    """Name -> key of one section, as written in the file."""
    keys = {}
    for name, info in model.model_fields.items():
        written = info.alias or name
        section, named = _section_in(info.annotation)
        keys[written] = Key(join(path, written), info, section, named)
    return keys


@cache
def sections() -> Mapping[str, type[BaseModel]]:
    """Dotted path -> model of every section; "" is the top level."""
    models: dict[str, type[BaseModel]] = {"": DsConfig}
    for key in every_key():
        if key.section is not None:
            models[join(key.path, ANY) if key.named else key.path] = key.section
    return models


@cache
def every_key() -> tuple[Key, ...]:
    """All keys, sections before what is in them."""
    return tuple(_walk(DsConfig, ""))


def _walk(model: type[BaseModel], path: str) -> Iterator[Key]:
    for key in keys_of(model, path).values():
        yield key
        if key.section is not None:
            yield from _walk(key.section, join(key.path, ANY) if key.named else key.path)


@cache
def by_path() -> Mapping[str, Key]:
    """Dotted path -> key."""
    return {key.path: key for key in every_key()}


def default_of(key: Key) -> Any:
    """The value that is used where the key is left out."""
    return key.info.get_default(call_default_factory=True)


def value_at(config: BaseModel | Mapping[str, Any] | None, path: str) -> Any:
    """The value at a dotted path; None where a section on the way is missing."""
    here: Any = config
    for name in path.split("."):
        if isinstance(here, BaseModel):
            here = getattr(here, _field_name(type(here), name))
        elif isinstance(here, Mapping):
            here = here.get(name)
        else:
            return None
    return here


def _field_name(model: type[BaseModel], written: str) -> str:
    for name, info in model.model_fields.items():
        if written == (info.alias or name):
            return name
    raise KeyError(written)


def given(config: BaseModel, path: str = "") -> Iterator[str]:
    """Paths of the values that were set, not left to defaults; a section counts by what is in it."""
    for name, info in type(config).model_fields.items():
        if name in config.model_fields_set:
            here = join(path, info.alias or name)
            inner = getattr(config, name)
            yield from _given_in(inner, here)


def _given_in(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Section):
        inner = list(given(value, path))
        yield from inner or [path]
    elif isinstance(value, dict) and value and all(isinstance(v, Section) for v in value.values()):
        for name, section in value.items():
            yield from _given_in(section, join(path, name))
    else:
        yield path


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds (`Section`, `Section | None`, `dict[str, Section]`), and whether by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and len(arguments) == 2:
        return _section_in(arguments[1])[0], True
    if isinstance(annotation, types.UnionType):
        for option in arguments:
            section = _section_in(option)
            if section[0] is not None:
                return section
    return None, False


def _has_auto(annotation: Any) -> bool:
    if typing.get_origin(annotation) is Literal:
        return "auto" in typing.get_args(annotation)
    return any(_has_auto(a) for a in typing.get_args(annotation) if a is not Ellipsis)

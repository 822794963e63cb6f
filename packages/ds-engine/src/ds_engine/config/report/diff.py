"""Compares two configurations by their meaning, not by their spelling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import join


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that differs."""

    path: str
    first: Any
    second: Any


def diff(first: DsConfig, second: DsConfig, *, ranks: int | None = None) -> list[Difference]:
    """Returns the differences, in the order of the schema. Neither a default that is written explicitly nor an old
    name is a difference.

    Args:
        ranks: number of data-parallel ranks for which batch sizes are computed and compared.

    Raises:
        ConfigError: the batch sizes of one configuration do not fit the number of ranks.
    """
    values = [_values(config, ranks) for config in (first, second)]
    differences = []
    for path in dict.fromkeys([*values[0], *values[1]]):
        a, b = (v.get(path) for v in values)
        if a != b or isinstance(a, bool) != isinstance(b, bool):
            differences.append(Difference(path=path, first=a, second=b))
    return differences


def _values(config: DsConfig, ranks: int | None) -> dict[str, Any]:
    values = dict(_flat(config, ""))
    if ranks is not None:
        batch = config.batch(ranks)
        values["train_batch_size"] = batch.train
        values["train_micro_batch_size_per_gpu"] = batch.micro
        values["gradient_accumulation_steps"] = batch.steps
    for path in config.origin.autos:
        values[path] = "auto"
    return values


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            yield from _flat(getattr(value, name), join(path, info.alias or name))
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, join(path, str(name)))
    elif isinstance(value, (list, tuple)):
        yield path, [*value]
    elif value != {}:
        yield path, value

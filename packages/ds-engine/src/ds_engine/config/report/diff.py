"""Two configurations compared by what they mean, not by how they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import join


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same."""

    path: str
    first: Any
    second: Any


def diff(first: DsConfig, second: DsConfig, *, ranks: int | None = None) -> list[Difference]:
    """What differs, in the order of the schema: a default that is written out is no difference, nor is an old name.

    Args:
        ranks: compare the batch sizes as they come out on so many ranks.

    Raises:
        ConfigError: the batch sizes of one do not fit the ranks.
    """
    values = [_values(config, ranks) for config in (first, second)]
    found = []
    for path in dict.fromkeys([*values[0], *values[1]]):
        a, b = (v.get(path) for v in values)
        if a != b or isinstance(a, bool) != isinstance(b, bool):
            found.append(Difference(path=path, first=a, second=b))
    return found


def _values(config: DsConfig, ranks: int | None) -> dict[str, Any]:
    found = dict(_flat(config, ""))
    if ranks is not None:
        batch = config.batch(ranks)
        found["train_batch_size"] = batch.train
        found["train_micro_batch_size_per_gpu"] = batch.micro
        found["gradient_accumulation_steps"] = batch.steps
    for path in config.origin.autos:
        found[path] = "auto"
    return found


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

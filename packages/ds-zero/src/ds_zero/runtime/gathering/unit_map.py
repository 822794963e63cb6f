"""Which buckets each unit of stage 3 gathers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ds_zero.runtime.bucket import Bucket


@dataclass(frozen=True, kw_only=True)
class UnitMap:
    """The units of a model and their buckets. A unit is a module whose parameters are gathered together."""

    buckets: Mapping[str, list[Bucket]]
    """Name of a module -> the buckets to gather for it, for all units and all modules with sharded parameters of their
    own."""
    units: frozenset[str]
    """Names of the units; the other names in `buckets` are modules inside of units."""
    leaves: frozenset[str] = frozenset()
    """Names of the units that are leaf modules."""

    def is_leaf(self, name: str) -> bool:
        return name in self.leaves


def map_units(
    model: nn.Module, units: Mapping[str, nn.Module], buckets: Sequence[Bucket], leaves: set[str]
) -> UnitMap:
    """Returns the buckets of every unit and every module with sharded parameters of its own.

    A unit also gathers parameters that its modules share with other units (a head tied to the embedding).
    """
    bucket_of = {id(p): b for b in buckets if not b.whole for p in b.params}
    buckets_of: dict[str, list[Bucket]] = {}
    for name, module in model.named_modules() if bucket_of else ():
        own = [p for p in module.parameters(recurse=False) if id(p) in bucket_of]
        if name in units:
            own = [p for p in _params_of_unit(name, module, units) if id(p) in bucket_of]
        unique = {id(bucket_of[id(p)]): bucket_of[id(p)] for p in own}
        if unique:
            buckets_of[name] = list(unique.values())
    return UnitMap(buckets=buckets_of, units=frozenset(units), leaves=frozenset(leaves & set(units)))


def _params_of_unit(name: str, module: nn.Module, units: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Returns the parameters of `module` and its submodules, without those of units inside of it."""
    prefix = f"{name}." if name else ""
    inner = [u for u in units if u != name and u.startswith(prefix)]
    return [
        p
        for n, p in module.named_parameters(remove_duplicate=False)
        if not any(f"{prefix}{n}".startswith(f"{u}.") for u in inner)
    ]

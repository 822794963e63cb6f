"""Loads whole values by name into a sharded model; the inverse of `full_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.interfaces import EVERYWHERE, Coordinates
from ds_zero.params.records import BUFFER, PARAM, load_records


class _Values:
    """A state_dict as a source of records. A stacked parameter is given whole."""

    def __init__(self, values: Mapping[str, Tensor], buffers: frozenset[str]) -> None:
        self._values, self._buffers = values, buffers

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        value = self._values.get(fqn)
        if value is None:
            return {}
        return {BUFFER if fqn in self._buffers else PARAM: (tuple(value.shape), value.dtype)}

    def read(
        self, fqn: str, state: str, start: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        # Every rank has the values of its own coordinates.
        out.copy_(self._values[fqn].detach().reshape(-1)[start : start + out.numel()])


def load_full_state_dict(model: nn.Module, values: Mapping[str, Tensor], *, strict: bool = True) -> list[str]:
    """Loads whole values into the model, its masters and the shards of all ranks. Collective; every rank must pass
    `values`.

    A tied parameter may be given under any of its names. Optimizer states do not change.

    Returns:
        Names of the model that are not in `values`, whose tensors are unchanged; empty if `strict`.

    Raises:
        ValueError: with `strict`, names are missing or unexpected; or a shape differs. Nothing was changed.
    """
    state = _registry.state_of(model)
    by_first = dict(values)
    for first, names in state.names.items():
        given = next((values[name] for name in names if name in values), None)
        if given is not None:
            by_first[first] = given
    own = set(model.state_dict(keep_vars=True))
    params = set(state.names)
    buffers = frozenset(own & {name for name, _ in model.named_buffers()})
    missing = sorted((params | buffers) - by_first.keys())
    unexpected = sorted(by_first.keys() - own - params)
    if strict and (missing or unexpected):
        raise ValueError(
            f"the values do not fit the model: {len(missing)} names are missing, first {missing[:5]}; "
            f"{len(unexpected)} are unexpected, first {unexpected[:5]}; pass strict=False to load the matching ones"
        )
    load_records(model, None, _Values(by_first, buffers), optimizer_states=False, keep=frozenset(missing))
    return missing

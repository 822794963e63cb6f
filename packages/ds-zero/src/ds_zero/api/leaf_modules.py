"""Marks modules that stage 3 gathers whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ds_zero import _registry
from ds_zero.layout.units import Leaf, leaf_names


def set_leaf_modules(model: nn.Module, leaves: Sequence[Leaf]) -> list[nn.Module]:
    """Mark modules whose whole subtree stage 3 gathers at once, before `shard`; the modules found.

    For modules that call different children on different ranks, such as a mixture of experts:
    [Note: leaf modules]. The usual ones are found without this. As `ZeroConfig.leaf_modules`.

    Raises:
        ValueError: an entry that matches no module.
    """
    names = leaf_names(model, tuple(leaves))
    found = [module for name, module in model.named_modules() if name in names]
    for module in found:
        _registry.mark_leaf(module)
    return found

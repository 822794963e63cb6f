"""Marks modules that stage 3 gathers as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ds_zero import _registry
from ds_zero.layout.units import Leaf, leaf_names


def set_leaf_modules(model: nn.Module, leaves: Sequence[Leaf]) -> list[nn.Module]:
    """Marks modules that stage 3 gathers as a whole, with all their submodules. Returns the marked modules.

    Call it before `shard`, for modules that run different children on different ranks, such as mixtures of experts:
    [Note: leaf modules]. Common classes are detected automatically. `ZeroConfig.leaf_modules` does the same.

    Raises:
        ValueError: an entry that matches no module.
    """
    names = leaf_names(model, tuple(leaves))
    marked = [module for name, module in model.named_modules() if name in names]
    for module in marked:
        _registry.mark_leaf(module)
    return marked

"""Which submodules of a model are its layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns the children of the outermost lists of a model, in order."""
    if not isinstance(model, _LISTS):
        return [layer for child in model.children() for layer in layers_of(child)]
    return [
        layer
        for child in model.children()
        for layer in (layers_of(child) if isinstance(child, _LISTS) else [child])
    ]


def named_layers(model: nn.Module, layers: Sequence[nn.Module | str]) -> list[nn.Module]:
    """Returns the submodules that `layers` names or contains.

    Raises:
        ValueError: the model has no such submodule.
    """
    modules = dict(model.named_modules())
    own = set(modules.values())
    chosen = []
    for layer in layers:
        module = modules.get(layer) if isinstance(layer, str) else layer
        if module is None or module not in own:
            name = repr(layer) if isinstance(layer, str) else type(layer).__name__
            raise ValueError(
                f"layers: {type(model).__name__} has no submodule {name}. Its layers are "
                f"{', '.join(repr(n) for n, m in modules.items() if m in set(layers_of(model))) or 'not in lists'}"
            )
        chosen.append(module)
    return chosen

"""Layers that are constructed later, on the ranks that own them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Layer = Any
"""A `LayerSpec`, a module, or a callable without parameters."""


class LayerSpec:
    """A module that is constructed only where it is needed: `typename(*module_args, **module_kwargs)`."""

    def __init__(self, typename: Callable[..., nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        """Takes the class of the module, and the arguments of its constructor.

        Raises:
            TypeError: `typename` is a module, or cannot be called.
        """
        if isinstance(typename, nn.Module) or not callable(typename):
            raise TypeError(
                f"LayerSpec takes the class of a module and its arguments, got {type(typename).__name__}; put a "
                "module that exists already into the list as it is"
            )
        self.typename = typename
        self.module_args = module_args
        self.module_kwargs = module_kwargs

    def build(self) -> nn.Module:
        """Constructs the module."""
        return self.typename(*self.module_args, **self.module_kwargs)

    @property
    def name(self) -> str:
        """Name of the class."""
        return getattr(self.typename, "__name__", type(self.typename).__name__)

    def __repr__(self) -> str:
        """Shows the constructor's call."""
        arguments = [*map(repr, self.module_args), *(f"{k}={v!r}" for k, v in self.module_kwargs.items())]
        return f"{self.name}({', '.join(arguments)})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares weights with all others of the same `key`, for example the embedding with the head."""

    def __init__(
        self,
        key: str,
        typename: Callable[..., nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        """As `LayerSpec`.

        Args:
            key: layers with the same key are tied. Those of one rank are one module.
            typename: class of the module.
            *module_args: arguments of its constructor.
            forward_fn: called with the module and its input. None: the module is called.
            tied_weight_attr: names of the parameters that are shared, dotted if they are in submodules.
            **module_kwargs: arguments of its constructor.
        """
        super().__init__(typename, *module_args, **module_kwargs)
        self.key = key
        self.forward_fn = forward_fn
        self.tied_weight_attr = (
            (tied_weight_attr,) if isinstance(tied_weight_attr, str) else tuple(tied_weight_attr)
        )

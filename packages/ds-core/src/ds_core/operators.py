"""Native kernels as operators of torch, so that whatever watches operators (profilers that count FLOPs, fake tensors,
torch.compile) sees them. They have no gradients of their own: callers use them inside of a `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Operator:
    """One operator. All functions have the arguments of the operator."""

    kernel: Callable[..., Any]
    """Computes the results."""
    shapes: Callable[..., Any]
    """Returns tensors of the right shapes with any values."""
    macs: Callable[..., int]
    """Returns the number of multiply-adds."""
    on_gpu: bool = False
    """Whether `kernel` also takes tensors on a GPU."""


class Operators:
    """Operators under "ds_core::", which last as long as this object. Make it once for each name, at the first use:
    importing a package registers nothing.
    """

    def __init__(self, of: Mapping[str, Operator]) -> None:
        """
        Args:
            of: by signatures, such as "name(Tensor x) -> Tensor".
        """
        from torch.utils.flop_counter import register_flop_formula

        self._library = torch.library.Library("ds_core", "FRAGMENT")
        self.call = torch.ops.ds_core
        """The operators by their names."""
        for signature, operator in of.items():
            name = self._library.define(signature)
            for key in ("CPU", "CUDA") if operator.on_gpu else ("CPU",):
                self._library.impl(name, operator.kernel, key)
            self._library.impl(name, operator.shapes, "Meta")
            register_flop_formula(getattr(self.call, name), get_raw=True)(_flops(operator.macs))


def _flops(macs: Callable[..., int]) -> Callable[..., int]:
    def flops(*args: Any, out_val: Any = None) -> int:
        return 2 * macs(*args)

    return flops

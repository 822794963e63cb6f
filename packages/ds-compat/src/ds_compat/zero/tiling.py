"""`deepspeed.zero.TiledLinear`: a layer with one weight, which also provides DeepSpeed's tiles as views of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ds_layers
from ds_compat.zero.construction import GatheredParameters


def _bounds(size: int, parts: int) -> list[int]:
    """Returns the boundaries of `parts` nearly equal parts of `size` elements: `parts` + 1 numbers."""
    small, larger = divmod(size, parts)
    return [i * small + min(i, larger) for i in range(parts + 1)]


class TiledLinear(ds_layers.TiledLinear):
    """See `ds_layers.TiledLinear`. It can also copy values from sharded layers, and has DeepSpeed's `linears`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, in_splits, out_splits, *args, **kwargs)
        self.in_splits = in_splits
        self.in_parts, self.out_parts = _bounds(in_features, in_splits), _bounds(out_features, out_splits)

    @property
    def linears(self) -> list[list[nn.Linear]]:
        """The tiles, indexed [part of the output][part of the input]: new layers whose weights are views of the one
        weight, so writing to a tile writes to the weight. The last tile of each row has the bias.
        """
        return [
            [self._tile(row, column) for column in range(self.in_splits)] for row in range(self.out_splits)
        ]

    def _tile(self, row: int, column: int) -> nn.Linear:
        outs = slice(self.out_parts[row], self.out_parts[row + 1])
        ins = slice(self.in_parts[column], self.in_parts[column + 1])
        has_bias = self.bias is not None and column == self.in_splits - 1
        tile = nn.Linear(ins.stop - ins.start, outs.stop - outs.start, has_bias, device="meta")
        tile.weight = _part(self.weight, (outs, ins))
        if has_bias:
            tile.bias = _part(self.bias, (outs,))
        return tile

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        with GatheredParameters([*self.parameters(), *other.parameters()], modifier_rank=0):
            super().copy_params_from(other)


class TiledLinearReturnBias(TiledLinear):
    """A TiledLinear that returns the product without bias, and the bias."""

    def forward(self, input: Any) -> Any:
        return nn.functional.linear(self.whole(input), self.weight), self.bias


def _part(param: Tensor, where: tuple[slice, ...]) -> nn.Parameter:
    """Returns a parameter that is a view of a part of `param`, with that part of its gradient."""
    part = nn.Parameter(param.detach()[where], param.requires_grad)
    if param.grad is not None:
        part.grad = param.grad[where]
    return part

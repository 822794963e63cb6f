"""A linear layer whose input or output is split into several tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TiledLinear(nn.Linear):
    """A linear layer with the interface of DeepSpeed's `TiledLinear`: its input or output is split into several
    tensors.

    DeepSpeed splits the weight into tiles and gathers them one by one at ZeRO stage 3. This class keeps one weight.

    Args:
        in_splits: number of parts of the input, at most `in_features`.
        out_splits: number of parts of the output, along the last dimension, if `combine_out_splits` is False.
        input_is_already_split: the input is a sequence of parts, not one tensor.
        init_linear: a layer of the same size whose values are copied.

    Raises:
        RuntimeError: more parts than features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: type[nn.Linear] = nn.Linear,
        init_linear: nn.Linear | None = None,
        **_: Any,
    ) -> None:
        if in_splits < 1 or in_splits > in_features:
            raise RuntimeError("in splits must be in range [1, in_features].")
        if out_splits < 1 or out_splits > out_features:
            raise RuntimeError("out splits must be in range [1, out_features].")
        super().__init__(in_features, out_features, bias)
        self.split_input, self.combine_out_splits, self.out_splits = (
            input_is_already_split,
            combine_out_splits,
            out_splits,
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def whole(self, input: Any) -> Tensor:
        """Returns the input as one tensor of shape (..., in_features)."""
        return torch.cat(list(input), dim=-1) if self.split_input else input

    def forward(self, input: Any) -> Any:
        """Returns a tensor of shape (..., out_features), or a list of its parts."""
        output = super().forward(self.whole(input))
        return output if self.combine_out_splits else list(output.tensor_split(self.out_splits, dim=-1))

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        """Copies the values of a linear layer of the same size."""
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)

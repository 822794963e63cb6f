"""`deepspeed.runtime.sequence_parallel.ulysses_sp`: functions of single tokens over one part of the sequence at a time.

`compute_params` of these functions is of no use here: ds_zero counts how often the gradient of a parameter arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_layers import outputs_of_tiles, tiled_loss, tiled_over_sequence


class TiledMLP:
    """`TiledMLP.apply(forward, mlp, x, shards, compute_params)`, as code puts it into the MLPs of a model."""

    @staticmethod
    def apply(
        fn: Callable[[nn.Module, Tensor], Tensor],
        self: nn.Module,
        x: Tensor,
        shards: int,
        compute_params: Any = None,
    ) -> Tensor:
        """`fn(self, x)`, x: (..., tokens, features)."""
        return tiled_over_sequence(lambda part: fn(self, part), x, shards)


class TiledFusedLogitsLoss:
    """`TiledFusedLogitsLoss.apply(loss, head, x, y, mask, shards, compute_params, "sum")`."""

    @staticmethod
    def apply(
        fn: Callable[..., Tensor],
        self: Any,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None,
        shards: int,
        compute_params: Any = None,
        output_reduction: Any = "mean",
    ) -> Tensor:
        """The mean or sum of `fn(self, x, y)` over parts of the sequence, with a part of `mask` where there is one."""
        tensors = [x, y] if mask is None else [x, y, mask]
        return tiled_loss(
            lambda *parts: fn(self, *parts), *tensors, num_tiles=shards, reduction=output_reduction
        )


def sequence_tiled_compute(
    fn: Callable[..., Tensor],
    seqlen: int,
    shards: int,
    kwargs_to_shard: Mapping[str, Tensor],
    kwargs_to_pass: Mapping[str, Any],
    grad_requiring_tensor_key: str,
    compute_params: Any = None,
    output_unshard_dimension: int = 1,
    output_reduction: str | None = "mean",
) -> Tensor:
    """`fn(**kwargs_to_shard, **kwargs_to_pass)` over parts of the sequence.

    Args:
        seqlen: tokens of the tensors in `kwargs_to_shard`, which are (batch, tokens, ...).
        grad_requiring_tensor_key: of no use here.
        output_unshard_dimension: where outputs of parts are put together; 0 for numbers.
        output_reduction: "mean" or "sum" of the outputs; None: they are put together.
    """
    lengths = {name: tensor.shape[1] for name, tensor in kwargs_to_shard.items()}
    wrong = {name: length for name, length in lengths.items() if length != seqlen}
    if wrong:
        raise ValueError(f"seqlen is {seqlen}, and kwargs_to_shard has tensors of other lengths: {wrong}")

    def call(*parts: Tensor) -> Tensor:
        return fn(**dict(zip(kwargs_to_shard, parts, strict=True)), **kwargs_to_pass)

    tensors = list(kwargs_to_shard.values())
    if output_reduction is not None:
        reduction: Any = output_reduction
        return tiled_loss(call, *tensors, num_tiles=shards, reduction=reduction)
    outputs = outputs_of_tiles(call, tensors, shards, dim=1)
    if output_unshard_dimension == 0 and outputs[0].ndim == 0:
        return torch.stack(outputs)
    return torch.cat(outputs, output_unshard_dimension)

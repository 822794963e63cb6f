"""The memory of a parameter, as 1-D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a `DTensor`, and other tensors themselves."""
    to_local: Any = getattr(tensor, "to_local", None)
    result: Tensor = to_local() if to_local is not None else tensor
    return result.detach()


def like(param: Tensor, values: Tensor) -> Tensor:
    """Returns `values` as a `DTensor` placed like `param` if that is one: the inverse of `local`."""
    if not hasattr(param, "to_local"):
        return values
    from torch.distributed.tensor import DTensor

    assert isinstance(param, DTensor)
    made: Tensor = DTensor.from_local(
        values, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    return made


def flat(tensor: Tensor) -> Tensor:
    """Returns a 1-D view of all elements, in the order in which they are in memory.

    Raises:
        ValueError: the tensor has gaps in memory.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"PagedOptimizer needs parameters without gaps in memory, but one of shape {tuple(tensor.shape)} has "
            f"strides {tensor.stride()}; use parameter.data = parameter.data.contiguous() before training"
        )
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def flat_as(tensor: Tensor, param: Tensor) -> Tensor:
    """Returns the elements of `tensor` in the memory order of `param`, which has the same shape.

    Raises:
        ValueError: the tensor is sparse.
    """
    if tensor.layout is not torch.strided:
        raise ValueError(
            "PagedOptimizer takes no sparse gradients; use sparse=False or torch.optim.SparseAdam without paging"
        )
    if tensor.stride() != param.stride():
        tensor = torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
    return flat(tensor)

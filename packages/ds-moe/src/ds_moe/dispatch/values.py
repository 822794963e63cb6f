"""Tensors without values, with which a job is planned.

[Note: loads without values]
How many rows an expert gets depends on values. Where there are none, all experts get equally many, no row is
dropped, and all ranks send alike. With a capacity factor of 1 an expert gets no more rows than that from any rank, so
memory is as planned or a little less; without a capacity an expert that more tokens choose needs more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has elements: it is neither on the meta device nor a fake tensor of torch."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def count_experts(experts: Tensor, num_experts: int) -> Tensor:
    """Returns (E,) int64, how often each expert is in `experts`, a tensor of one dimension; without values, a tensor of
    that shape.
    """
    if has_values(experts):
        return torch.bincount(experts, minlength=num_experts)
    return experts.new_empty(num_experts)


def even_sizes(total: int, num_experts: int) -> list[int]:
    """Returns (E,), the sizes of experts that share `total` rows as equally as possible."""
    each, rest = divmod(total, num_experts)
    return [each + (index < rest) for index in range(num_experts)]

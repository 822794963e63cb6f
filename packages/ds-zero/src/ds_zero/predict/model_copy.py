"""A copy of a model without memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def fake_copy(model: nn.Module, *, hollow: bool) -> tuple[nn.Module, dict[int, nn.Parameter]]:
    """Returns a copy of `model` without memory, inside an active `FakeTensorMode`, and id of each parameter -> its
    copy. Values are not used, so the model may be on the meta device.

    With `hollow`, parameters take no memory until `shard` allocates them, as under `deferred_init`.
    """

    def empty(t: Tensor) -> Tensor:
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        return made.requires_grad_(t.requires_grad) if t.is_leaf and not isinstance(t, nn.Parameter) else made

    copies: dict[int, nn.Parameter] = {}
    memo: dict[int, Any] = {}
    keep: list[object] = []  # keeps the objects alive whose ids are in the memo
    for param in model.parameters():
        data = torch.empty(1, dtype=param.dtype).expand(param.shape) if hollow else empty(param.data)
        copies[id(param)] = memo[id(param)] = nn.Parameter(data, requires_grad=param.requires_grad)
    for module in model.modules():
        for value in torch.utils._pytree.tree_leaves(
            [v for n, v in vars(module).items() if n not in ("_parameters", "_modules")]
        ):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = empty(value)
                keep.append(value)
    try:
        return copy.deepcopy(model, memo), copies
    except Exception as error:
        raise ValueError(
            f"plan: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}): pass a function that "
            "makes the model instead of the model"
        ) from error

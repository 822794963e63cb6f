"""Whole weights out of a sharded model that lives."""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero


def consolidated(module: nn.Module, *, exclude_frozen: bool = False) -> OrderedDict[str, Tensor] | None:
    """Names -> whole values in the dtype in which the model computes, on rank 0; None elsewhere. Collective."""
    whole = ds_zero.full_state_dict(module)
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    params = dict(module.named_parameters(remove_duplicate=False))
    found: OrderedDict[str, Tensor] = OrderedDict()
    done: dict[int, Tensor] = {}
    for name, value in whole.items():
        param = params.get(name)
        if param is None:
            found[name] = value
        elif param.requires_grad or not exclude_frozen:
            # Tied weights stay one tensor.
            found[name] = done.setdefault(id(param), value.to(param.dtype))
    return found


def save_weights(path: str | os.PathLike[str], values: OrderedDict[str, Tensor] | None) -> None:
    """With torch.save, on the rank that has them; the file appears whole or not at all. Collective."""
    if values is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        torch.save(values, part)
        part.rename(target)
    if dist.is_initialized():
        dist.barrier()

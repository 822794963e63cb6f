"""Whole weights of a sharded model in memory."""

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
    """Returns name -> whole values in the compute dtype on rank 0; None on other ranks. Collective."""
    whole = ds_zero.full_state_dict(module)
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    params = dict(module.named_parameters(remove_duplicate=False))
    values: OrderedDict[str, Tensor] = OrderedDict()
    done: dict[int, Tensor] = {}
    for name, value in whole.items():
        param = params.get(name)
        if param is None:
            values[name] = value
        elif param.requires_grad or not exclude_frozen:
            # Tied weights stay one tensor.
            values[name] = done.setdefault(id(param), value.to(param.dtype))
    return values


def save_weights(path: str | os.PathLike[str], values: OrderedDict[str, Tensor] | None) -> None:
    """Saves the values by torch.save on the rank that has them. The file appears atomically. Collective."""
    if values is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        torch.save(values, part)
        part.rename(target)
    if dist.is_initialized():
        dist.barrier()

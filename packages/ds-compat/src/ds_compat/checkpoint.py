"""Whole weights out of a sharded model, and the script beside the checkpoints."""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ds_zero

if TYPE_CHECKING:
    from ds_compat.engine import DeepSpeedEngine

_SCRIPT = '''#!/usr/bin/env python
"""Whole fp32 weights from the checkpoints in this folder: python zero_to_fp32.py . output_folder"""

from ds_compat.zero_to_fp32 import main

main()
'''


def leave_script(folder: str | os.PathLike[str]) -> None:
    """Put `zero_to_fp32.py` beside the checkpoints, where people look for it."""
    target = Path(folder) / "zero_to_fp32.py"
    if not target.exists():
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        part.write_text(_SCRIPT, encoding="utf-8")
        part.rename(target)


def consolidated(engine: DeepSpeedEngine, exclude_frozen: bool) -> OrderedDict[str, Tensor] | None:
    """Names -> whole values in the dtype in which the model computes, on rank 0; None elsewhere. Collective."""
    whole = ds_zero.full_state_dict(engine.module)
    if engine.global_rank != 0:
        return None
    params = dict(engine.module.named_parameters(remove_duplicate=False))
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


def save_weights(path: str | os.PathLike[str], values: Any) -> None:
    """On the rank that has them; the file appears whole or not at all. Collective."""
    if values is not None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
        torch.save(values, part)
        part.rename(target)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def clone_tensors_for_torch_save(item: Any, device: Any = "cpu") -> Any:
    """A copy of nested lists, tuples and dicts whose tensors have memory of their own, on `device`."""
    if isinstance(item, Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(v, device) for v in item)
    if isinstance(item, dict):
        return type(item)((k, clone_tensors_for_torch_save(v, device)) for k, v in item.items())
    return item


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Where the original keeps the module of one model-parallel rank."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Where the original keeps the optimizer states of one rank."""
    return os.path.join(base_folder, f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_optim_states.pt")


def is_model_parallel_parameter(p: nn.Parameter) -> bool:
    """Whether a tensor-parallel layer marked it as divided."""
    return bool(getattr(p, "model_parallel", False) or getattr(p, "tensor_model_parallel", False))

"""`offload_states` with DeepSpeed's names of states, implemented by `ds_zero.Away`."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from enum import Enum

from torch import nn

import ds_zero

NOT_KEPT = "contiguous_grad_buffer"
"""A kind of state that does not exist between steps: gradients are reduced in temporary buffers."""


def send_away(
    module: nn.Module, include: Collection[str] | None, device: str, *, pin_memory: bool, non_blocking: bool
) -> ds_zero.Away | None:
    """See `Engine.offload_states`; names may be strings or members of a string enumeration."""
    where = _text(device)
    if where == "none":
        warnings.warn('offload_states(device="none") moves nothing', stacklevel=3)
        return None
    if where != "cpu":
        raise ValueError(f'offload_states(device={where!r}): states can be moved to "cpu" only')
    kinds = ds_zero.Away.KINDS if include is None else [_text(kind) for kind in include]
    known = (*ds_zero.Away.KINDS, NOT_KEPT)
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"offload_states(include=[{kind!r}]): unknown; known are {', '.join(known)}")
    wanted = [kind for kind in kinds if kind != NOT_KEPT]
    return ds_zero.Away(module, wanted, pin_memory=pin_memory, non_blocking=non_blocking)


def _text(value: str) -> str:
    return str(value.value) if isinstance(value, Enum) else str(value)

"""`deepspeed.tp_model_init`, and the groups of tensor-parallel ranks."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_engine

_sizes: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
"""Models -> number of ranks that `initialize` will cut them among."""


def tp_model_init(
    model: nn.Module, tp_size: int, dtype: torch.dtype | None = None, config: Any = None, **_: Any
) -> nn.Module:
    """Notes that `deepspeed.initialize` cuts the layers of `model` among `tp_size` ranks, and returns the model in
    `dtype`.

    Raises:
        ValueError: `tp_size` is less than 1.
    """
    if tp_size < 1:
        raise ValueError(f"tp_size is {tp_size}: it must be at least 1")
    _sizes[model] = tp_size
    return model if dtype is None else model.to(dtype)


def with_tensor(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns a configuration with the size that was given to `tp_model_init`."""
    size = _sizes.get(model, 1)
    if size == 1:
        return dict(config)
    section = dict(config.get("tensor_parallel") or {})
    if section.get("autotp_size", 0) in (0, 1):
        section["autotp_size"] = size
    return {**config, "tensor_parallel": section}


class TensorMpu:
    """The groups of an engine whose layers are cut, with Megatron's methods."""

    def __init__(self, engine: ds_engine.Engine) -> None:
        self._topology, self._group = engine.topology, engine.roles.tensor_group

    def get_model_parallel_group(self) -> Any:
        return self._group

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor.index

    def get_data_parallel_world_size(self) -> int:
        return self._topology.samples.size

    def get_data_parallel_rank(self) -> int:
        return self._topology.samples.index

    def get_data_parallel_group(self) -> Any:
        raise NotImplementedError(
            f"rank {dist.get_rank()}: the data-parallel group of a tensor-parallel engine is not exposed; use the "
            "engine's own methods"
        )

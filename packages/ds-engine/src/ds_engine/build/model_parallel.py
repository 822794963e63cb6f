"""An `mpu` object, as Megatron-LM makes one and DeepSpeed takes it, in our words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn

import ds_zero
from ds_comm import World
from ds_engine.config import ConfigError, DsConfig


@dataclass(frozen=True, kw_only=True)
class DataAxis:
    """The ranks that see different data, and what `ds_zero.shard` is told of them."""

    rank: int
    size: int
    model_parallel_size: int = 1
    """Ranks that together hold one copy of the model."""
    model_parallel_rank: int = 0
    """Which part of the model this rank holds."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `ds_zero.shard`."""


def data_axis(mpu: Any, world: World, settings: DsConfig) -> DataAxis:
    """All ranks, or the data-parallel ones of `mpu`.

    A parameter that carries `tensor_model_parallel` or `model_parallel` counts in norms on every rank of the
    model-parallel group, any other on those of tensor-parallel rank 0, so that stages of a pipeline count all.

    Raises:
        ValueError: an object that lacks a method.
        ConfigError: settings that choose groups, too.
    """
    if mpu is None:
        return DataAxis(rank=world.rank, size=world.world_size)
    if settings.zero_optimization.mics_shard_size > 0:
        raise ConfigError(
            [
                "zero_optimization.mics_shard_size makes groups of all ranks, and mpu has groups of its own: remove one"
            ]
        )
    group = _ask(mpu, "get_data_parallel_group")
    size = int(_ask(mpu, "get_data_parallel_world_size"))
    rank = int(_ask(mpu, "get_data_parallel_rank"))
    parts = int(_ask(mpu, "get_model_parallel_world_size", "get_tensor_model_parallel_world_size"))
    options: dict[str, Any] = {"mesh": group}
    part = 0
    if parts > 1:
        across = _ask(mpu, "get_model_parallel_group", "get_tensor_model_parallel_group")
        part = dist.get_rank(across)
        first = (
            int(
                _ask(
                    mpu,
                    "get_tensor_model_parallel_rank",
                    "get_slice_parallel_rank",
                    "get_model_parallel_rank",
                )
            )
            == 0
        )
        options["model_parallel"] = ds_zero.ModelParallel(group=across, is_cut=_counts(first))
    return DataAxis(
        rank=rank, size=size, model_parallel_size=parts, model_parallel_rank=part, options=options
    )


def _counts(first: bool) -> Callable[[str, nn.Parameter], bool]:
    def counts(fqn: str, param: nn.Parameter) -> bool:
        return first or ds_zero.cut_by_model_parallelism(fqn, param)

    return counts


def _ask(mpu: Any, *names: str) -> Any:
    for name in names:
        method = getattr(mpu, name, None)
        if method is not None:
            return method()
    raise ValueError(
        f"mpu: {type(mpu).__name__} has no method {' or '.join(names)}: pass an object with Megatron's methods for "
        "data- and model-parallel groups, ranks and sizes"
    )

"""Builds the optimizers of ds_comm, which reduce gradients themselves, from the section `optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

import ds_comm.optim

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

ACCEPTED = ("residual_dtype", "reduce_dtype", "variance_floor", "cuda_aware", "comm_backend_name")
"""Arguments that all of them have in a configuration, besides their own."""


def maker(class_name: str) -> Callable[..., Optimizer]:
    """Returns a function that makes the optimizer `class_name` of ds_comm from parameters and arguments of the
    configuration.
    """

    def make(
        parameters: Iterable[Any],
        *,
        group: dist.ProcessGroup | None = None,
        residual_dtype: str = "fp32",
        reduce_dtype: str = "fp32",
        variance_floor: float = 0.01,
        **arguments: Any,
    ) -> Optimizer:
        for key, name in (("residual_dtype", residual_dtype), ("reduce_dtype", reduce_dtype)):
            if name not in _DTYPES:
                raise ValueError(f"{key} is {name!r}, but must be one of {', '.join(_DTYPES)}")
        compression = ds_comm.optim.CompressionOptions(
            residual_dtype=_DTYPES[residual_dtype],
            reduce_dtype=_DTYPES[reduce_dtype],
            variance_floor=variance_floor,
            broadcast_parameters=False,  # ds_zero.shard gives all ranks the values of rank 0
        )
        made: Optimizer = getattr(ds_comm.optim, class_name)(
            parameters, group=group, compression=compression, **arguments
        )
        return made

    return make
